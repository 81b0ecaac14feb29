"""Token shards on disk, in the indexed format of Megatron-LM, read through memory maps.

A shard is two files. `.bin` holds the ids of all documents one after another, int32 little endian. `.idx` holds, little
endian and without padding:

    9 bytes   magic "MMIDIDX\\0\\0"
    u64       version, 1
    u8        type of the ids, 4 = int32
    u64       number of sequences S
    u64       number of document borders D + 1
    int32[S]  tokens of each sequence
    int64[S]  byte at which each sequence begins in .bin
    int64[D+1] first sequence of each document, then S

We write one sequence per document. A corpus is a folder of shards per split ("train", "valid") and a `manifest.json`,
which is written last: a folder with a manifest is complete.

    corpus = Corpus.open("outputs/debug/tokens/code", "train")
    ids = corpus.tokens(0, 0, int(corpus.document_lengths[0]))
"""

import os
import struct
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np

from mobilellm_pro.data.manifest import Manifest, ShardRecord, file_sha256, read_manifest

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
DTYPE_CODE_INT32 = 4
HEADER = struct.Struct("<9sQBQQ")
TOKEN_BYTES = 4
REMAKE = "delete the folder and run `prepare` again"


class ShardWriter:
    """Writes documents into shards `<folder>/<split>-00000.bin/.idx`, each at most `shard_tokens` long.

    Use as a context manager: leaving it normally finishes the last shard, leaving it by an error removes the
    unfinished one. Every file is written under a temporary name and renamed when complete.
    """

    def __init__(self, folder: str | Path, split: str, *, shard_tokens: int) -> None:
        """Writes nothing yet; the first document opens the first shard."""
        self.records: list[ShardRecord] = []
        self._folder, self._split, self._shard_tokens = Path(folder), split, shard_tokens
        self._file: BinaryIO | None = None
        self._lengths: list[int] = []
        self._tokens = 0
        self._max_id = -1

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None:
            self._finish_shard()
        elif self._file:
            self._file.close()
            self._temporary(".bin").unlink(missing_ok=True)

    def add(self, ids: np.ndarray, document_id: str) -> None:
        """Appends one document.

        Args:
            ids: int32 [tokens].
            document_id: named in errors.

        Raises:
            ValueError: the document is longer than a shard may be.
        """
        if len(ids) > self._shard_tokens:
            raise ValueError(
                f"document {document_id!r} has {len(ids)} tokens, more than shard_tokens = {self._shard_tokens}: "
                "raise shard_tokens or split the document"
            )
        if self._tokens + len(ids) > self._shard_tokens:
            self._finish_shard()
        if self._file is None:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._file = self._temporary(".bin").open("wb")
        self._file.write(np.ascontiguousarray(ids, dtype="<i4").tobytes())
        self._lengths.append(len(ids))
        self._tokens += len(ids)
        self._max_id = max(self._max_id, int(ids.max(initial=-1)))

    def _finish_shard(self) -> None:
        if self._file is None:
            return
        self._file.close()
        write_index(self._temporary(".idx"), np.array(self._lengths, dtype=np.int32))
        name = self._name()
        digests = {suffix: file_sha256(self._temporary(suffix)) for suffix in (".bin", ".idx")}
        for suffix in (".bin", ".idx"):
            os.replace(self._temporary(suffix), self._folder / f"{name}{suffix}")
        record = ShardRecord(name, len(self._lengths), self._tokens, self._max_id, digests[".bin"], digests[".idx"])
        self.records.append(record)
        self._file, self._lengths, self._tokens, self._max_id = None, [], 0, -1

    def _name(self) -> str:
        return f"{self._split}-{len(self.records):05d}"

    def _temporary(self, suffix: str) -> Path:
        return self._folder / f"{self._name()}{suffix}.tmp"


def write_index(path: Path, lengths: np.ndarray) -> None:
    """Writes the `.idx` of documents of the given lengths (int32 [documents]), one sequence each."""
    ends = np.cumsum(lengths, dtype=np.int64)
    with path.open("wb") as file:
        file.write(HEADER.pack(MAGIC, VERSION, DTYPE_CODE_INT32, len(lengths), len(lengths) + 1))
        file.write(lengths.astype("<i4").tobytes())
        file.write(((ends - lengths) * TOKEN_BYTES).astype("<i8").tobytes())
        file.write(np.arange(len(lengths) + 1, dtype="<i8").tobytes())


def read_index(path: Path) -> np.ndarray:
    """int64 [documents]: tokens of each document of a shard; sequences of one document are joined.

    Args:
        path: the `.idx`; its `.bin` must lie beside it.

    Raises:
        FileNotFoundError: one of the two files is missing.
        ValueError: wrong magic, version or type; an index shorter than it says; pointers that do not follow the
            lengths; a `.bin` of another size than the index describes.
    """
    binary = path.with_suffix(".bin")
    for file in (path, binary):
        if not file.is_file():
            raise FileNotFoundError(f"{file} is missing: {REMAKE}")
    raw = path.read_bytes()
    magic, version, code, sequences, borders = HEADER.unpack(raw[: HEADER.size].ljust(HEADER.size, b"\0"))
    if magic != MAGIC or version != VERSION:
        raise ValueError(f"{path}: not an index of version {VERSION} (it starts with {raw[:9]!r}): {REMAKE}")
    if code != DTYPE_CODE_INT32:
        raise ValueError(f"{path}: ids have type code {code}, expected {DTYPE_CODE_INT32} (int32): prepare as int32")
    expected = HEADER.size + 12 * sequences + 8 * borders
    if len(raw) != expected:
        raise ValueError(f"{path}: {len(raw)} bytes, expected {expected} for {sequences} sequences: {REMAKE}")
    lengths = np.frombuffer(raw, "<i4", sequences, HEADER.size).astype(np.int64)
    pointers = np.frombuffer(raw, "<i8", sequences, HEADER.size + 4 * sequences)
    first = np.frombuffer(raw, "<i8", borders, HEADER.size + 12 * sequences)
    ends = np.cumsum(lengths)
    size = binary.stat().st_size
    wrong = np.flatnonzero((pointers != (ends - lengths) * TOKEN_BYTES) | (lengths < 0) | (pointers > size))
    if len(wrong):
        raise ValueError(
            f"{path}: sequence {wrong[0]} points to byte {pointers[wrong[0]]}, outside {binary.name} ({size} bytes) or "
            f"not where the sequence before it ends: {REMAKE}"
        )
    total = int(ends[-1]) if sequences else 0
    if size != total * TOKEN_BYTES:
        raise ValueError(
            f"{binary}: {size} bytes, but {path.name} describes {total * TOKEN_BYTES}; truncated or of "
            f"another run: {REMAKE}"
        )
    if borders < 1 or first[0] != 0 or first[-1] != sequences or np.any(np.diff(first) < 0):
        raise ValueError(f"{path}: document borders do not run from 0 to {sequences}: {REMAKE}")
    sums = np.concatenate(([0], ends))
    return np.diff(sums[first])


class Corpus:
    """One split of one prepared corpus: documents of token ids, read on demand.

    Attributes:
        folder, split, manifest: what was opened.
        name: folder name.
        document_lengths: int64 [documents], tokens of each document (bos and eos included).
        num_documents, num_tokens: totals of the split.
    """

    def __init__(self, folder: Path, split: str, manifest: Manifest) -> None:
        """Opens the shards that the manifest lists; call `Corpus.open`."""
        self.folder, self.split, self.manifest, self.name = folder, split, manifest, folder.name
        records = manifest.shards[split]
        lengths = [self._open_shard(record) for record in records]
        self.document_lengths = np.concatenate(lengths)
        self.num_documents, self.num_tokens = len(self.document_lengths), int(self.document_lengths.sum())
        self._maps = [np.memmap(folder / f"{record.name}.bin", "<i4", "r") for record in records]
        self._first_document = np.cumsum([0, *(len(part) for part in lengths)])
        ends = np.cumsum(self.document_lengths)
        shard_starts = np.cumsum([0, *(int(part.sum()) for part in lengths)])[:-1]
        # Where a document begins inside its own shard.
        self._starts = ends - self.document_lengths - np.repeat(shard_starts, [len(part) for part in lengths])

    @classmethod
    def open(
        cls, folder: str | Path, split: str = "train", *, vocab_size: int | None = None, fingerprint: str | None = None
    ) -> "Corpus":
        """Opens and checks a split; reads the indexes, not the tokens.

        Args:
            folder: made by `prepare`.
            split: "train" or "valid".
            vocab_size: ids that the model knows; a corpus with a larger id is refused.
            fingerprint: of the tokenizer in use; a corpus of another tokenizer is refused.

        Raises:
            FileNotFoundError: no manifest or a missing shard.
            ValueError: a damaged shard, an empty split, a wrong tokenizer, an id outside the vocabulary.
        """
        manifest = read_manifest(Path(folder))
        if not manifest.shards.get(split):
            raise ValueError(
                f"{folder}: the split {split!r} is empty (splits: {manifest.split_sizes()}): "
                "raise `holdout` or give more text, and prepare again"
            )
        if fingerprint not in (None, manifest.fingerprint):
            raise ValueError(
                f"{folder}: made with the tokenizer {manifest.tokenizer} ({manifest.fingerprint[:12]}), the tokenizer "
                f"in use is another one ({str(fingerprint)[:12]}): prepare the corpus again or correct the tokenizer"
            )
        limit = manifest.vocab_size if vocab_size is None else min(vocab_size, manifest.vocab_size)
        for record in manifest.shards[split]:
            if record.max_id >= limit:
                raise ValueError(
                    f"{Path(folder) / record.name}.bin: holds id {record.max_id}, but the vocabulary has {limit} ids: "
                    "prepare the corpus with the model's tokenizer"
                )
        return cls(Path(folder), split, manifest)

    def tokens(self, document: int, start: int, stop: int) -> np.ndarray:
        """int32 [stop - start], a read-only view of a document's ids (0 <= start <= stop <= length)."""
        assert 0 <= start <= stop <= self.document_lengths[document]
        shard = int(np.searchsorted(self._first_document, document, side="right")) - 1
        begin = int(self._starts[document])
        return self._maps[shard][begin + start : begin + stop]

    def verify(self) -> None:
        """Reads every byte: raises ValueError for a wrong checksum or an id outside the vocabulary."""
        for record, ids in zip(self.manifest.shards[self.split], self._maps, strict=True):
            path = self.folder / f"{record.name}.bin"
            largest, smallest = int(ids.max(initial=0)), int(ids.min(initial=0))
            if largest >= self.manifest.vocab_size or smallest < 0:
                bad = largest if largest >= self.manifest.vocab_size else smallest
                raise ValueError(f"{path}: id {bad} is outside the vocabulary of {self.manifest.vocab_size}: {REMAKE}")
            for suffix, expected in ((".bin", record.bin_sha256), (".idx", record.idx_sha256)):
                if file_sha256(path.with_suffix(suffix)) != expected:
                    raise ValueError(f"{path.with_suffix(suffix)}: sha256 differs from the manifest's: {REMAKE}")

    def _open_shard(self, record: ShardRecord) -> np.ndarray:
        path = self.folder / f"{record.name}.idx"
        lengths = read_index(path)
        if (len(lengths), int(lengths.sum())) != (record.documents, record.tokens):
            raise ValueError(
                f"{path}: {len(lengths)} documents and {lengths.sum()} tokens, the manifest says "
                f"{record.documents} and {record.tokens}: {REMAKE}"
            )
        return lengths

    def __getstate__(self) -> dict[str, Any]:
        """A worker process opens the files again instead of receiving the mapped tokens."""
        return {"folder": self.folder, "split": self.split, "manifest": self.manifest}

    def __setstate__(self, state: dict[str, Any]) -> None:
        Corpus.__init__(self, **state)

"""Token shards on disk, in the indexed format of Megatron-LM (`shard_index`), read through memory maps.

A corpus is a folder of shards per split ("train", "valid" and, where it was asked for, "dev") and a `manifest.json`,
which is written last: a folder with a manifest is complete. Documents are numbered through all shards of a split.
Nothing that grows with the number of documents is held in memory.

    corpus = Corpus.open("outputs/debug/tokens/code", "train")
    ids = corpus.tokens(0, 0, int(corpus.lengths(0, 1)[0]))
"""

import errno
import hashlib
import resource
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from mobilellm_pro.data.clusters import DocumentClusters, open_clusters
from mobilellm_pro.data.manifest import Manifest, ShardRecord, read_manifest
from mobilellm_pro.data.shard_index import REMAKE, ShardIndex

_BLOCK_BYTES = 2**24  # `verify` reads in steps of this many
_OPEN_FILES = 2**16


class Corpus:
    """One split of one prepared corpus: documents of token ids, read on demand.

    Attributes:
        folder, split, manifest: what was opened.
        name: folder name.
        num_documents, num_tokens: totals of the split.
        vocab_size: ids below this are legal, in the corpus and for who opened it.
        shard_ids: per shard the mapped ids of its `.bin`, int32 or uint16.
    """

    def __init__(self, folder: Path, split: str, manifest: Manifest, vocab_size: int, check_index: bool) -> None:
        """Opens the shards that the manifest lists; call `Corpus.open`."""
        self.folder, self.split, self.manifest, self.name = folder, split, manifest, folder.name
        self.vocab_size, self._check = vocab_size, check_index
        self.num_documents, self.num_tokens = manifest.documents(split), manifest.tokens(split)
        records = manifest.shards[split]
        _allow_many_files()
        try:
            self._indexes = [self._open_index(record, check_index) for record in records]
            self.shard_ids = [index.map_ids() for index in self._indexes]
        except OSError as error:
            if error.errno != errno.EMFILE:
                raise
            raise ValueError(
                f"{folder}: its {len(records)} shards need two open files each, more than this process may have: raise "
                "the hard limit of `ulimit -n`, or prepare the corpus again with a larger shard_tokens"
            ) from None
        self._first_document = np.cumsum([0, *(record.documents for record in records)])

    @classmethod
    def open(
        cls, folder: str | Path, split: str = "train", *, vocab_size: int | None = None,
        fingerprint: str | None = None, check_index: bool = True,
    ) -> "Corpus":  # fmt: skip
        """Opens and checks a split; reads the indexes, not the tokens.

        Args:
            folder: made by `prepare`.
            split: "train", "valid" or "dev".
            vocab_size: ids that the model knows; a corpus with a larger id is refused.
            fingerprint: of the tokenizer in use; a corpus of another tokenizer is refused.
            check_index: compare every document with the size of its `.bin`, and the sums with the manifest (about
                0.3 s for 20 million documents); without it only headers and sizes.

        Raises:
            FileNotFoundError: no manifest or a missing shard.
            ValueError: a damaged shard, an empty split, a wrong tokenizer, an id outside the vocabulary, more shards
                than this process may open.
        """
        manifest = read_manifest(Path(folder))
        if not manifest.shards.get(split):
            share = "dev" if split == "dev" else "holdout"
            state = "is empty" if split in manifest.shards else "does not exist"
            raise ValueError(
                f"{folder}: the split {split!r} {state} (splits: {manifest.split_sizes()}): raise `{share}` of this "
                "dataset in its datasets.toml or give more text, and prepare again"
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
        return cls(Path(folder), split, manifest, limit, check_index)

    def lengths(self, first: int, last: int) -> np.ndarray:
        """int64 [last - first]: tokens of the documents first .. last - 1 (bos and eos included)."""
        assert 0 <= first <= last <= self.num_documents
        lengths = np.empty(last - first, dtype=np.int64)
        shard, position = self._shard_of(first), first
        while position < last:
            begin, end = self._first_document[shard], min(last, int(self._first_document[shard + 1]))
            part = self._indexes[shard].lengths[position - begin : end - begin]
            lengths[position - first : end - first] = part
            shard, position = shard + 1, end
        return lengths

    @cached_property
    def content(self) -> str:
        """Eight hex digits that change with any token of the split or with their order."""
        records = self.manifest.shards[self.split]
        digest = hashlib.sha256("".join(record.bin_sha256 + record.idx_sha256 for record in records).encode())
        return digest.hexdigest()[:8]

    @cached_property
    def clusters(self) -> DocumentClusters:
        """To which cluster each document belongs; read when it is asked for.

        Raises:
            ValueError: the corpus has no clusters, those of other documents, or damaged ones.
        """
        return open_clusters(self.folder, self.split, self.content, self.num_documents, check=self._check)

    def locate(self, documents: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Where documents lie; reads three entries of the index each.

        Args:
            documents: int64 [documents], numbers in any order.

        Returns:
            int64 [documents] each: shard, first token in `shard_ids` of it, and number of tokens.
        """
        shards = np.searchsorted(self._first_document, documents, side="right") - 1
        local = documents - self._first_document[shards]
        begins, lengths = np.empty_like(local), np.empty_like(local)
        for shard in set(shards.tolist()):
            index, of_shard = self._indexes[shard], shards == shard
            begins[of_shard] = index.pointers[local[of_shard]] // index.dtype.itemsize
            lengths[of_shard] = index.lengths[local[of_shard]]
        return shards, begins, lengths

    def views(self, shards: list[int], begins: list[int], stops: list[int]) -> list[np.ndarray]:
        """Read-only views of the mapped ids: of each shard its tokens begin .. stop - 1."""
        ids = self.shard_ids
        return [ids[shard][begin:stop] for shard, begin, stop in zip(shards, begins, stops, strict=True)]

    def tokens(self, document: int, start: int, stop: int) -> np.ndarray:
        """[stop - start], a read-only view of a document's ids, int32 or uint16 (0 <= start <= stop <= length)."""
        shard = self._shard_of(document)
        index, local = self._indexes[shard], document - int(self._first_document[shard])
        assert 0 <= start <= stop <= index.lengths[local]
        begin = int(index.pointers[local]) // index.dtype.itemsize
        return self.shard_ids[shard][begin + start : begin + stop]

    def binary_of(self, document: int) -> Path:
        """The `.bin` that holds a document, for messages."""
        return self._indexes[self._shard_of(document)].path.with_suffix(".bin")

    def verify(self, progress: Callable[[int], None] | None = None) -> None:
        """Reads every byte, 16 MiB at a time: ids, then sha256 of both files of each shard.

        Args:
            progress: called after each step with the bytes that it read (`tqdm.update` fits).

        Raises:
            ValueError: a wrong checksum or an id outside the vocabulary.
        """
        for record, index in zip(self.manifest.shards[self.split], self._indexes, strict=True):
            for suffix, expected in ((".bin", record.bin_sha256), (".idx", record.idx_sha256)):
                path = index.path.with_suffix(suffix)
                if self._digest(path, index.dtype if suffix == ".bin" else None, progress) != expected:
                    raise ValueError(f"{path}: sha256 differs from the manifest's: {REMAKE}")

    def _digest(self, path: Path, dtype: np.dtype | None, progress: Callable[[int], None] | None) -> str:
        """sha256 of a file in hex; where dtype is given, the ids in it are compared with the vocabulary."""
        digest, position = hashlib.sha256(), 0
        with path.open("rb") as file:
            while block := file.read(_BLOCK_BYTES):
                digest.update(block)
                if dtype is not None:
                    ids = np.frombuffer(block, dtype, len(block) // dtype.itemsize)
                    wrong = (ids < 0) | (ids >= self.manifest.vocab_size)
                    if wrong.any():
                        place = int(wrong.argmax())
                        raise ValueError(
                            f"{path}: id {ids[place]} at token {position + place} is outside the vocabulary of "
                            f"{self.manifest.vocab_size}: {REMAKE}"
                        )
                    position += len(ids)
                if progress:
                    progress(len(block))
        return digest.hexdigest()

    def _shard_of(self, document: int) -> int:
        return int(np.searchsorted(self._first_document, document, side="right")) - 1

    def _open_index(self, record: ShardRecord, check: bool) -> ShardIndex:
        index = ShardIndex.open(self.folder / f"{record.name}.idx", check)
        documents, tokens = len(index.lengths), index.num_tokens if check else record.tokens
        if (documents, tokens) != (record.documents, record.tokens):
            raise ValueError(
                f"{index.path}: {documents} documents and {tokens} tokens, the manifest says "
                f"{record.documents} and {record.tokens}: {REMAKE}"
            )
        return index

    def __getstate__(self) -> dict[str, Any]:
        """A worker process opens the files again instead of receiving the mapped tokens."""
        names = ("folder", "split", "manifest", "vocab_size")
        return {name: getattr(self, name) for name in names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        Corpus.__init__(self, **state, check_index=False)


def _allow_many_files() -> None:
    """Raises the soft limit of open files, often 1,024: a map holds its file open, and a corpus has many shards."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, _OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))

"""Token shards on disk, in the indexed format of Megatron-LM (`shard_index`), read through memory maps.

We write one sequence per document. A corpus is a folder of shards per split ("train", "valid") and a `manifest.json`,
which is written last: a folder with a manifest is complete.

    corpus = Corpus.open("outputs/debug/tokens/code", "train")
    ids = corpus.tokens(0, 0, int(corpus.document_lengths[0]))
"""

from pathlib import Path
from typing import Any

import numpy as np

from mobilellm_pro.data.manifest import Manifest, ShardRecord, file_sha256, read_manifest
from mobilellm_pro.data.shard_index import REMAKE, read_index


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

"""One corpus as an endless stream of tokens, cut into rows: what row j holds is a function of (seed, j).

The stream is epoch after epoch, each a permutation of the documents that depends on seed and epoch alone. Row j covers
the tokens [j * seq_len, (j + 1) * seq_len] including the last one, which is the label of the last input and the first
token of row j + 1: every token is an input exactly once, and no token is lost at the border of rows or epochs.

The permutation sorts the documents by a keyed integer hash written out below, not by a library's random generator,
whose stream may change between releases: a run that lasts months must find its order again.

    stream = CorpusStream(Corpus.open(folder), seq_len=2048, seed=1)
    row = stream.sequence(123_456)
"""

from collections import OrderedDict
from typing import Any, NamedTuple

import numpy as np

from mobilellm_pro.data.shards import Corpus

_CACHED_EPOCHS = 2  # a row that crosses an epoch border needs both


class Sequence(NamedTuple):
    """One packed row of seq_len + 1 tokens.

    Attributes:
        tokens: int32 [seq_len + 1]; inputs are all but the last, labels all but the first.
        document_ids: int32 [seq_len + 1]; 0 at the first token, one more at every token that begins a document.
        epoch: pass over the corpus in which the first token lies, from 0.
    """

    tokens: np.ndarray
    document_ids: np.ndarray
    epoch: int


class CorpusStream:
    """Rows of one corpus by number; holds no position, so reading rows in any order gives the same rows."""

    def __init__(self, corpus: Corpus, *, seq_len: int, seed: int) -> None:
        """
        Args:
            corpus: an opened split.
            seq_len: inputs of a row, in tokens.
            seed: any integer; the corpus name goes in too, so that equal corpora under two names differ in order.

        Raises:
            ValueError: the corpus is smaller than one row.
        """
        if seq_len < 1:
            raise ValueError(f"seq_len = {seq_len}: expected at least 1")
        if corpus.num_tokens < seq_len + 1:
            raise ValueError(
                f"{corpus.folder}: the split {corpus.split!r} has {corpus.num_tokens} tokens, fewer than one sequence "
                f"of seq_len + 1 = {seq_len + 1}: shorten seq_len or give more text"
            )
        self.corpus, self.seq_len = corpus, seq_len
        self._key = hash_key(seed, corpus.name)
        self._epochs: OrderedDict[int, tuple[np.ndarray, np.ndarray]] = OrderedDict()

    @property
    def sequences_per_epoch(self) -> int:
        """Whole rows in one pass over the corpus."""
        return self.corpus.num_tokens // self.seq_len

    def epoch(self, index: int) -> int:
        """Pass over the corpus in which row `index` begins, from 0."""
        return index * self.seq_len // self.corpus.num_tokens

    def sequence(self, index: int) -> Sequence:
        """Row `index` >= 0 of the stream."""
        position, need = index * self.seq_len, self.seq_len + 1
        tokens = np.empty(need, dtype=np.int32)
        begins = np.zeros(need, dtype=np.int32)
        filled = 0
        while filled < need:
            epoch, offset = divmod(position + filled, self.corpus.num_tokens)
            filled = self._fill(tokens, begins, filled, epoch, offset)
        begins[0] = 0
        return Sequence(tokens, np.cumsum(begins, dtype=np.int32), self.epoch(index))

    def _fill(self, tokens: np.ndarray, begins: np.ndarray, filled: int, epoch: int, offset: int) -> int:
        """Copies from token `offset` of `epoch` to the end of the row or of the epoch; returns the new fill."""
        order, ends = self._epoch_order(epoch)
        # side="right" steps over documents without tokens.
        rank = int(np.searchsorted(ends, offset, side="right"))
        while filled < len(tokens) and rank < len(order):
            document = int(order[rank])
            length = int(self.corpus.document_lengths[document])
            start = offset - (int(ends[rank]) - length)
            count = min(length - start, len(tokens) - filled)
            tokens[filled : filled + count] = self.corpus.tokens(document, start, start + count)
            if start == 0 and count:
                begins[filled] = 1
            filled, offset, rank = filled + count, offset + count, rank + 1
        return filled

    def _epoch_order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Documents in the order of the epoch, int64 [documents], and the token at which each of them ends."""
        if epoch not in self._epochs:
            order = permutation(self.corpus.num_documents, self._key, epoch)
            self._epochs[epoch] = order, np.cumsum(self.corpus.document_lengths[order])
            if len(self._epochs) > _CACHED_EPOCHS:
                self._epochs.popitem(last=False)
        self._epochs.move_to_end(epoch)
        return self._epochs[epoch]

    def __getstate__(self) -> dict[str, Any]:
        """Leaves the cached orders behind: a worker computes them again in less time than they take to send."""
        return {**self.__dict__, "_epochs": OrderedDict()}


def permutation(size: int, key: int, epoch: int) -> np.ndarray:
    """int64 [size]: the numbers 0 .. size-1 in an order that depends on (key, epoch) only.

    Sorts by a 64-bit hash of (key, epoch, number). For two numbers with one hash the smaller comes first.
    """
    start = (key ^ (epoch * 0x9E3779B97F4A7C15)) & 0xFFFFFFFFFFFFFFFF
    base = mix64(np.array([start], dtype=np.uint64))[0]
    numbers = np.arange(size, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    return np.argsort(mix64(base + numbers), kind="stable")


def hash_key(seed: int, name: str) -> int:
    """A 64-bit key of a seed and a name (FNV-1a over their UTF-8 bytes, then mixed)."""
    value = 0xCBF29CE484222325
    for byte in f"{seed}:{name}".encode():
        value = ((value ^ byte) * 0x100000001B3) & 0xFFFFFFFFFFFFFFFF
    return int(mix64(np.array([value], dtype=np.uint64))[0])


def mix64(values: np.ndarray) -> np.ndarray:
    """The finalizer of SplitMix64, a bijection of uint64 in which every input bit moves every output bit."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))

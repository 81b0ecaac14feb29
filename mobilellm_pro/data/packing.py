"""One corpus as an endless stream of tokens, cut into rows: what row j holds is a function of (seed, j).

The stream is epoch after epoch, each an order of the documents (`shuffle`) that depends on seed and epoch alone. Row j
covers the tokens [j * seq_len, (j + 1) * seq_len] including the last one, which is the label of the last input and the
first token of row j + 1: every token is an input exactly once, and no token is lost at the border of rows or epochs.

    stream = CorpusStream(Corpus.open(folder), seq_len=2048, seed=1)
    stream.fill(123_456, input_S, labels_S, document_ids_S)

S = seq_len throughout.
"""

from bisect import bisect_left, bisect_right
from functools import cached_property
from typing import NamedTuple

import numpy as np

from mobilellm_pro.data.shards import Corpus
from mobilellm_pro.data.shuffle import BlockShuffle, Recent, hash_key, sum_blocks

IGNORE = -100  # label without a loss: what torch's cross entropy ignores
_CACHED_GROUPS = 4  # the longest rows reach into the next group or two


class Pieces(NamedTuple):
    """Parts of documents that follow one another, as lists of equal length.

    Attributes:
        documents: numbers, for messages.
        shards, begins: where the part lies: first token in `corpus.shard_ids` of the shard.
        counts: tokens, at least 1 each.
    """

    documents: list[int]
    shards: list[int]
    begins: list[int]
    counts: list[int]


class _Group(NamedTuple):
    """Documents of a group that have tokens; `ends` are their last tokens, counted from the group's first."""

    pieces: Pieces
    ends: list[int]


class CorpusStream:
    """Rows of one corpus by number; holds no position, so reading rows in any order gives the same rows."""

    def __init__(self, corpus: Corpus, *, seq_len: int, seed: int, max_document_tokens: int | None = None) -> None:
        """
        Args:
            corpus: an opened split.
            seq_len: inputs of a row, in tokens.
            seed: any integer; the corpus name goes in too, so that equal corpora under two names differ in order.
            max_document_tokens: read only the first so many tokens of every document.

        Raises:
            ValueError: the corpus is smaller than one row; a number below 1.
        """
        check_sizes(seq_len, max_document_tokens)
        self.corpus, self.seq_len, self.max_document_tokens = corpus, seq_len, max_document_tokens
        self.num_tokens = corpus.num_tokens  # of an epoch
        self._key = hash_key(seed, corpus.name)
        self._groups: Recent[_Group] = Recent(_CACHED_GROUPS)
        if max_document_tokens is not None and corpus.num_documents:
            self.num_tokens = self._shuffle.total
        if self.num_tokens < seq_len + 1:
            raise ValueError(
                f"{corpus.folder}: the split {corpus.split!r} has {self.num_tokens} tokens, fewer than one sequence "
                f"of seq_len + 1 = {seq_len + 1}: shorten seq_len or give more text"
            )

    @property
    def options(self) -> str:
        """What differs from the defaults, in words; it changes what the rows hold."""
        return describe_options("", self.max_document_tokens)

    @property
    def rows_per_epoch(self) -> float:
        """Rows in one pass over the corpus."""
        return self.num_tokens / self.seq_len

    @property
    def tokens_per_row(self) -> float:
        """Every row is full."""
        return float(self.seq_len)

    def epochs(self, rows: int) -> float:
        """Passes over the corpus after the first `rows` rows."""
        return rows * self.seq_len / self.num_tokens

    def fill(self, index: int, input_S: np.ndarray, labels_S: np.ndarray, document_ids_S: np.ndarray) -> None:
        """Writes row `index` >= 0 into views of a batch.

        Args:
            index: of the row.
            input_S: int64 [S].
            labels_S: int64 [S], the next tokens; -100 where the next token begins another document.
            document_ids_S: int32 [S], 0 at the first input, one more at every input that begins a document.

        Raises:
            ValueError: an id outside the vocabulary.
        """
        row, filled = Pieces([], [], [], []), 0
        while filled < self.seq_len:
            epoch, offset = divmod(index * self.seq_len + filled, self.num_tokens)
            group, offset = self._shuffle.find(epoch, offset)
            filled += self._take(epoch, group, offset, self.seq_len + 1 - filled, row)
        write_row(self.corpus, row, input_S, labels_S, document_ids_S)

    def _take(self, epoch: int, group: int, offset: int, need: int, row: Pieces) -> int:
        """Appends up to `need` tokens from token `offset` of a group on to the row; returns how many it found."""
        pieces, ends = self._groups.get((epoch, group), lambda: self._lay_out(epoch, group))
        first, last = bisect_right(ends, offset), bisect_left(ends, offset + need) + 1
        part = Pieces(*(values[first:last] for values in pieces))
        skipped = offset - (ends[first] - part.counts[0])
        part.begins[0] += skipped
        part.counts[0] -= skipped
        found = ends[min(last, len(ends)) - 1] - offset
        if found > need:
            part.counts[-1] -= found - need
        for values, more in zip(row, part, strict=True):
            values.extend(more)
        return min(found, need)

    def _lay_out(self, epoch: int, group: int) -> _Group:
        documents = self._shuffle.items(epoch, group)
        shards, begins, counts = self.corpus.locate(documents)
        if self.max_document_tokens is not None:
            np.minimum(counts, self.max_document_tokens, out=counts)
        with_tokens = counts > 0
        columns = (documents, shards, begins, counts)
        return _Group(
            Pieces(*(column[with_tokens].tolist() for column in columns)), np.cumsum(counts[with_tokens]).tolist()
        )

    @cached_property
    def _shuffle(self) -> BlockShuffle:
        """Made when the first row is asked for: it reads the lengths of all documents once."""
        size = self.corpus.num_documents
        return BlockShuffle(size, self._key, sum_blocks(size, self._lengths))

    def _lengths(self, first: int, last: int) -> np.ndarray:
        lengths = self.corpus.lengths(first, last)
        return lengths if self.max_document_tokens is None else np.minimum(lengths, self.max_document_tokens)


def check_sizes(seq_len: int, max_document_tokens: int | None) -> None:
    """Raises ValueError for a number below 1."""
    for name, value in (("seq_len", seq_len), ("max_document_tokens", max_document_tokens)):
        if value is not None and value < 1:
            raise ValueError(f"{name} = {value}: expected at least 1")


def describe_options(packing: str, max_document_tokens: int | None) -> str:
    """Options of a stream in words, empty for the defaults: what a checkpoint records about the rows."""
    limit = "" if max_document_tokens is None else f"max_document_tokens {max_document_tokens}"
    return ", ".join(part for part in (packing, limit) if part)


def write_row(
    corpus: Corpus, pieces: Pieces, input_S: np.ndarray, labels_S: np.ndarray, document_ids_S: np.ndarray
) -> None:
    """Writes parts of documents one after another into a row; every entry of the row is written once.

    Token i + 1 of a part is the label of its token i, and nothing predicts across parts. A part may reach one token
    beyond the row: that token is a label only. A row that is not full ends in padding: input 0, no label, and a
    document of its own.

    Args:
        corpus: that the parts lie in.
        pieces: of at most S + 1 tokens together.
        input_S, labels_S: int64 [S], written.
        document_ids_S: int32 [S], written.

    Raises:
        ValueError: an id outside the vocabulary, with its file and document.
    """
    size, position, ordinal = len(input_S), 0, 0
    for shard, begin, count in zip(pieces.shards, pieces.begins, pieces.counts, strict=True):
        ids, end, last = corpus.shard_ids[shard], position + count, begin + count
        if end > size:
            input_S[position:] = ids[begin : last - 1]
            labels_S[position:] = ids[begin + 1 : last]
        else:
            input_S[position:end] = ids[begin:last]
            labels_S[position : end - 1] = ids[begin + 1 : last]
            labels_S[end - 1] = IGNORE
        document_ids_S[position:end] = ordinal
        position, ordinal = end, ordinal + 1
    if position < size:
        input_S[position:], labels_S[position:], document_ids_S[position:] = 0, IGNORE, ordinal
    last_label = int(labels_S[-1])  # the only one that is not an input too
    # As unsigned numbers negative ids are the largest: one pass finds both kinds.
    if input_S.view(np.uint64).max() >= corpus.vocab_size or not (
        last_label == IGNORE or 0 <= last_label < corpus.vocab_size
    ):
        _raise_illegal_id(corpus, pieces)


def _raise_illegal_id(corpus: Corpus, pieces: Pieces) -> None:
    for document, shard, begin, count in zip(*pieces, strict=True):
        ids = corpus.shard_ids[shard][begin : begin + count]
        wrong = (ids < 0) | (ids >= corpus.vocab_size)
        if wrong.any():
            raise ValueError(
                f"{corpus.binary_of(document)}: document {document} holds id {ids[wrong.argmax()]}, outside the "
                f"vocabulary of {corpus.vocab_size}: the file was changed or is damaged; "
                "delete the folder and run `prepare` again"
            )

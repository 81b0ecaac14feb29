"""One corpus as an endless stream of tokens, cut into rows: what row j holds is a function of (seed, j).

The stream is epoch after epoch, each an order of the documents (`shuffle`) that depends on seed and epoch alone. Row j
covers the tokens [j * seq_len, (j + 1) * seq_len] including the last one, which is the label of the last input and the
first token of row j + 1: every token is an input exactly once, and no token is lost at the border of rows or epochs.

    stream = CorpusStream(Corpus.open(folder), seq_len=2048, seed=1)
    write_rows([(stream.corpus, stream.pieces(123_456))], input_BS, labels_BS, document_ids_BS)

S = seq_len throughout, B rows.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
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
        ids: views of the mapped tokens, at least 1 each.
    """

    documents: list[int]
    ids: list[np.ndarray]


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

    def pieces(self, index: int) -> Pieces:
        """What row `index` >= 0 consists of: seq_len + 1 tokens, or seq_len where a document ends with the row."""
        row, filled = Pieces([], []), 0
        while filled < self.seq_len:
            epoch, offset = divmod(index * self.seq_len + filled, self.num_tokens)
            group, offset = self._shuffle.find(epoch, offset)
            filled += self._take(epoch, group, offset, self.seq_len + 1 - filled, row)
        return row

    def _take(self, epoch: int, group: int, offset: int, need: int, row: Pieces) -> int:
        """Appends up to `need` tokens from token `offset` of a group on to the row; returns how many it found."""
        (documents, views), ends = self._groups.get((epoch, group), lambda: self._lay_out(epoch, group))
        first, last = bisect_right(ends, offset), bisect_left(ends, offset + need) + 1
        ids = views[first:last]
        skipped = len(ids[0]) - (ends[first] - offset)
        found = ends[min(last, len(ends)) - 1] - offset
        if found > need:
            ids[-1] = ids[-1][: need - found]
        ids[0] = ids[0][skipped:]
        row.documents.extend(documents[first:last])
        row.ids.extend(ids)
        return min(found, need)

    def _lay_out(self, epoch: int, group: int) -> _Group:
        documents = self._shuffle.items(epoch, group)
        shards, begins, counts = self.corpus.locate(documents)
        if self.max_document_tokens is not None:
            np.minimum(counts, self.max_document_tokens, out=counts)
        some = counts > 0
        views = self.corpus.views(shards[some], begins[some], counts[some])
        return _Group(Pieces(documents[some].tolist(), views), np.cumsum(counts[some]).tolist())

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


def write_rows(
    rows: Sequence[tuple[Corpus, Pieces]], input_BS: np.ndarray, labels_BS: np.ndarray, document_ids_BS: np.ndarray
) -> None:
    """Writes the rows of a batch, each the parts of documents of one corpus one after another.

    Token i + 1 of a part is the label of its token i, and nothing predicts across parts. A part may reach one token
    beyond the row: that token is a label only. A row that is not full ends in padding: input 0, no label, and a
    document of its own.

    Args:
        rows: B pairs (where the parts lie, parts of at most S + 1 tokens together).
        input_BS, labels_BS: int64 [B, S], written.
        document_ids_BS: int32 [B, S], written.

    Raises:
        ValueError: an id outside the vocabulary, with its file and document.
    """
    num_rows, size = input_BS.shape
    slots = size + 1
    ids: list[np.ndarray] = []
    numbers: list[int] = []
    padding = []
    for row, (_, pieces) in enumerate(rows):
        parts, filled = pieces.ids, sum(map(len, pieces.ids))
        if filled < slots:
            parts = [*parts, np.zeros(slots - filled, np.int32)]
        if filled < size:
            padding.append((row, filled))
        ids += parts
        numbers += range(len(parts))
    counts = np.fromiter(map(len, ids), np.int64, len(ids))
    tokens_BT = np.concatenate(ids, dtype=np.int32).reshape(num_rows, slots)
    # As unsigned numbers negative ids are the largest: one pass finds both kinds.
    if tokens_BT.view(np.uint32).max() >= min(corpus.vocab_size for corpus, _ in rows):
        _check_ids(rows)
    input_BS[:], labels_BS[:] = tokens_BT[:, :-1], tokens_BT[:, 1:]
    row_of_end, last = np.divmod(np.cumsum(counts) - 1, slots)
    inside = last < size
    labels_BS[row_of_end[inside], last[inside]] = IGNORE
    for row, filled in padding:
        labels_BS[row, filled:] = IGNORE
    document_ids_BS[:] = np.repeat(np.array(numbers, np.int32), counts).reshape(num_rows, slots)[:, :-1]


def _check_ids(rows: Sequence[tuple[Corpus, Pieces]]) -> None:
    for corpus, pieces in rows:
        for document, ids in zip(*pieces, strict=True):
            wrong = (ids < 0) | (ids >= corpus.vocab_size)
            if wrong.any():
                raise ValueError(
                    f"{corpus.binary_of(document)}: document {document} holds id {ids[wrong.argmax()]}, outside the "
                    f"vocabulary of {corpus.vocab_size}: the file was changed or is damaged; "
                    "delete the folder and run `prepare` again"
                )

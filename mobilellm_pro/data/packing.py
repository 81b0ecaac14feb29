"""One corpus as an endless stream of tokens, cut into rows: what row j holds is a function of (seed, j).

The stream is epoch after epoch, each an order of the documents (`shuffle`) that depends on seed and epoch alone. Row j
covers the tokens [j * seq_len, (j + 1) * seq_len] including the last one, which is the label of the last input and the
first token of row j + 1: every token is an input exactly once, and no token is lost at the border of rows or epochs.

    stream = CorpusStream(Corpus.open(folder), seq_len=2048, seed=1)
    write_rows([(stream.corpus, stream.pieces(123_456))], input_BS, labels_BS, document_ids_BS)

S = seq_len throughout, B rows of T = S + 1 tokens, P parts of documents in them.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np

from mobilellm_pro.data.document_limits import NO_LIMITS, DocumentLimits, check_positive
from mobilellm_pro.data.shards import Corpus
from mobilellm_pro.data.shuffle import BlockShuffle, Recent, hash_key

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
    """Documents of a group that are read, in order, as lists of equal length: rows take a few entries at a time.

    Attributes:
        documents: numbers.
        shards: where they lie.
        begins, stops: tokens of them in the shard.
        ends: last token of each, counted from the group's first.
    """

    documents: list[int]
    shards: list[int]
    begins: list[int]
    stops: list[int]
    ends: list[int]


class CorpusStream:
    """Rows of one corpus by number; holds no position, so reading rows in any order gives the same rows."""

    def __init__(
        self, corpus: Corpus, *, seq_len: int, seed: int, max_document_tokens: int | None = None,
        min_document_tokens: int | None = None, clusters: Sequence[int] | None = None,
    ) -> None:  # fmt: skip
        """
        Args:
            corpus: an opened split.
            seq_len: inputs of a row, in tokens.
            seed: any integer; the corpus name goes in too, so that equal corpora under two names differ in order.
            max_document_tokens: read only the first so many tokens of every document.
            min_document_tokens: read only documents that have at least so many tokens on disk.
            clusters: read only documents of these clusters (`clusters`); None: all documents.

        Raises:
            ValueError: what is read of the corpus is smaller than one row; a number below 1; no such cluster.
        """
        check_positive(seq_len=seq_len)
        self.corpus, self.seq_len = corpus, seq_len
        chosen = None if clusters is None else tuple(clusters)
        self._limits = DocumentLimits(min_document_tokens, max_document_tokens, chosen)
        self._key = hash_key(seed, corpus.name)
        self._groups: Recent[_Group] = Recent(_CACHED_GROUPS)
        limited = self._limits != NO_LIMITS and corpus.num_documents > 0
        self.num_tokens = self._shuffle.total if limited else corpus.num_tokens  # of an epoch
        self._limits.check_row(corpus, seq_len, self.num_tokens)

    @property
    def options(self) -> str:
        """What differs from the defaults, in words; it changes what the rows hold."""
        return self._limits.describe(self.corpus)

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
        documents, shards, begins, stops, ends = self._groups.get((epoch, group), lambda: self._lay_out(epoch, group))
        first = bisect_right(ends, offset)
        last = bisect_left(ends, offset + need, first) + 1
        found = ends[min(last, len(ends)) - 1] - offset
        own_begins, own_stops = begins[first:last], stops[first:last]
        own_begins[0] = own_stops[0] - (ends[first] - offset)  # the row may begin inside a document
        if found > need:
            own_stops[-1] -= found - need
        row.documents.extend(documents[first:last])
        row.ids.extend(self.corpus.views(shards[first:last], own_begins, own_stops))
        return min(found, need)

    def _lay_out(self, epoch: int, group: int) -> _Group:
        documents = self._shuffle.items(epoch, group)
        shards, begins, lengths = self.corpus.locate(documents)
        counts = self._limits.apply(self.corpus, documents, lengths)
        if not counts.all():  # neither empty documents nor those left out
            read = counts > 0
            documents, shards, begins, counts = documents[read], shards[read], begins[read], counts[read]
        columns = documents, shards, begins, begins + counts, np.cumsum(counts)
        return _Group(*(column.tolist() for column in columns))

    @cached_property
    def _shuffle(self) -> BlockShuffle:
        """Made when the first row is asked for: it reads the lengths of all documents once."""
        return BlockShuffle(self.corpus.num_documents, self._key, self._limits.block_tokens(self.corpus))


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
    lengths: list[int] = []
    numbers: list[int] = []
    padding = []
    for row, (_, pieces) in enumerate(rows):
        counts = list(map(len, pieces.ids))
        filled = sum(counts)
        ids += pieces.ids
        if filled < slots:
            ids.append(np.zeros(slots - filled, np.int32))
            counts.append(slots - filled)
        if filled < size:
            padding.append((row, filled))
        lengths += counts
        numbers += range(len(counts))
    tokens_BT = np.concatenate(ids, dtype=np.int32).reshape(num_rows, slots)
    # As unsigned numbers negative ids are the largest: one pass finds both kinds.
    if tokens_BT.view(np.uint32).max() >= min(corpus.vocab_size for corpus, _ in rows):
        _check_ids(rows)
    input_BS[:] = tokens_BT[:, :-1]
    lengths_P = np.array(lengths)
    # The first token of a part is no label; where a part begins with its row, it is none anyway.
    tokens_BT.reshape(-1)[np.cumsum(lengths_P)[:-1]] = IGNORE
    for row, filled in padding:
        tokens_BT[row, filled:] = IGNORE
    labels_BS[:] = tokens_BT[:, 1:]
    document_ids_BS[:] = np.repeat(np.array(numbers, np.int32), lengths_P).reshape(num_rows, slots)[:, :-1]


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

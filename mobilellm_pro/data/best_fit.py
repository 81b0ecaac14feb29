"""Rows of one corpus in which no short document is split: best-fit packing, the alternative to `packing`.

A row has room for seq_len + 1 tokens, of which the last is only a label. Longer documents are cut into full rows; what
remains of them and all shorter documents go, the longest first, into the row with the least room that still holds them.
Between two full rows of one document one prediction is lost. What stays empty is padding. After Ding et al., "Fewer
Truncations Improve Language Modeling" (2024).

Which documents share a row does not depend on the seed: it is decided once (`row_assignment`). An epoch is an order of
the rows (`shuffle`).

    rows = BestFitRows(Corpus.open(folder), seq_len=2048, seed=1)
    write_rows([(rows.corpus, rows.pieces(123_456))], input_BS, labels_BS, document_ids_BS)
"""

from collections.abc import Sequence
from functools import cached_property

import numpy as np

from mobilellm_pro.data.document_limits import DocumentLimits, check_positive
from mobilellm_pro.data.packing import Pieces
from mobilellm_pro.data.row_assignment import RowAssignment
from mobilellm_pro.data.shards import Corpus
from mobilellm_pro.data.shuffle import BlockShuffle, Recent, hash_key, sum_blocks

_CACHED_GROUPS = 4


class BestFitRows:
    """Rows of one corpus by number, as `CorpusStream`, with padding instead of split documents."""

    def __init__(
        self, corpus: Corpus, *, seq_len: int, seed: int, max_document_tokens: int | None = None,
        min_document_tokens: int | None = None, clusters: Sequence[int] | None = None,
    ) -> None:  # fmt: skip
        """
        Args:
            corpus: an opened split.
            seq_len: inputs of a row, in tokens.
            seed: any integer; the corpus name goes in too.
            max_document_tokens: read only the first so many tokens of every document.
            min_document_tokens: read only documents that have at least so many tokens on disk.
            clusters: read only documents of these clusters (`clusters`); None: all documents.

        Raises:
            ValueError: what is read of the corpus is smaller than one row; a number below 1; no such cluster; damaged
                files of an earlier assignment.
        """
        check_positive(seq_len=seq_len)
        self.corpus, self.seq_len = corpus, seq_len
        chosen = None if clusters is None else tuple(clusters)
        self._limits = DocumentLimits(min_document_tokens, max_document_tokens, chosen)
        self._limits.check_row(corpus, seq_len, self._limits.num_tokens(corpus))
        self._assignment = RowAssignment.of(corpus, seq_len + 1, self._limits)
        size = self._assignment.num_rows
        self._shuffle = BlockShuffle(size, hash_key(seed, corpus.name), sum_blocks(size, _ones))
        self._groups: Recent[np.ndarray] = Recent(_CACHED_GROUPS)

    @property
    def options(self) -> str:
        """What differs from the default stream, in words."""
        return ", ".join(filter(None, ("best_fit", self._limits.describe(self.corpus))))

    @property
    def rows_per_epoch(self) -> float:
        """Rows in one pass over the corpus."""
        return float(self._assignment.num_rows)

    @cached_property
    def tokens_per_row(self) -> float:
        """Inputs of a row on average, padding not counted."""
        return self._assignment.num_inputs(self.seq_len) / self._assignment.num_rows

    def epochs(self, rows: int) -> float:
        """Passes over the corpus after the first `rows` rows."""
        return rows / self._assignment.num_rows

    def pieces(self, index: int) -> Pieces:
        """What row `index` >= 0 consists of: at most seq_len + 1 tokens."""
        epoch, offset = divmod(index, self._assignment.num_rows)
        group, place = self._shuffle.find(epoch, offset)
        order = self._groups.get((epoch, group), lambda: self._shuffle.items(epoch, group))
        row = self._assignment.row(int(order[place]))
        shards, begins, _ = self.corpus.locate(row["document"])
        begins += row["start"]
        stops = begins + row["length"]
        return Pieces(row["document"].tolist(), self.corpus.views(shards.tolist(), begins.tolist(), stops.tolist()))


def _ones(first: int, last: int) -> np.ndarray:
    """Every row weighs the same."""
    return np.ones(last - first, dtype=np.int64)

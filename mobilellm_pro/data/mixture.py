"""Several corpora in one weighted order: what row n of a run holds is a function of (seed, n) and of nothing else.

Which corpus gives row n is laid out for a period of a million rows: weights become whole counts, the i-th row of a
corpus with count c is due at (i + 1/2) / c of the period, and the rows are sorted by due time. So the realised shares
follow the weights at every scale, not only on average, and row n is found without walking to it: the state of a run is
one integer.

Ranks, workers and restarts only choose which n they ask for.

    mixture = Mixture([CorpusStream(...), CorpusStream(...)], [0.7, 0.3], seed=1)
    rows = batch(mixture, start=step * global_batch + rank * local_batch, count=local_batch)
"""

from collections.abc import Sequence as Items
from typing import Protocol

import numpy as np
import torch

from mobilellm_pro.data.packing import Pieces, write_rows
from mobilellm_pro.data.shards import Corpus
from mobilellm_pro.data.shuffle import hash_key

PERIOD = 1_000_000
_MAX_CORPORA = 127  # the schedule is stored as int8


class Rows(Protocol):
    """Endless rows of one corpus by number: `CorpusStream` or `BestFitRows`."""

    corpus: Corpus
    seq_len: int

    @property
    def options(self) -> str:
        """What the rows hold differently from the default, in words."""

    @property
    def rows_per_epoch(self) -> float:
        """Rows in one pass over the corpus."""

    @property
    def tokens_per_row(self) -> float:
        """Tokens of a row, padding not counted, on average over a pass."""

    def epochs(self, rows: int) -> float:
        """Passes after the first `rows` rows."""

    def pieces(self, index: int) -> Pieces:
        """Parts of documents that row `index` consists of, at most seq_len + 1 tokens."""


class Mixture:
    """Rows of several corpora in a deterministic order with given shares.

    Attributes:
        streams: one per corpus, all with one seq_len.
        names: of the corpora.
        weights: share of tokens of each corpus, padding not counted, summing to 1.
        identity: what the rows depend on, in words: mixtures with equal identities have equal rows.
    """

    def __init__(
        self, streams: Items[Rows], weights: Items[float], *, seed: int, renormalize: bool = False,
        period: int = PERIOD,
    ) -> None:  # fmt: skip
        """
        Args:
            streams: the corpora.
            weights: positive, one per corpus; must sum to 1.
            seed: any integer.
            renormalize: divide the weights by their sum instead of requiring it to be 1.
            period: rows after which the choice of corpora repeats (their content does not).

        Raises:
            ValueError: no corpus, weights that are not positive or do not sum to 1, corpora of different seq_len.
        """
        self.names = [stream.corpus.name for stream in streams]
        self.streams = list(streams)
        self.weights = check_weights(self.names, weights, renormalize=renormalize)
        if len({stream.seq_len for stream in streams}) != 1:
            raise ValueError(f"corpora of one mixture need one seq_len, found {[s.seq_len for s in streams]}")
        shares = ", ".join(
            f"{stream.corpus.name}:{stream.corpus.num_tokens}x{weight:.6g}#{stream.corpus.content}"
            + (f" ({stream.options})" if stream.options else "")
            for stream, weight in zip(self.streams, self.weights, strict=True)
        )
        self.identity = f"seed {seed}, seq_len {self.seq_len}, corpora (tokens x weight) {shares}"
        rows = self.weights / [stream.tokens_per_row / self.seq_len for stream in streams]
        self._counts = _whole_counts(self.names, rows / rows.sum(), period)
        self._schedule, self._ranks = _schedule(self._counts, hash_key(seed, "mixture") % period / period)

    @property
    def seq_len(self) -> int:
        """Inputs of a row, in tokens."""
        return self.streams[0].seq_len

    def place(self, index: int) -> tuple[int, int]:
        """(corpus, row of that corpus) of row `index` >= 0 of the mixture."""
        period, position = divmod(index, len(self._schedule))
        corpus = self._schedule.item(position)
        return corpus, period * self._counts.item(corpus) + self._ranks.item(position)

    def counts(self, num_sequences: int) -> np.ndarray:
        """int64 [corpora]: rows of each corpus among the first `num_sequences` rows."""
        periods, rest = divmod(num_sequences, len(self._schedule))
        return periods * self._counts + np.bincount(self._schedule[:rest], minlength=len(self._counts))

    def epochs(self, num_sequences: int) -> np.ndarray:
        """float64 [corpora]: passes over each corpus after the first `num_sequences` rows."""
        counts = self.counts(num_sequences).tolist()
        return np.array([stream.epochs(count) for stream, count in zip(self.streams, counts, strict=True)])

    def rows_until(self, max_epochs: Items[float | None]) -> tuple[int, str] | None:
        """How far a run may go before it has read too much of a corpus.

        Args:
            max_epochs: passes over each corpus that are allowed; None: any number.

        Returns:
            (n, name): the first n rows pass no limit, the row after them would pass that of the named corpus; None
            without limits.

        Raises:
            ValueError: another number of limits than corpora, or a limit that is not positive.
        """
        if max_epochs and len(max_epochs) != len(self.names):
            raise ValueError(f"{len(max_epochs)} limits for {len(self.names)} corpora: expected one each")
        ends = []
        for corpus, limit in enumerate(max_epochs):
            if limit is None:
                continue
            if not 0 < limit < np.inf:
                raise ValueError(
                    f"corpus {self.names[corpus]!r}: max_epochs = {limit:g}, expected more than 0, or none"
                )
            ends.append((self._row_of(corpus, _rows_within(self.streams[corpus], limit)), self.names[corpus]))
        return min(ends, default=None)

    def _row_of(self, corpus: int, row: int) -> int:
        """The row of the mixture that is row `row` of a corpus: the inverse of `place`."""
        period, rank = divmod(row, int(self._counts[corpus]))
        return period * len(self._schedule) + int(np.flatnonzero(self._schedule == corpus)[rank])


def batch(mixture: Mixture, start: int, count: int) -> dict[str, torch.Tensor]:
    """Rows start .. start + count - 1 of the mixture, with B = count and S = seq_len.

    Returns:
        input: int64 [B, S].
        labels: int64 [B, S], the next token; -100 where the next token begins another document, which nothing predicts.
        document_ids: int32 [B, S], 0 at the first input, one more at every input that begins a document.
        corpus: int32 [B], index into `mixture.names`.
        row: int64 [B], number of the row in its corpus.

    Raises:
        ValueError: an id outside the vocabulary of its corpus.
    """
    places = [mixture.place(index) for index in range(start, start + count)]
    corpora, numbers = zip(*places, strict=True)
    streams = [mixture.streams[corpus] for corpus in corpora]
    rows = [(stream.corpus, stream.pieces(number)) for stream, number in zip(streams, numbers, strict=True)]
    shape = (count, mixture.seq_len)
    tensors = {
        "input": torch.empty(shape, dtype=torch.int64),
        "labels": torch.empty(shape, dtype=torch.int64),
        "document_ids": torch.empty(shape, dtype=torch.int32),
    }
    write_rows(rows, *(tensor.numpy() for tensor in tensors.values()))
    return tensors | {
        "corpus": torch.tensor(corpora, dtype=torch.int32),
        "row": torch.tensor(numbers, dtype=torch.int64),
    }


def check_weights(names: Items[str], weights: Items[float], *, renormalize: bool = False) -> np.ndarray:
    """float64 [corpora] that sums to 1 exactly; raises ValueError that names the corpus or the sum."""
    values = np.asarray(weights, dtype=np.float64)
    if len(names) != len(values) or not 1 <= len(values) <= _MAX_CORPORA:
        raise ValueError(f"{len(values)} weights for {len(names)} corpora: expected one each, 1 to {_MAX_CORPORA}")
    for name, value in zip(names, values, strict=True):
        if not (np.isfinite(value) and value > 0):
            raise ValueError(f"corpus {name!r}: weight = {value:g}, expected more than 0: correct it or leave it out")
    total = float(values.sum())
    if abs(total - 1) > 1e-6 and not renormalize:
        raise ValueError(f"weights of {', '.join(names)} sum to {total:g}, expected 1: correct them or set renormalize")
    return values / total


def _rows_within(stream: Rows, max_epochs: float) -> int:
    """The largest number of rows of a corpus that passes no limit, in the arithmetic of `epochs`."""
    rows = int(max_epochs * stream.rows_per_epoch)
    while stream.epochs(rows) > max_epochs:
        rows -= 1
    while stream.epochs(rows + 1) <= max_epochs:
        rows += 1
    return rows


def _whole_counts(names: Items[str], weights: np.ndarray, period: int) -> np.ndarray:
    """int64 [corpora] that sums to `period`: weights * period rounded by largest remainder."""
    exact = weights * period
    counts = np.floor(exact).astype(np.int64)
    counts[np.argsort(counts - exact, kind="stable")[: period - int(counts.sum())]] += 1
    if counts.min() == 0:
        name = names[int(counts.argmin())]
        raise ValueError(f"corpus {name!r}: a weight below 1/{period} is never drawn: raise it or leave it out")
    return counts


def _schedule(counts: np.ndarray, phase: float) -> tuple[np.ndarray, np.ndarray]:
    """int8 [period] corpus of each row, and int32 [period] its row number inside that corpus and period.

    Due times in the middle of their slots keep every corpus within a few rows of its share over any window (4 with the
    seven weights of the paper). The phase, in [0, 1), turns the whole period, so that runs with different seeds do not
    start with the same pattern.
    """
    due = np.concatenate([(np.arange(count) + 0.5) / count for count in counts])
    corpora = np.repeat(np.arange(len(counts), dtype=np.int8), counts)
    schedule = corpora[np.argsort(due, kind="stable")]
    schedule = np.roll(schedule, -int(phase * len(schedule)))
    ranks = np.empty(len(schedule), dtype=np.int32)
    for corpus, count in enumerate(counts):
        ranks[schedule == corpus] = np.arange(count)
    return schedule, ranks

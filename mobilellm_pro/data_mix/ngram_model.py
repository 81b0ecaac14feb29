"""The statistical language model of one domain, judged by its cross entropy on the pool of that domain.

Every order n <= N smooths the counts of what it has seen with a base distribution that never changes (Dirichlet
smoothing; read with a_n / (c(h) + a_n) as its weight, it interpolates the two):

    p_n(w | h) = (c(h, w) + a_n base(w)) / (c(h) + a_n)              h: the n - 1 tokens before w
    L(E; SLM)  = sum_n lambda_n L_n,   L_n = mean of -log p_n(w | h) over the positions of the pool E that have n - 1
                                       tokens before them

L is the lambda-weighted mean of the orders' cross entropies. By Jensen's inequality, -log sum_n lambda_n p_n <=
-sum_n lambda_n log p_n, it bounds that of the linear mixture of the orders from above; it is exactly the cross entropy
of their geometric mean, up to the constant that would make that sum to one. It is chosen because it separates: a token
that is counted changes one term per n-gram and one per context, whereas in a linear mixture, or where an order is
smoothed with the next lower one, it changes every position of the pool. So the change of L by a sample is known exactly
for N probes a token, whatever the size of the pool.

A sample is counted by itself: no n-gram reaches into its neighbour. The pool is one text.

Paper: section 4 (lightweight statistical language models; their kind is left open there).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mobilellm_pro.data_mix import ngram_table

_MOST_FULL = 7 / 8  # of a table of a stated size: fuller ones cost tens of probes a token


@dataclass(frozen=True)
class NgramSettings:
    """What the language models of all domains have in common.

    Attributes:
        order: N, tokens of the longest n-gram, at least 1.
        concentration: a_n > 0 of the orders 1 .. N: tokens that the base distribution counts for. The defaults have
            about the least cross entropy on the offline corpora, after 100,000 tokens as after two million.
        order_weights: lambda_n >= 0 of the orders 1 .. N, summing to 1.
        table_slots: of each domain's table, a power of two (32 bytes a slot); None: the least that is at most half
            full. The result does not depend on it.

    Raises:
        ValueError: a value outside its range, or another number of them than orders.
    """

    order: int = 3
    concentration: tuple[float, ...] = (1000.0, 30.0, 10.0)
    order_weights: tuple[float, ...] = (0.2, 0.4, 0.4)
    table_slots: int | None = None

    def __post_init__(self) -> None:
        if self.order < 1:
            raise ValueError(f"order = {self.order}: expected at least 1")
        for key in ("concentration", "order_weights"):
            if len(getattr(self, key)) != self.order:
                raise ValueError(f"{key} = {getattr(self, key)}: expected one for each of the {self.order} orders")
        if not all(0 < value < math.inf for value in self.concentration):
            raise ValueError(f"concentration = {self.concentration}: expected numbers above 0")
        if not all(value >= 0 for value in self.order_weights) or abs(sum(self.order_weights) - 1) > 1e-9:
            raise ValueError(f"order_weights = {self.order_weights}: expected numbers of at least 0 that sum to 1")
        slots = self.table_slots
        if slots is not None and not (1 < slots <= ngram_table.MAX_SLOTS and slots & (slots - 1) == 0):
            raise ValueError(f"table_slots = {slots}: expected a power of two, at most {2**30}")


class DomainModel:
    """Language model of one domain, empty at first, and its pool.

    Attributes:
        name: of the domain.
        pool: int32 [tokens].
        num_nodes: different n-grams of the pool, all orders together.
    """

    def __init__(self, name: str, pool: np.ndarray, base: np.ndarray, settings: NgramSettings) -> None:
        """
        Args:
            name: of the domain, for messages.
            pool: int [tokens] inside the vocabulary (`influence.check_ids`), at least as many as the order.
            base: float64 [vocabulary], positive (`base_distribution`).
            settings: of all models.

        Raises:
            ValueError: a pool shorter than the order, or more n-grams than table_slots can hold.
        """
        if len(pool) < settings.order:
            raise ValueError(f"domain {name!r}: its pool has {len(pool)} tokens, an n-gram has {settings.order}")
        self.name, self.pool = name, np.ascontiguousarray(pool, dtype=np.int32)
        self._base, self._seen = base, np.zeros(1, np.int64)
        self._concentration = np.array(settings.concentration, np.float64)
        self._order_weights = np.array(settings.order_weights, np.float64)
        self._nodes, self.num_nodes = _build(name, self.pool, settings)

    @property
    def table_bytes(self) -> int:
        """Memory of the table."""
        return self._nodes.nbytes

    @property
    def num_slots(self) -> int:
        """Slots of the table."""
        return len(self._nodes)

    def probes_per_node(self) -> float:
        """Slots that the search for an n-gram of the pool looks at, on average; 1 where no two of them met."""
        return ngram_table.num_probes(self._nodes) / self.num_nodes

    def measure(self, tokens: np.ndarray, starts: np.ndarray, commit: np.ndarray) -> np.ndarray:
        """Influence of samples on this domain, one after the other; those to commit stay in the model.

        The interpreter's lock is released meanwhile: models of different domains may work in different threads.

        Args:
            tokens: int32 [tokens of all samples], inside the vocabulary.
            starts: int64 [B + 1], first token of each sample, then the end of the last.
            commit: bool [B].

        Returns:
            float64 [B], L(E; SLM) - L(E; SLM + sample) in nats per token of the pool: positive where the sample helps.
        """
        influence = np.empty(len(commit))
        ngram_table.measure(
            self._nodes, self._seen, tokens, starts, commit,
            self._base, self._concentration, self._order_weights, len(self.pool), influence,
        )  # fmt: skip
        return influence

    def cross_entropy(self) -> float:
        """L(E; SLM) as it stands, nats per token; costs a walk over the pool."""
        orders = ngram_table.cross_entropy(self._nodes, self._seen, self.pool, self._base, self._concentration)
        return float(orders @ self._order_weights)

    def counts(self) -> np.ndarray:
        """int64 [1 + 2 x num_nodes]: all that the model has learnt, for `load_counts` of a model of the same pool."""
        used = self._nodes["key"] != ngram_table.EMPTY
        return np.concatenate((self._seen, self._nodes["count"][used], self._nodes["followed"][used]))

    def load_counts(self, counts: np.ndarray) -> None:
        """Replaces what the model has learnt by what `counts` gave."""
        used = self._nodes["key"] != ngram_table.EMPTY
        self._seen[:] = counts[0]
        self._nodes["count"][used], self._nodes["followed"][used] = np.split(counts[1:], 2)


def base_distribution(texts: Sequence[np.ndarray], vocab_size: int) -> np.ndarray:
    """float64 [vocabulary]: mean of the texts' unigram distributions, each with one added to every count.

    Every text counts alike, whatever its length, so that a small corpus does not find its words improbable. Without
    texts all tokens are equally probable.

    Args:
        texts: int [tokens] each, inside the vocabulary.
        vocab_size: number of ids.
    """
    if not texts:
        return np.full(vocab_size, 1 / vocab_size)
    counts = [np.bincount(text, minlength=vocab_size) + 1.0 for text in texts]
    return np.mean([count / count.sum() for count in counts], axis=0)


def _build(name: str, pool: np.ndarray, settings: NgramSettings) -> tuple[np.ndarray, int]:
    """The table of a pool, and the number of its nodes."""
    slots = settings.table_slots or 2
    while slots <= ngram_table.MAX_SLOTS:
        room = int(slots * _MOST_FULL) if settings.table_slots else slots // 2
        nodes = ngram_table.empty_table(slots)
        used = ngram_table.insert_pool(nodes, pool, settings.order, room)
        if used >= 0:
            return nodes, used
        if settings.table_slots:
            raise ValueError(
                f"domain {name!r}: the n-grams of its pool of {len(pool)} tokens do not fit into table_slots = {slots} "
                f"({room} n-grams at most): raise table_slots, or lower pool_tokens or order"
            )
        slots *= 2
    raise ValueError(f"domain {name!r}: its pool of {len(pool)} tokens has too many n-grams: lower pool_tokens")

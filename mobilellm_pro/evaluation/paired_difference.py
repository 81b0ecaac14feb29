"""Is one model better than another on the same documents? Paired tests, and their correction for many columns.

Both models answered the same documents, so the difference of each document counts, not the two means: what makes a
document hard for both cancels out, and the standard error is a good deal smaller than that of two samples.

    found = paired_difference(first, other)
    adjusted = holm([one.p_value for one in ...])
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

DRAWS = 10_000
"""Random signs of the permutation test: no p value is below 1 / (DRAWS + 1)."""

_BLOCK_SIGNS = 2**22  # signs in memory at a time


@dataclass(frozen=True)
class PairedDifference:
    """Of one column and two models.

    Attributes:
        difference: mean of other - first over the documents.
        stderr: of that mean, from the documents' differences; None: a single document has none.
        p_value: two-sided, of "they are equally good".
        test: "mcnemar" or "permutation".
    """

    difference: float
    stderr: float | None
    p_value: float
    test: Literal["mcnemar", "permutation"]


def paired_difference(first: np.ndarray, other: np.ndarray, *, seed: int = 0) -> PairedDifference:
    """Compares two models on the same documents.

    Where all scores are 0 or 1, the exact form of McNemar's test: of the documents that only one of them gets right,
    each is as likely either's. Otherwise signs of the differences are drawn at random.

    Args:
        first, other: float64 [documents], scores in the same order; at least one.
        seed: of the draws.
    """
    assert len(first) == len(other) > 0
    differences = np.asarray(other, dtype=np.float64) - np.asarray(first, dtype=np.float64)
    mean, stderr = mean_and_error(differences)
    if np.isin(first, (0, 1)).all() and np.isin(other, (0, 1)).all():
        return PairedDifference(
            mean, stderr, mcnemar(int((differences > 0).sum()), int((differences < 0).sum())), "mcnemar"
        )
    return PairedDifference(mean, stderr, sign_flips(differences, seed=seed), "permutation")


def mean_and_error(values: np.ndarray) -> tuple[float, float | None]:
    """Mean of float64 [values], at least one, and its standard error (None of a single value)."""
    stderr = float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else None
    return float(values.mean()), stderr


def mcnemar(wins: int, losses: int) -> float:
    """Exact two-sided p value of so many documents that only the one, and only the other, gets right."""
    from scipy.stats import binomtest

    return float(binomtest(wins, wins + losses, 0.5).pvalue) if wins + losses else 1.0


def sign_flips(differences: np.ndarray, *, draws: int = DRAWS, seed: int = 0) -> float:
    """Two-sided p value: how often random signs give a sum as far from 0 as the one found, which counts as a draw.

    Args:
        differences: float64 [documents].
        draws: random signs for all documents, so many times.
        seed: equal seeds give equal p values.
    """
    sizes = np.abs(differences[differences != 0])  # a zero has no sign
    if not len(sizes):
        return 1.0
    rng, total = np.random.default_rng(seed), float(sizes.sum())
    least = abs(float(differences.sum())) - 1e-9 * total  # sums that are equal but for rounding
    extreme, rows = 1, max(1, _BLOCK_SIGNS // len(sizes))
    for first in range(0, draws, rows):
        positive = rng.integers(0, 2, (min(rows, draws - first), len(sizes)), dtype=np.int8)
        extreme += int((np.abs(2 * (positive @ sizes) - total) >= least).sum())
    return extreme / (draws + 1)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction, in the order given: rejecting what is <= alpha keeps the family's error at alpha."""
    adjusted, least = [0.0] * len(p_values), 0.0
    for rank, number in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        least = max(least, min(1.0, (len(p_values) - rank) * p_values[number]))
        adjusted[number] = least
    return adjusted


def mean_error(errors: Sequence[float | None]) -> float | None:
    """Standard error of a mean of independent columns, each counted once; None where one is missing."""
    known = [error for error in errors if error is not None]
    return math.hypot(*known) / len(known) if known and len(known) == len(errors) else None

r"""Shares between limits that sum to 1: the limits, the nearest shares within them, and the same as exact decimals.

"Nearest" is in the sense of information: of all w with low <= w <= high and sum 1, the one of least
KL(w || p) = \sum_i w_i log(w_i / p_i). Its conditions of optimality give w_i = clip(c p_i, low_i, high_i) with one
number c for all (water filling): corpora at a limit stay there, the others keep their ratios. The sum grows with c and
is linear between the points where a corpus meets a limit, so c is found exactly, without iterating.
"""

from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from mobilellm_pro.repeated_names import repeated

DECIMALS = 6
"""Of a weight in a TOML file."""
UNITS = 10**DECIMALS


def check_corpora(names: Sequence[str], tokens: Sequence[int] | np.ndarray, train_tokens: int) -> None:
    """Raises ValueError: no corpus, names that occur twice, corpora without tokens, a run without tokens."""
    problems = [f"the corpus name {name!r} occurs twice: give each a name of its own" for name in repeated(names)]
    if not names or len(names) != len(tokens):
        problems.append(f"expected one number of tokens for each of at least one corpus, found {len(tokens)} for "
                        f"{len(names)} names")  # fmt: skip
    problems += [
        f"the corpus {name!r} has {count} tokens: expected at least 1"
        for name, count in zip(names, tokens)
        if not count >= 1
    ]
    if not train_tokens >= 1:
        problems.append(f"train_tokens = {train_tokens}: expected at least 1")
    if problems:
        raise ValueError("\n".join(f"weights: {problem}" for problem in problems))


def share_limits(
    names: Sequence[str], tokens: Sequence[int] | np.ndarray, *, train_tokens: int, epoch_cap: float, floor: float
) -> tuple[np.ndarray, np.ndarray]:
    """Least and largest share of each corpus, int64 [K] each, in millionths, so that they hold for the written weights.

    The cap is w_i * train_tokens <= epoch_cap * tokens_i, rounded down; the floor is rounded up and is at least one
    millionth, because a corpus of weight 0 is none.

    Args:
        names, tokens: of the corpora.
        train_tokens: that the run will read.
        epoch_cap: passes over a corpus that are allowed; infinity: any number.
        floor: least share of every corpus.

    Raises:
        ValueError: caps that cannot be met (which corpora, how many tokens are missing), a floor above a cap or too
            high for so many corpora, values outside their range.
    """
    check_corpora(names, tokens, train_tokens)
    if not epoch_cap > 0:
        raise ValueError(f"epoch_cap = {epoch_cap}: expected a number above 0")
    if not 0 <= floor <= 1:
        raise ValueError(f"floor = {floor}: expected a share between 0 and 1")
    num_tokens = [int(count) for count in tokens]
    cap = None if np.isinf(epoch_cap) else Fraction(epoch_cap)
    high = [UNITS if cap is None else min(UNITS, int(cap * count * UNITS / train_tokens)) for count in num_tokens]
    low = [max(1, -int(-Fraction(str(floor)) * UNITS // 1))] * len(names)
    if sum(high) < UNITS:
        available = sum(int((cap or 0) * count) for count in num_tokens)
        missing = max(train_tokens - available, 1)
        limited = ", ".join(f"{name} at most {int((cap or 0) * n):,}" for name, n in zip(names, num_tokens))
        raise ValueError(
            f"epoch_cap = {epoch_cap:g} is infeasible: the run reads {train_tokens:,} tokens, and {epoch_cap:g} passes "
            f"over all corpora give {available:,}; {missing:,} tokens are missing ({limited}). Add text, read fewer "
            "tokens or raise epoch_cap"
        )
    for name, least, most, count in zip(names, low, high, num_tokens):
        if least > most:
            raise ValueError(
                f"floor = {floor:g} is infeasible for {name!r}: {least / UNITS:g} of {train_tokens:,} tokens is more "
                f"than {epoch_cap:g} passes over its {count:,}. Lower the floor, raise epoch_cap or leave it out"
            )
    if sum(low) > UNITS:
        raise ValueError(f"floor = {floor:g} is infeasible: {len(names)} corpora can have at most {1 / len(names):.6g}")
    return np.array(low, np.int64), np.array(high, np.int64)


def fill(prior: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """The shares nearest to `prior` between the limits: float64 [K] summing to 1.

    Args:
        prior: [K] above 0, of any sum.
        low, high: [K], 0 <= low <= high, with sum(low) <= 1 <= sum(high).

    Raises:
        ValueError: a prior that is not above 0, or limits that no shares meet.
    """
    if not ((prior > 0) & np.isfinite(prior)).all():
        raise ValueError(f"shares must be above 0 before they are limited, found {prior}")
    if (low > high).any() or low.sum() > 1 + 1e-12 or high.sum() < 1 - 1e-12:
        raise ValueError(f"no shares between {low} and {high} sum to 1")
    turns = np.unique(np.concatenate((low / prior, high / prior)))  # where a corpus leaves or meets a limit
    sums = np.clip(turns[:, None] * prior, low, high).sum(1)
    after = int(np.searchsorted(sums, 1.0))
    if after == 0:
        return np.clip(turns[0] * prior, low, high)
    if after == len(turns):
        return high / high.sum()
    scale = (turns[after - 1] + turns[after]) / 2  # inside the segment: says who is free
    free = (scale * prior > low) & (scale * prior < high)
    limited = np.clip(scale * prior, low, high)
    return np.where(free, prior * ((1 - limited[~free].sum()) / prior[free].sum()), limited)


def decimal_shares(shares: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Shares in whole millionths, int64 [K], summing to a million exactly and within the limits: largest remainders.

    Args:
        shares: float [K], summing to 1.
        low, high: int [K] in millionths, as `share_limits` gives them.
    """
    exact = shares * UNITS
    units = np.clip(np.floor(exact).astype(np.int64), low, high)
    while (missing := UNITS - int(units.sum())) != 0:
        step = 1 if missing > 0 else -1
        room = units < high if step > 0 else units > low
        assert room.any(), "the limits leave room, or share_limits would have said so"
        order = np.argsort(-step * np.where(room, exact - units, -step * np.inf), kind="stable")
        units[order[: min(abs(missing), int(room.sum()))]] += step
    return units

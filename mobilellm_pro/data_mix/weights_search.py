"""The best mixture by a predicted utility: random mixtures first, as RegMix does, then small steps from the best.

Maximises U(w) - temperature * KL(w || natural) within the limits (see `weights`). A regressor knows only the region of
its runs, and the penalty is what keeps the search there: without it the best of many thousands is often a corner that
no run was near.
"""

from collections.abc import Sequence

import numpy as np

from mobilellm_pro.data_mix.regressor import single_threaded
from mobilellm_pro.data_mix.weights import MixProblem, WeightResult
from mobilellm_pro.data_mix.weights_simplex import UNITS, fill
from mobilellm_pro.data_mix.weights_utility import Utility, source_gains

CONCENTRATIONS = (1.0, 3.0, 10.0, 30.0, 100.0)
"""Of the Dirichlet distributions around the natural share (times K): from far off to close by."""
_LEAST_STEP = 1e-3
_MAX_ROUNDS = 200


def searched_weights(
    problem: MixProblem,
    utility: Utility,
    draws: Sequence[Utility] = (),
    *,
    num_candidates: int = 4096,
    seed: int = 0,
) -> WeightResult:
    """Weights for the utility of a regressor.

    Args:
        problem: corpora, limits, temperature.
        utility: of mixtures [M, K], e.g. `mean_utility` of several regressors.
        draws: the same by other fits (`weights_draws`, `drawn_utility`); each is searched for the interval.
        num_candidates: random mixtures, beside natural share, uniform and the tilted natural share.
        seed: of the random mixtures.

    Raises:
        ValueError: a utility that is not finite, with the mixture; no candidates.
    """
    if num_candidates < 1:
        raise ValueError(f"num_candidates = {num_candidates}: expected at least 1")
    with single_threaded():
        candidates = _limited(problem, _around(problem.natural(), num_candidates, seed))
        shares, *others = (_search(problem, one, candidates) for one in (utility, *draws))
        gains = source_gains(utility, problem.natural())
    return problem.result("search", shares, gains, others)


def objective(problem: MixProblem, utility: Utility, weights: np.ndarray) -> np.ndarray:
    """U(w) - temperature * KL(w || natural), [M], of mixtures [M, K].

    Raises:
        ValueError: a utility that is not finite, with the mixture.
    """
    values = utility(weights)
    if not np.isfinite(values).all():
        row = weights[int(np.flatnonzero(~np.isfinite(values))[0])]
        shares = ", ".join(f"{name} {share:.4f}" for name, share in zip(problem.names, row))
        raise ValueError(f"the predicted utility of a mixture is not finite: {shares}")
    ratio = np.where(weights > 0, weights / problem.natural(), 1.0)
    return values - problem.temperature * (weights * np.log(ratio)).sum(1)


def _search(problem: MixProblem, utility: Utility, random: np.ndarray) -> np.ndarray:
    """The best found, [K], from random mixtures [M, K] within the limits."""
    natural = problem.natural()
    objective(problem, utility, natural[None])  # refuses a utility that is not finite before it is used
    known = [natural, np.full(len(natural), 1 / len(natural)), problem.tilted(source_gains(utility, natural))]
    candidates = np.concatenate((_limited(problem, np.stack(known)), random))
    values = objective(problem, utility, candidates)
    best, value, step = candidates[values.argmax()], values.max(), 0.5
    for _ in range(_MAX_ROUNDS):
        if step < _LEAST_STEP:
            break
        # every source more and less, alone: multiplied, because a small share matters as much as its double
        moves = np.concatenate((np.eye(len(best)), -np.eye(len(best)))) * step
        candidates = _limited(problem, best * np.exp(moves))
        values = objective(problem, utility, candidates)
        if values.max() > value:
            best, value = candidates[values.argmax()], values.max()
        else:
            step /= 2
    return best


def _around(natural: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Random mixtures [count, K], above 0, some close to the natural share and some far off."""
    rng = np.random.default_rng(seed)
    parts = np.array_split(np.arange(count), len(CONCENTRATIONS))
    drawn = [
        rng.dirichlet(np.maximum(natural * len(natural) * concentration, 1e-2), size=len(part))
        for concentration, part in zip(CONCENTRATIONS, parts)
    ]
    return np.maximum(np.concatenate(drawn), 1e-9)


def _limited(problem: MixProblem, candidates: np.ndarray) -> np.ndarray:
    low, high = (limit / UNITS for limit in problem.limits())
    return np.stack([fill(row, low, high) for row in candidates])

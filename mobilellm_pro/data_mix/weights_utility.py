r"""The utility of a mixture, U(w) = -\sum_t v_t loss_t(w), as a regressor predicts it, and its slope for each source.

A `Utility` maps mixtures [M, K] to numbers [M]: the higher the better, in the unit of the losses. The weights are by a
regressor's mean (`regressor_utility`), their intervals are over `drawn_utility`: regressors that were fitted with other
seeds to losses as they could have come out (`weights_draws`), and of each a function that it holds possible.
"""

from collections.abc import Callable, Sequence

import numpy as np

from mobilellm_pro.data_mix.regression import mixture_features
from mobilellm_pro.data_mix.regressor import Regressor

Utility = Callable[[np.ndarray], np.ndarray]
STEP = 0.05
"""Share of a mixture that is replaced by one source to see what that source is worth."""


def regressor_utility(
    regressor: Regressor,
    *,
    values: Sequence[float] | np.ndarray | None = None,
    influence: np.ndarray | None = None,
    blocks: Sequence[str] = ("logs", "roots"),
    deviations: float = 0.0,
) -> Utility:
    """The utility that a fitted regressor predicts.

    Args:
        regressor: fitted on `mixture_features` with the same influence and blocks, and on losses [N, T].
        values: [T] what each target counts, at least 0; None: all alike, summing to 1.
        influence, blocks: see `mixture_features`.
        deviations: standard deviations that are added; below 0 the pessimist's utility, which keeps off mixtures that
            the runs say little about. Deviations of targets are added up as if they all erred the same way.

    Raises:
        ValueError: `values` that are negative or do not fit the targets, when the utility is called.
    """

    def utility(weights: np.ndarray) -> np.ndarray:
        mean, std = regressor.predict(mixture_features(weights, influence, blocks))
        counts = _counts(values, mean.shape[1])
        return -(mean @ counts) + deviations * (std @ counts)

    return utility


def drawn_utility(
    regressor: Regressor,
    seed: int,
    *,
    values: Sequence[float] | np.ndarray | None = None,
    influence: np.ndarray | None = None,
    blocks: Sequence[str] = ("logs", "roots"),
) -> Utility:
    """The utility by one function that a fitted regressor holds possible.

    Args:
        regressor, values, influence, blocks: see `regressor_utility`.
        seed: of the draw, see `Regressor.draw`.

    Raises:
        ValueError: not fitted; `values` as there, when the utility is called.
    """
    draw = regressor.draw(seed)

    def utility(weights: np.ndarray) -> np.ndarray:
        losses = draw(mixture_features(weights, influence, blocks))
        return -(losses @ _counts(values, losses.shape[1]))

    return utility


def _counts(values: Sequence[float] | np.ndarray | None, num_targets: int) -> np.ndarray:
    """[T] what each target counts; raises ValueError where that does not fit."""
    counts = np.full(num_targets, 1 / num_targets) if values is None else np.asarray(values, np.float64)
    if counts.shape != (num_targets,) or not (counts >= 0).all() or counts.sum() == 0:
        raise ValueError(f"values: expected {num_targets} numbers of at least 0, not all 0, found {values}")
    return counts


def mean_utility(utilities: Sequence[Utility]) -> Utility:
    """The average of several."""
    if not utilities:
        raise ValueError("no utility to average: fit at least one regressor")
    return lambda weights: np.mean([utility(weights) for utility in utilities], axis=0)


def source_gains(utility: Utility, at: np.ndarray, *, step: float = STEP) -> np.ndarray:
    """What each source is worth at a mixture: float64 [K], utility for each unit of share given to it.

        g_i = (U((1 - step) w + step e_i) - U(w)) / step

    Equal to the slope of U towards corner i for a small step; a larger one averages over what a regressor resolves.

    Args:
        utility: of mixtures.
        at: [K] on the simplex, the natural share as a rule.
        step: 0 < step <= 1.
    """
    if not 0 < step <= 1:
        raise ValueError(f"step = {step}: expected a share above 0, at most 1")
    moved = (1 - step) * at + step * np.eye(len(at))
    values = utility(np.concatenate((at[None], moved)))
    return (values[1:] - values[0]) / step

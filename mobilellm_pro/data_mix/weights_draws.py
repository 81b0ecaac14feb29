"""Losses as the proxies could have come out: what the interval of a weight is taken over (a residual bootstrap).

    drawn = prediction of each proxy from all the others + an error of such a prediction, taken from a random proxy

Every draw keeps all mixtures: leaving proxies out would say how fits on fewer proxies differ, which is far less than
how far off they are. Errors of predictions from the others hold both the noise of the runs and what the regressor
misses, and are larger than the residuals of a fit to all runs, which follows the noise in part. The errors of a proxy
stay together, because its domains err together (a run with a bad seed is bad at everything).

Of the fit to each draw, a function that it holds possible is taken (`weights_utility.drawn_utility`), so that also what
the runs leave open is in the interval, between and beyond them. The noise of the runs then counts twice, in the drawn
losses and in the fit's doubt: by the linear regressor the 90 % in the middle held the true weights of made-up worlds
(`tests/data_mix/test_weights_draws.py`) 98 % of the time, where the means of the fits held them 90 % of the time.

Predictions of unseen runs are smoother than the runs, and a fit to a draw smooths once more. The weights of the draws
may therefore all lie on one side of the weight itself, towards mixtures that are more alike in utility.

Efron, "Bootstrap Methods: Another Look at the Jackknife", section 7; the errors are taken from unseen runs here.
"""

from collections.abc import Iterator

import numpy as np


def drawn_losses(predicted: np.ndarray, measured: np.ndarray, *, draws: int, seed: int) -> Iterator[np.ndarray]:
    """Tables [N, T] of losses, as many as `draws`.

    Args:
        predicted: [N, T], each run from all the others (`regression_score.leave_one_out`).
        measured: [N, T].
        draws: at least 0.
        seed: draw number r depends on it and on r alone.

    Raises:
        ValueError: different shapes, numbers that are not finite, a negative number of draws.
    """
    if predicted.shape != measured.shape or measured.ndim != 2 or not len(measured):
        raise ValueError(f"expected two tables [N, T] of one shape, found {predicted.shape} and {measured.shape}")
    if not (np.isfinite(predicted).all() and np.isfinite(measured).all()):
        raise ValueError("predicted or measured losses hold NaN or infinity: leave those calibration runs out")
    if draws < 0:
        raise ValueError(f"draws = {draws}: expected at least 0")
    return _draws(predicted, measured - predicted, draws, seed)


def _draws(predicted: np.ndarray, errors: np.ndarray, draws: int, seed: int) -> Iterator[np.ndarray]:
    for draw in range(draws):
        rows = np.random.default_rng([seed, draw]).integers(len(errors), size=len(errors))
        yield predicted + errors[rows]

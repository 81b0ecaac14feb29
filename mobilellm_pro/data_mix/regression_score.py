"""How well a regressor ranks mixtures that it has not seen: out-of-fold predictions and Spearman's rank correlation.

Choosing a mixture needs the order of the mixtures, not their losses, hence ranks (RegMix, Liu et al. 2024).
"""

from collections.abc import Callable

import numpy as np

from mobilellm_pro.data_mix.regressor import Regressor, checked_tables


def out_of_fold(
    maker: Callable[[int], Regressor], features: np.ndarray, targets: np.ndarray, *, folds: int, seed: int = 0
) -> np.ndarray:
    """Predictions [N, T] of each run by a regressor that was fitted on the runs of the other folds.

    Args:
        maker: seed -> a fresh regressor.
        features, targets: [N, F], [N, T].
        folds: at least 2; N or more: every run is left out alone (leave one mixture out).
        seed: of the partition and of the regressors.

    Raises:
        ValueError: fewer than 2 folds, or tables that cannot be fitted.
    """
    features, targets = checked_tables(features, targets)
    if folds < 2:
        raise ValueError(f"folds: expected at least 2, found {folds}")
    fold_of = np.random.default_rng(seed).permutation(len(features)) % min(folds, len(features))
    predicted = np.empty_like(targets)
    for fold in range(min(folds, len(features))):
        unseen = fold_of == fold
        predicted[unseen] = maker(seed).fit(features[~unseen], targets[~unseen]).predict(features[unseen])[0]
    return predicted


def leave_one_out(
    maker: Callable[[int], Regressor], features: np.ndarray, targets: np.ndarray, *, seed: int = 0
) -> np.ndarray:
    """Predictions [N, T] of each run from all the others; N fits."""
    return out_of_fold(maker, features, targets, folds=len(features), seed=seed)


def rank_correlation(predicted: np.ndarray, measured: np.ndarray) -> np.ndarray:
    """Spearman's rho [T] of predictions and measurements [N, T], ties at their mean rank; NaN where one is constant.

    Raises:
        ValueError: different shapes.
    """
    from scipy.stats import rankdata

    if predicted.shape != measured.shape or predicted.ndim != 2:
        raise ValueError(f"expected two tables [N, T] of one shape, found {predicted.shape} and {measured.shape}")
    ranks = [rankdata(table, axis=0) for table in (predicted, measured)]
    left, right = (rank - rank.mean(0) for rank in ranks)
    spread = np.sqrt((left**2).sum(0) * (right**2).sum(0))
    return np.where(spread > 0, (left * right).sum(0) / np.where(spread > 0, spread, 1), np.nan)

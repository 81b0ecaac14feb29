"""From mixtures to losses: the features of a mixture, and the regressors offered over them, by name.

    features = mixture_features(weights, influence)             # [N, F]
    model = REGRESSORS["gaussian_process"](seed).fit(features, losses)
    mean, std = model.predict(mixture_features(candidates, influence))

The paper (section 4) passes influence vectors through a neural regressor, without saying which features or losses.
Here a mixture is described by its weights and, where a simulation gave influence, by the mixture's average of it.
"""

from collections.abc import Callable, Sequence

import numpy as np

from mobilellm_pro.data_mix.regression_gaussian import GaussianProcess
from mobilellm_pro.data_mix.regression_linear import Linear
from mobilellm_pro.data_mix.regression_neural import NeuralEnsemble
from mobilellm_pro.data_mix.regression_stack import Stack
from mobilellm_pro.data_mix.regression_trees import BoostedTrees
from mobilellm_pro.data_mix.regressor import Regressor

WEIGHT_EPSILON = 1e-3
"""Added before the logarithm: a share below a thousandth is as good as none, and data sets are rounded to that."""
BLOCKS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "weights": lambda weights: weights,
    "logs": lambda weights: np.log(weights + WEIGHT_EPSILON),
    "roots": np.sqrt,
}
"""Columns that are computed from the weights, one a domain each."""
SUM_TOLERANCE = 0.01
"""Weights may miss a sum of 1 by so much; published ones are rounded to three decimals."""


def mixture_features(
    weights: np.ndarray, influence: np.ndarray | None = None, blocks: Sequence[str] = ("logs", "roots")
) -> np.ndarray:
    """Features [N, blocks * K + F] of mixtures.

    Logs separate small shares and roots large ones; the weights themselves add nothing to the two (cross-validated).

    Args:
        weights: [N, K], each row on the simplex; divided by its sum here.
        influence: [K, F] of each source. Appends the mixture's average, Delta_mix = sum_s w_s Delta_s.
        blocks: names of `BLOCKS`, in order.

    Raises:
        ValueError: an unknown block, weights outside the simplex, influence of other sources.
    """
    weights = np.asarray(weights, dtype=np.float64)
    if weights.ndim != 2:
        raise ValueError(f"weights: expected a table [N, K], found shape {weights.shape}")
    unknown = [block for block in blocks if block not in BLOCKS]
    if unknown:
        raise ValueError(f"blocks: expected some of {', '.join(BLOCKS)}, found {', '.join(unknown)}")
    outside = ~np.isfinite(weights).all(1) | (weights < 0).any(1) | (np.abs(weights.sum(1) - 1) > SUM_TOLERANCE)
    if outside.any():
        row = int(np.flatnonzero(outside)[0])
        raise ValueError(f"weights: row {row} is outside the simplex (sum {weights[row].sum():.6g}): {weights[row]}")
    weights = weights / weights.sum(1, keepdims=True)
    columns = [BLOCKS[block](weights) for block in blocks]
    if influence is not None:
        influence = np.asarray(influence, dtype=np.float64)
        if influence.ndim != 2 or len(influence) != weights.shape[1] or not np.isfinite(influence).all():
            raise ValueError(
                f"influence: expected finite numbers [{weights.shape[1]}, F], found shape {influence.shape}"
            )
        columns.append(weights @ influence)
    if not columns:
        raise ValueError("a mixture without features: give at least one block, or influence")
    return np.concatenate(columns, axis=1)


def _stack(seed: int = 0) -> Stack:
    return Stack({name: REGRESSORS[name] for name in ("gaussian_process", "neural", "trees")}, seed)


REGRESSORS: dict[str, Callable[[int], Regressor]] = {
    "gaussian_process": GaussianProcess,
    "neural": NeuralEnsemble,
    "trees": BoostedTrees,
    "linear": Linear,
    "stack": _stack,
}
"""Seed -> a fresh regressor."""

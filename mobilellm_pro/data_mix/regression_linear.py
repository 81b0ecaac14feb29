"""Ridge regression over mixtures: what the others must beat, and all that a handful of runs can support.

The penalty is chosen for each target by the exact leave-one-out error. With the singular value decomposition
Z = U S V', the prediction is U diag(S^2 / (S^2 + a)) U' y, and a run's error without it is its residual divided by
1 - h, where h is its own share in its prediction.
"""

from dataclasses import dataclass, field

import numpy as np

from mobilellm_pro.data_mix.regressor import (
    NOT_FITTED,
    Prediction,
    Scale,
    checked_features,
    checked_tables,
    single_threaded,
)

_PENALTIES = np.logspace(-6, 4, 41)


@dataclass
class Linear:
    """`Regressor`: mean and posterior standard deviation of Bayesian ridge regression.

    Attributes:
        seed: ignored: the fit draws nothing.
    """

    seed: int = 0
    _scales: tuple[Scale, Scale] | None = field(default=None, repr=False)
    _slopes: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)), repr=False)
    _roots: list[np.ndarray] = field(default_factory=list, repr=False)

    def fit(self, features: np.ndarray, targets: np.ndarray) -> "Linear":
        """See `Regressor.fit`."""
        features, targets = checked_tables(features, targets)
        self._scales = Scale.of(features), Scale.of(targets)
        with single_threaded():
            left, singular, right = np.linalg.svd(self._scales[0].apply(features), full_matrices=False)
            wanted = self._scales[1].apply(targets)
            fits = [_ridge(left, singular, right, target) for target in wanted.T]
        self._slopes = np.stack([slopes for slopes, _ in fits], axis=1)
        self._roots = [root for _, root in fits]
        return self

    def predict(self, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See `Regressor.predict`."""
        features = checked_features(features, self._slopes.shape[0] if self._scales else None)
        assert self._scales is not None
        inputs = self._scales[0].apply(features)
        with single_threaded():
            std = np.stack([np.sqrt(((inputs @ root) ** 2).sum(1)) for root in self._roots], axis=1)
            return self._scales[1].undo(inputs @ self._slopes), std * self._scales[1].spread

    def draw(self, seed: int) -> Prediction:
        """See `Regressor.draw`: slopes from their posterior."""
        if self._scales is None:
            raise ValueError(NOT_FITTED)
        scales, rng = self._scales, np.random.default_rng(seed)
        shifts = [root @ rng.normal(size=root.shape[1]) for root in self._roots]
        slopes = self._slopes + np.stack(shifts, axis=1)

        def predict(features: np.ndarray) -> np.ndarray:
            inputs = scales[0].apply(checked_features(features, len(slopes)))
            with single_threaded():
                return scales[1].undo(inputs @ slopes)

        return predict


def _ridge(
    left: np.ndarray, singular: np.ndarray, right: np.ndarray, target: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Slopes [F], and R [F, rank] with R R' the slopes' covariance within the span of the runs."""
    parts, errors = left.T @ target, []
    for penalty in _PENALTIES:
        shrink = singular**2 / (singular**2 + penalty)
        own = (left**2 * shrink).sum(1) + 1 / len(target)  # the mean was subtracted: every run has a share in it
        errors.append((((target - left @ (shrink * parts)) / np.maximum(1 - own, 1e-6)) ** 2).mean())
    best = int(np.argmin(errors))
    damped = singular**2 + _PENALTIES[best]
    return right.T @ (singular / damped * parts), right.T * np.sqrt(errors[best] / damped)

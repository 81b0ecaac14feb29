"""Gradient-boosted trees over mixtures: the regressor of RegMix (Liu et al. 2024), as the comparison.

Each member is a boosting of its own on random halves of the runs, one a target. Trees do not see the difference between
a weight, its log and its root, so they gain nothing from those features and lose nothing but time.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mobilellm_pro.data_mix.regressor import NOT_FITTED, Prediction, checked_features, checked_tables, on_threads


@dataclass
class BoostedTrees:
    """`Regressor`: mean and standard deviation over the members.

    Attributes:
        seed: of the random halves.
        members, trees, depth, learning_rate: of the ensemble, and of each boosting.
    """

    seed: int = 0
    members: int = 4
    trees: int = 250
    depth: int = 4
    learning_rate: float = 0.06
    _num_features: int | None = field(default=None, repr=False)
    _boosted: list[list[Any]] = field(default_factory=list, repr=False)

    def fit(self, features: np.ndarray, targets: np.ndarray) -> "BoostedTrees":
        """See `Regressor.fit`."""
        features, targets = checked_tables(features, targets)
        self._num_features = features.shape[1]
        self._boosted = on_threads(lambda target: self._fit_one(features, target), list(targets.T))
        return self

    def predict(self, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See `Regressor.predict`."""
        features = checked_features(features, self._num_features)
        outputs = np.array([[one.predict(features) for one in members] for members in self._boosted])
        return outputs.mean(1).T, outputs.std(1).T

    def draw(self, seed: int) -> Prediction:
        """See `Regressor.draw`: a member of each target, all of the same number."""
        if self._num_features is None:
            raise ValueError(NOT_FITTED)
        boosted, num_features = self._boosted, self._num_features
        chosen = int(np.random.default_rng(seed).integers(self.members))

        def predict(features: np.ndarray) -> np.ndarray:
            features = checked_features(features, num_features)
            return np.stack([members[chosen].predict(features) for members in boosted], axis=1)

        return predict

    def _fit_one(self, features: np.ndarray, target: np.ndarray) -> list[Any]:
        from sklearn.ensemble import GradientBoostingRegressor

        settings: Any = {"n_estimators": self.trees, "max_depth": self.depth, "learning_rate": self.learning_rate}
        seeds = np.random.SeedSequence(self.seed).generate_state(self.members).tolist()
        return [
            GradientBoostingRegressor(**settings, subsample=0.5, max_features=0.5, random_state=seed).fit(
                features, target
            )
            for seed in seeds
        ]

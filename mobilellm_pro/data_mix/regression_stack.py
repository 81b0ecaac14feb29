"""Several regressors as one, weighted by their errors on runs they had not seen.

For every target the weights are the non-negative least-squares fit, normalised, of the members' out-of-fold predictions
to the measured losses: only calibration runs decide. The ensemble is as doubtful as its members are, and as they
disagree: variance = sum_m a_m (std_m^2 + (mean_m - mean)^2).
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from mobilellm_pro.data_mix.regression_score import out_of_fold
from mobilellm_pro.data_mix.regressor import NOT_FITTED, Prediction, Regressor, checked_features, checked_tables


@dataclass
class Stack:
    """`Regressor` of regressors.

    Attributes:
        makers: seed -> a fresh regressor, by name.
        seed: of all members.
        folds: of the out-of-fold predictions.
        shares: [members, T] weight of each member for each target, after `fit`.
    """

    makers: dict[str, Callable[[int], Regressor]]
    seed: int = 0
    folds: int = 4
    shares: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)))
    _members: list[Regressor] = field(default_factory=list, repr=False)
    _num_features: int | None = field(default=None, repr=False)

    def fit(self, features: np.ndarray, targets: np.ndarray) -> "Stack":
        """See `Regressor.fit`; every member is fitted folds + 1 times."""
        features, targets = checked_tables(features, targets)
        unseen = np.stack([
            out_of_fold(maker, features, targets, folds=self.folds, seed=self.seed) for maker in self.makers.values()
        ])  # fmt: skip
        self.shares = np.stack([_shares(unseen[:, :, t], targets[:, t]) for t in range(targets.shape[1])], axis=1)
        self._members = [maker(self.seed).fit(features, targets) for maker in self.makers.values()]
        self._num_features = features.shape[1]
        return self

    def predict(self, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See `Regressor.predict`."""
        features = checked_features(features, self._num_features)
        means, stds = (np.stack(x) for x in zip(*(member.predict(features) for member in self._members)))
        shares = self.shares[:, None, :]
        mean = (shares * means).sum(0)
        return mean, np.sqrt((shares * (stds**2 + (means - mean) ** 2)).sum(0))

    def draw(self, seed: int) -> Prediction:
        """See `Regressor.draw`: for each target a draw of one member, which is chosen with its share as probability."""
        if self._num_features is None:
            raise ValueError(NOT_FITTED)
        rng = np.random.default_rng(seed)
        chosen = [int(rng.choice(len(shares), p=shares)) for shares in self.shares.T]
        draws = {number: self._members[number].draw(seed) for number in sorted(set(chosen))}

        def predict(features: np.ndarray) -> np.ndarray:
            tables = {number: draw(features) for number, draw in draws.items()}
            return np.stack([tables[number][:, target] for target, number in enumerate(chosen)], axis=1)

        return predict


def _shares(unseen: np.ndarray, target: np.ndarray) -> np.ndarray:
    """[members] summing to 1, of out-of-fold predictions [members, N]."""
    from scipy.optimize import nnls

    center = target.mean()
    shares = nnls((unseen - center).T, target - center)[0]
    # where nothing predicts better than the mean, all are equally good
    return shares / shares.sum() if shares.sum() > 0 else np.full(len(unseen), 1 / len(unseen))

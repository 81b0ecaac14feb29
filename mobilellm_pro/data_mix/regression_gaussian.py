r"""A Gaussian process over mixtures, one for each target: the regressor that needs the fewest calibration runs.

Prior covariance of the losses of two mixtures with features z and z' (columns brought to mean 0, spread 1):

    k(z, z') = 1 + s^2 (1 + r + r^2 / 3) exp(-r),   r^2 = 5 \sum_f (z_f - z'_f)^2 / l_f^2          (Matérn 5/2)

plus noise^2 on the diagonal. A loss is a smooth function of the logs and roots of weights, most of which hardly
matter: the lengths l_f are learned, one a feature, which switches features off. They, s and the noise maximise the
marginal likelihood times a wide log-normal prior; without the prior 32 lengths would overfit 16 runs.

A draw from the posterior is a draw from the prior that is corrected by what the runs say (Matheron's rule):

    f(z) + k(z, Z) (K + noise^2 I)^-1 (y - f(Z) - e),   e ~ N(0, noise^2)

with the prior's f a sum of `_WAVES` random cosines, whose frequencies follow the kernel's spectrum: a Student t with 5
degrees of freedom, as 2.5 is its smoothness.

Equations: Rasmussen and Williams, "Gaussian Processes for Machine Learning", 2.25, 2.26 and 5.9; Wilson et al.,
"Efficiently Sampling Functions from Gaussian Process Posteriors", 2020; Rahimi and Recht, "Random Features", 2007.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mobilellm_pro.data_mix.regressor import (
    NOT_FITTED,
    Prediction,
    Scale,
    checked_features,
    checked_tables,
    on_threads,
    single_threaded,
)

_LOG_BOUND = 9.0
_PRIOR_SPREAD = 2.0
"""Of the logarithm of every length: a factor e^2 is one standard deviation."""
_WAVES = 512
"""Of a draw: beyond some hundreds the deviation of many draws is that of the posterior."""
_NOISE_FLOOR = 1e-8


@dataclass
class GaussianProcess:
    """`Regressor` with the posterior's mean and standard deviation.

    Attributes:
        seed: ignored: the fit draws nothing.
        max_iterations: of L-BFGS over the kernel's parameters.
    """

    seed: int = 0
    max_iterations: int = 60
    _scales: tuple[Scale, Scale] | None = field(default=None, repr=False)
    _inputs: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)), repr=False)
    _posteriors: list["_Posterior"] = field(default_factory=list, repr=False)

    def fit(self, features: np.ndarray, targets: np.ndarray) -> "GaussianProcess":
        """See `Regressor.fit`; seconds grow with T N^3, on one thread a target."""
        features, targets = checked_tables(features, targets)
        self._scales = Scale.of(features), Scale.of(targets)
        self._inputs, wanted = self._scales[0].apply(features), self._scales[1].apply(targets)
        self._posteriors = on_threads(lambda t: _fit(self._inputs, t, self.max_iterations), list(wanted.T))
        return self

    def predict(self, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See `Regressor.predict`."""
        features = checked_features(features, self._inputs.shape[1] if self._scales else None)
        assert self._scales is not None
        inputs = self._scales[0].apply(features)
        both = on_threads(lambda posterior: posterior.at(inputs, self._inputs), self._posteriors)
        mean, std = (np.stack(columns, axis=1) for columns in zip(*both))
        return self._scales[1].undo(mean), std * self._scales[1].spread

    def draw(self, seed: int) -> Prediction:
        """See `Regressor.draw`; targets are independent."""
        if self._scales is None:
            raise ValueError(NOT_FITTED)
        scales, known = self._scales, self._inputs
        rngs = np.random.default_rng(seed).spawn(len(self._posteriors))
        with single_threaded():
            draws = [posterior.draw(known, rng) for posterior, rng in zip(self._posteriors, rngs, strict=True)]

        def predict(features: np.ndarray) -> np.ndarray:
            inputs = scales[0].apply(checked_features(features, known.shape[1]))
            with single_threaded():
                return scales[1].undo(np.stack([draw(inputs) for draw in draws], axis=1))

        return predict


@dataclass(frozen=True)
class _Posterior:
    """Of one target: parameters [F + 2] (log lengths, log s^2, log noise^2), Cholesky factor [N, N], weights [N] and
    the target [N] itself, scaled."""

    parameters: np.ndarray
    factor: np.ndarray
    weights: np.ndarray
    target: np.ndarray

    def at(self, inputs: np.ndarray, known: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation, [M] each, at scaled features [M, F]."""
        from scipy.linalg import solve_triangular

        covariance_MN = _kernel(inputs, known, self.parameters)[0] + 1
        explained = solve_triangular(self.factor, covariance_MN.T, lower=True)
        variance = np.exp(self.parameters[-2]) + 1 - (explained**2).sum(0)
        return covariance_MN @ self.weights, np.sqrt(np.maximum(variance, 0))

    def draw(self, known: np.ndarray, rng: np.random.Generator) -> Callable[[np.ndarray], np.ndarray]:
        """A function of the posterior: scaled features [M, F] -> scaled losses [M]."""
        from scipy.linalg import cho_solve

        prior = _prior_draw(self.parameters, rng)
        errors = np.sqrt(np.exp(self.parameters[-1]) + _NOISE_FLOOR) * rng.normal(size=len(known))
        weights = cho_solve((self.factor, True), self.target - prior(known) - errors)
        return lambda inputs: prior(inputs) + (_kernel(inputs, known, self.parameters)[0] + 1) @ weights


def _prior_draw(parameters: np.ndarray, rng: np.random.Generator) -> Callable[[np.ndarray], np.ndarray]:
    """A function of the prior: scaled features [M, F] -> [M]."""
    heavy_tails = np.sqrt(5 / rng.chisquare(5, size=(_WAVES, 1)))
    frequencies_WF = rng.normal(size=(_WAVES, len(parameters) - 2)) * heavy_tails * np.exp(-parameters[:-2])
    phases, sizes = rng.uniform(0, 2 * np.pi, size=_WAVES), rng.normal(size=_WAVES)
    sizes *= np.sqrt(2 / _WAVES * np.exp(parameters[-2]))
    constant = rng.normal()
    return lambda inputs: constant + np.cos(inputs @ frequencies_WF.T + phases) @ sizes


def _kernel(left: np.ndarray, right: np.ndarray, parameters: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Matérn part [A, B] and its derivative with respect to the squared distance without the factor 5."""
    inverse = np.exp(-parameters[:-2])
    left, right = left * inverse, right * inverse
    squared = (left**2).sum(1)[:, None] + (right**2).sum(1) - 2 * left @ right.T
    distance = np.sqrt(5 * np.maximum(squared, 0))
    decay = np.exp(parameters[-2] - distance)
    return (1 + distance + distance**2 / 3) * decay, -5 / 6 * (1 + distance) * decay


def _prior(num_features: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean and precision, [F + 2] each, of the logarithms of the parameters.

    Lengths around sqrt(F): two mixtures drawn at random are then about one length apart.
    """
    mean = np.append(np.full(num_features, np.log(num_features) / 2), [0.0, np.log(0.01)])
    return mean, np.append(np.full(num_features, _PRIOR_SPREAD**-2), [1 / 9, 1 / 9])


def _fit(inputs: np.ndarray, target: np.ndarray, max_iterations: int) -> _Posterior:
    from scipy.linalg import cho_solve, cholesky
    from scipy.optimize import minimize

    mean, precision = _prior(inputs.shape[1])
    options: Any = {"maxiter": max_iterations, "ftol": 1e-5}  # further steps change no prediction
    bounds = [(-_LOG_BOUND, _LOG_BOUND)] * len(mean)
    arguments = (inputs, target, mean, precision)
    parameters = minimize(_loss, mean, arguments, jac=True, method="L-BFGS-B", options=options, bounds=bounds).x
    factor = cholesky(_covariance(inputs, parameters)[0], lower=True)
    return _Posterior(parameters, factor, cho_solve((factor, True), target), target)


def _covariance(inputs: np.ndarray, parameters: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of the observed losses [N, N], with the kernel and its derivative."""
    kernel, slope = _kernel(inputs, inputs, parameters)
    noise = np.exp(parameters[-1]) + _NOISE_FLOOR
    return kernel + 1 + noise * np.eye(len(inputs)), kernel, slope


def _loss(
    parameters: np.ndarray, inputs: np.ndarray, target: np.ndarray, mean: np.ndarray, precision: np.ndarray
) -> tuple[float, np.ndarray]:
    """-log(likelihood x prior) without constants, and its gradient [F + 2]."""
    from scipy.linalg import cho_solve, lapack

    covariance, kernel, slope = _covariance(inputs, parameters)
    factor, failed = lapack.dpotrf(covariance, lower=1)
    if failed:  # the line search then tries a shorter step
        return 1e10, np.zeros_like(parameters)
    weights = cho_solve((factor, True), target)
    inverse = np.tril(lapack.dpotri(factor, lower=1)[0])
    inverse += np.tril(inverse, -1).T
    by_covariance = (inverse - np.outer(weights, weights)) / 2
    by_squared = by_covariance * slope
    # sum_ij B_ij (z_i - z_j)^2 of every feature at once, without a table [N, N, F]
    spread = 2 * ((by_squared.sum(1)[:, None] * inputs**2).sum(0) - (inputs * (by_squared @ inputs)).sum(0))
    by_lengths = -2 * np.exp(-2 * parameters[:-2]) * spread
    rest = [(by_covariance * kernel).sum(), np.trace(by_covariance) * np.exp(parameters[-1])]
    away = parameters - mean
    value = target @ weights / 2 + np.log(np.diag(factor)).sum() + (precision * away**2).sum() / 2
    return float(value), np.append(by_lengths, rest) + precision * away

"""What every regressor over mixtures is: fitted on N calibration runs, it predicts T losses of mixtures and its doubt.

The doubt comes in two forms: a standard deviation at each mixture, and draws. A draw is one whole function of mixtures
that the fit holds possible, the same wherever it is asked; what is best by a draw is a best that is possible.

Also here what all of them do first: check their tables, bring columns to one scale, and run single-threaded so that a
fit depends on the seed alone. BLAS sums in another order on another number of threads; a fit therefore gives each
target a thread of its own, and every call inside is single-threaded.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import local
from typing import NamedTuple, Protocol, TypeVar

import numpy as np
import torch

MIN_RUNS = 4
"""Fewer runs than this say nothing about a mixture that was not among them."""
Item = TypeVar("Item")
Result = TypeVar("Result")
NOT_FITTED = "the regressor was not fitted: call fit first"
Prediction = Callable[[np.ndarray], np.ndarray]
"""Features [M, F] -> losses [M, T]."""
_thread = local()


class Regressor(Protocol):
    """Maps features of mixtures to losses (nats a token, or bits per byte: the unit of the targets)."""

    def fit(self, features: np.ndarray, targets: np.ndarray) -> "Regressor":
        """Learns from features [N, F] and targets [N, T]; returns itself.

        Raises:
            ValueError: tables of different lengths, fewer than `MIN_RUNS` rows, numbers that are not finite.
        """

    def predict(self, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(mean, standard deviation), both [M, T], of features [M, F]; the deviation is that of the prediction, over
        the ensemble or the posterior, without the noise of a run.

        Raises:
            ValueError: not fitted, or another number of features than in `fit`.
        """

    def draw(self, seed: int) -> Prediction:
        """One of the functions that the fit holds possible: a member of the ensemble, or a draw from the posterior.

        Over many seeds its mean and standard deviation at a mixture are those of `predict`. Where the targets have
        posteriors of their own, they are drawn independently of each other.

        Args:
            seed: that the draw depends on, beside the fit.

        Raises:
            ValueError: not fitted; when it is called, another number of features than in `fit`.
        """


class Scale(NamedTuple):
    """Mean and spread of each column; a constant column has spread 1 and so becomes 0."""

    mean: np.ndarray
    spread: np.ndarray

    @classmethod
    def of(cls, table: np.ndarray) -> "Scale":
        """From a table [N, C]."""
        mean, spread = table.mean(0), table.std(0)
        return cls(mean, np.where(spread > 1e-12 * np.maximum(np.abs(mean), 1), spread, 1.0))

    def apply(self, table: np.ndarray) -> np.ndarray:
        """[N, C] with mean 0 and spread 1."""
        return (table - self.mean) / self.spread

    def undo(self, table: np.ndarray) -> np.ndarray:
        """[..., C] in the units of the table."""
        return table * self.spread + self.mean


def checked_tables(features: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both as float64 tables.

    Raises:
        ValueError: see `Regressor.fit`.
    """
    features, targets = np.asarray(features, dtype=np.float64), np.asarray(targets, dtype=np.float64)
    if features.ndim != 2 or targets.ndim != 2 or len(features) != len(targets):
        raise ValueError(
            f"a regressor needs features [N, F] and targets [N, T], found {features.shape} and {targets.shape}"
        )
    if len(features) < MIN_RUNS:
        raise ValueError(f"a regressor needs at least {MIN_RUNS} calibration runs, found {len(features)}: run more")
    for name, table in (("features", features), ("targets", targets)):
        rows = np.flatnonzero(~np.isfinite(table).all(1)).tolist()
        if rows:
            raise ValueError(f"{name}: rows {rows[:8]} hold NaN or infinity: leave those calibration runs out")
    return features, targets


def checked_features(features: np.ndarray, num_features: int | None) -> np.ndarray:
    """Features of a prediction as a float64 table.

    Raises:
        ValueError: see `Regressor.predict`.
    """
    if num_features is None:
        raise ValueError(NOT_FITTED)
    features = np.asarray(features, dtype=np.float64)
    if features.ndim != 2 or features.shape[1] != num_features:
        raise ValueError(f"the regressor was fitted on {num_features} features, found a table of {features.shape}")
    return features


@contextmanager
def single_threaded() -> Iterator[None]:
    """Inside, BLAS, OpenMP and torch use one thread each; where that is so already, it costs nothing."""
    from threadpoolctl import threadpool_limits  # comes with scikit-learn

    if getattr(_thread, "is_single", False):
        yield
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    _thread.is_single = True
    try:
        with threadpool_limits(1):  # looks through all libraries of the process: milliseconds
            yield
    finally:
        _thread.is_single = False
        torch.set_num_threads(threads)


def on_threads(function: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """function(item) of each item, as many at once as torch was given threads (OMP_NUM_THREADS), each on one."""
    workers = torch.get_num_threads()
    with single_threaded(), ThreadPoolExecutor(workers) as pool:
        return list(pool.map(function, items))

"""The table of calibration runs, and what can be wrong with it: found before anything is fitted, with names."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mobilellm_pro.data_mix.regression import SUM_TOLERANCE
from mobilellm_pro.data_mix.regressor import MIN_RUNS
from mobilellm_pro.repeated_names import repeated

OUTLIER_SPREADS = 10.0
"""A loss this many robust standard deviations above the median of its target comes from a run that diverged."""
_LEAST_SPREAD = 0.01
"""Of the median: runs that agree to fewer percent have no outliers."""


@dataclass(frozen=True)
class Calibration:
    """N proxy runs on mixtures of K domains, measured on T targets.

    Attributes:
        runs: [N] names, for messages.
        domains: [K] names of the weights' columns.
        weights: [N, K].
        targets: [T] names of the losses' columns.
        losses: [N, T], nats a token or bits per byte.
    """

    runs: tuple[str, ...]
    domains: tuple[str, ...]
    weights: np.ndarray
    targets: tuple[str, ...]
    losses: np.ndarray

    def __post_init__(self) -> None:
        """Raises ValueError: names and tables of different sizes."""
        wanted = (len(self.runs), len(self.domains)), (len(self.runs), len(self.targets))
        if (self.weights.shape, self.losses.shape) != wanted:
            raise ValueError(
                f"calibration: expected weights {wanted[0]} and losses {wanted[1]} of the named runs, domains and "
                f"targets, found {self.weights.shape} and {self.losses.shape}"
            )


def check_calibration(calibration: Calibration, domains: Sequence[str] | None = None) -> None:
    """Every problem of the runs at once.

    Args:
        calibration: the table.
        domains: that the weights are wanted for; None: those of the table.

    Raises:
        ValueError: one problem a line: names that occur twice, domains that no run samples, mixtures outside the
            simplex, runs that diverged (NaN, infinity, or a loss far above those of the other runs), too few runs.
    """
    problems = [
        *_repeated(calibration),
        *_absent(calibration, calibration.domains if domains is None else domains),
        *_outside(calibration),
        *_diverged(calibration),
    ]
    if len(calibration.runs) < MIN_RUNS:
        problems.append(f"{len(calibration.runs)} runs are too few: run at least {MIN_RUNS}")
    if problems:
        raise ValueError("\n".join(f"calibration: {problem}" for problem in problems))


def _repeated(calibration: Calibration) -> list[str]:
    groups = {"domain": calibration.domains, "target": calibration.targets, "run": calibration.runs}
    return [
        f"the {kind} name {name!r} occurs twice: give each a name of its own"
        for kind, names in groups.items()
        for name in repeated(names)
    ]


def _absent(calibration: Calibration, wanted: Sequence[str]) -> list[str]:
    sampled = {name for name, column in zip(calibration.domains, calibration.weights.T) if (column > 0).any()}
    return [
        f"the domain {name!r} is absent from it: no run samples {name!r}; calibrate with it, or leave the corpus out"
        for name in dict.fromkeys(wanted)
        if name not in sampled
    ]


def _outside(calibration: Calibration) -> list[str]:
    return [
        f"the mixture of run {run!r} is outside the simplex (least weight {row.min():.6g}, sum {row.sum():.6g}): "
        "weights are at least 0 and sum to 1"
        for run, row in zip(calibration.runs, calibration.weights)
        if not (row.min() >= 0 and abs(row.sum() - 1) <= SUM_TOLERANCE)  # also true of NaN
    ]


def _diverged(calibration: Calibration) -> list[str]:
    problems = []
    for target, column in zip(calibration.targets, calibration.losses.T):
        finite = column[np.isfinite(column)]
        center = np.median(finite) if len(finite) else 0.0
        spread = 1.4826 * np.median(np.abs(finite - center)) if len(finite) else 0.0
        limit = center + OUTLIER_SPREADS * max(spread, _LEAST_SPREAD * abs(center))
        problems += [
            f"run {run!r} diverged: {target} is {loss:.6g}, where the other runs have about {center:.4g} (at most "
            f"{limit:.4g} is taken for a result): run it again or leave it out"
            for run, loss in zip(calibration.runs, column)
            if not loss <= limit
        ]
    return problems

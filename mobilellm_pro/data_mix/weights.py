r"""From utility to static sampling weights: natural share and utility combined, within caps and floors.

The weights solve one problem, for any utility U of mixtures (paper, section 4, which leaves the combination open):

    maximise  U(w) - temperature * KL(w || natural)    over   floor <= w_i <= epoch_cap * tokens_i / train_tokens,
                                                              \sum_i w_i = 1

With U linear, U(w) = \sum_i w_i u_i, the solution is exact (`static_weights`): natural_i exp(u_i / temperature), then
water filling (`weights_simplex`). For the utility of a regressor it is searched (`weights_search`). A high temperature
gives the natural share, a low one all to the best corpora up to their caps. It has the unit of the utility: a corpus
whose utility is one temperature higher is sampled e times as often against its natural share.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mobilellm_pro.data_mix.mixture_file import dataset_table
from mobilellm_pro.data_mix.weights_simplex import (
    DECIMALS,
    UNITS,
    check_corpora,
    decimal_shares,
    fill,
    share_limits,
)

INTERVAL = (5.0, 95.0)
"""Percentiles of the draws."""


@dataclass(frozen=True)
class WeightResult:
    """Weights of K corpora and how they came about; arrays are float64 [K].

    Attributes:
        method: "tilt" (utility linear in the weights) or "search".
        names, tokens: of the corpora.
        natural_share: where the weights started from.
        utility: of each source; "search": at the natural share, for the record.
        unlimited: the solution without caps and floor; "search": natural_i exp(u_i / temperature) for comparison.
        low_limit, high_limit: of each weight.
        weights: multiples of a millionth that sum to 1.
        low, high: interval of each weight over the draws, equal to the weight without draws.
        num_draws: of the utility; over what is the caller's choice.
        temperature, epoch_cap, floor, train_tokens: as given.
    """

    method: str
    names: tuple[str, ...]
    tokens: tuple[int, ...]
    natural_share: np.ndarray
    utility: np.ndarray
    unlimited: np.ndarray
    low_limit: np.ndarray
    high_limit: np.ndarray
    weights: np.ndarray
    low: np.ndarray
    high: np.ndarray
    num_draws: int
    temperature: float
    epoch_cap: float
    floor: float
    train_tokens: int

    @property
    def epochs(self) -> np.ndarray:
        """Passes over each corpus in the run."""
        return self.weights * self.train_tokens / np.array(self.tokens)

    def explain(self) -> list[dict[str, Any]]:
        """For each corpus, as JSON values, every number from the natural share to the weight, in order."""
        at = [
            "cap" if weight >= high else "floor" if weight <= low else ""
            for weight, low, high in zip(self.weights, self.low_limit, self.high_limit)
        ]
        columns = {
            "natural_share": self.natural_share,
            "utility": self.utility,
            "unlimited": self.unlimited,
            "low_limit": self.low_limit,
            "high_limit": self.high_limit,
            "weight": self.weights,
            "low": self.low,
            "high": self.high,
            "epochs": self.epochs,
        }
        return [
            {"name": name, "tokens": self.tokens[i], **{k: float(v[i]) for k, v in columns.items()}, "limit": at[i]}
            for i, name in enumerate(self.names)
        ]


@dataclass(frozen=True)
class MixProblem:
    """What weights are wanted for; checked where it is made.

    Attributes:
        names, tokens: of the corpora.
        train_tokens: that the run will read.
        temperature: above 0, in the unit of the utility.
        epoch_cap: passes over a corpus that are allowed.
        floor: least weight of each.
        natural_share: [K], normalised here; None: tokens / sum of tokens.

    Raises:
        ValueError: see `share_limits`; a temperature that is not above 0; shares that are not above 0.
    """

    names: Sequence[str]
    tokens: Sequence[int]
    train_tokens: int
    temperature: float
    epoch_cap: float = 4.0
    floor: float = 0.0
    natural_share: Sequence[float] | np.ndarray | None = None

    def __post_init__(self) -> None:
        self.limits()
        if not 0 < self.temperature < np.inf:
            raise ValueError(f"temperature = {self.temperature}: expected a number above 0, in the unit of the utility")
        share = self.tokens if self.natural_share is None else self.natural_share
        if len(share) != len(self.names) or not all(0 < value < np.inf for value in share):
            raise ValueError(f"natural_share: expected {len(self.names)} numbers above 0, found {list(share)}")

    def limits(self) -> tuple[np.ndarray, np.ndarray]:
        """See `share_limits`."""
        return share_limits(
            self.names, self.tokens, train_tokens=self.train_tokens, epoch_cap=self.epoch_cap, floor=self.floor
        )

    def natural(self) -> np.ndarray:
        """The natural share, float64 [K] summing to 1."""
        share = np.asarray(self.tokens if self.natural_share is None else self.natural_share, np.float64)
        return share / share.sum()

    def tilted(self, utility: np.ndarray) -> np.ndarray:
        """natural_i exp(u_i / temperature), normalised; [K] of utilities [K]."""
        powers = np.log(self.natural()) + utility / self.temperature
        tilted = np.exp(np.maximum(powers - powers.max(), -700.0))  # above 0 also for a hopeless corpus
        return tilted / tilted.sum()

    def within_limits(self, shares: np.ndarray) -> np.ndarray:
        """The nearest shares between the limits, float64 [K]."""
        low, high = self.limits()
        return fill(shares, low / UNITS, high / UNITS)

    def result(self, method: str, shares: np.ndarray, utility: np.ndarray, draws: Sequence[np.ndarray]) -> WeightResult:
        """The record of shares [K] within the limits, with the interval over other shares [K] each."""
        low, high = self.limits()
        weights = decimal_shares(shares, low, high) / UNITS
        spread = np.percentile([*draws], INTERVAL, axis=0) if draws else np.stack([weights, weights])
        return WeightResult(
            method,
            tuple(self.names),
            tuple(int(count) for count in self.tokens),
            self.natural(),
            utility,
            self.tilted(utility),
            low / UNITS,
            high / UNITS,
            weights,
            np.minimum(spread[0], weights),  # all draws may lie on one side of the weight (see `weights_draws`)
            np.maximum(spread[1], weights),
            len(draws),
            self.temperature,
            self.epoch_cap,
            self.floor,
            self.train_tokens,
        )


def static_weights(problem: MixProblem, utility: np.ndarray, draws: np.ndarray | None = None) -> WeightResult:
    """Weights for a utility that is linear in them: the exact solution.

    Args:
        problem: corpora, limits, temperature.
        utility: [K] of each source, the higher the better, e.g. `source_gains` at the natural share.
        draws: [R, K] of the same from other fits (`weights_draws`), for the interval; None: without.

    Raises:
        ValueError: utilities that are not finite or do not fit the corpora.
    """
    table = np.atleast_2d(np.asarray(utility, np.float64))
    table = table if draws is None else np.concatenate((table, np.asarray(draws, np.float64)))
    if table.shape[1] != len(problem.names):
        raise ValueError(f"utility: expected one for each of {len(problem.names)} corpora, found {table.shape[1]}")
    for name, column in zip(problem.names, table.T):
        if not np.isfinite(column).all():
            raise ValueError(f"the utility of {name!r} is not finite ({column}): was it absent from the calibration?")
    shares = [problem.within_limits(problem.tilted(row)) for row in table]
    return problem.result("tilt", shares[0], table[0], shares[1:])


def datasets_fragment(result: WeightResult, paths: Mapping[str, str | Path]) -> str:
    """The `[[data.datasets]]` tables of a phase TOML, whose weights sum to 1 exactly as decimals.

    Args:
        result: the weights.
        paths: name of each corpus -> its folder.

    Raises:
        ValueError: a corpus without a path.
    """
    missing = [name for name in result.names if name not in paths]
    if missing:
        raise ValueError(f"paths: no folder for {', '.join(missing)}; given are {', '.join(paths) or 'none'}")
    lines = [
        f"# Weights for {result.train_tokens:,} tokens: method {result.method}, temperature {result.temperature:g}, at",
        f"# most {result.epoch_cap:g} passes over a corpus, at least {result.floor:g} of each.",
    ]
    for number, (name, weight) in enumerate(zip(result.names, result.weights)):
        said = f"{weight:.{DECIMALS}f}  # natural share {result.natural_share[number]:.4f}"
        lines += ["", dataset_table(name, str(paths[name]), said).rstrip()]
    return "\n".join(lines) + "\n"


PAPER_TABLE_2 = {
    "fineweb_edu": 89.75,
    "starcoder": 4.66,
    "open_web_math": 1.92,
    "arxiv": 1.35,
    "wiki": 1.02,
    "stack_exchange": 1.02,
    "algebraic_stack": 0.24,
}
"""Percent, by the names of `train_configs/mobilellm_pro_1b/datasets.toml`; sums to 99.96."""


def baseline_weights(names: Sequence[str], tokens: Sequence[int]) -> dict[str, np.ndarray]:
    """What the weights stand beside: float64 [K] each, summing to 1, not limited by caps.

    Returns:
        "uniform", "natural" (tokens / sum), and "paper" (Table 2, renormalised) where the corpora are some of its.
    """
    check_corpora(names, tokens, 1)
    shares = {"uniform": np.ones(len(names)), "natural": np.array(tokens, np.float64)}
    if set(names) <= PAPER_TABLE_2.keys():
        shares["paper"] = np.array([PAPER_TABLE_2[name] for name in names])
    return {name: share / share.sum() for name, share in shares.items()}

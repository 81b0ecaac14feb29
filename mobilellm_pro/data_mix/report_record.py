"""The record of a data mix: all numbers that the report shows, as plain values, checked, and written as JSON.

Plots and page (`report_plots`, `report_page`) are made from this record and from nothing else, so they can be made
again from the JSON file alone.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np

from mobilellm_pro.data_mix.influence_curve import InfluenceCurve, utility_curve
from mobilellm_pro.data_mix.regression_score import rank_correlation
from mobilellm_pro.data_mix.weights import WeightResult
from mobilellm_pro.repeated_names import repeated


@dataclass(frozen=True)
class MixReport:
    """K sources, D domains, T targets, N calibration runs, P points of a curve.

    Attributes:
        title: of the page.
        weights: `WeightResult.explain`: for each source how its weight came about.
        baselines: name of a mixture -> its K weights, in the order of `weights`.
        predicted_utility: name of a mixture ("ours" and the baselines) -> U as the regressor predicts it.
        domains: [D] names of the columns of `influence`.
        influence: [K][D], nats a token of the domain for each 1,000 tokens of the source.
        curves: source -> {"tokens": [P], "mean": [P][D], "variance": [P][D]}, of the samples since the last point.
        utility_curves: source -> {"tokens": [P], "mean": [P], "deviation": [P]}, see `influence_curve.utility_curve`.
        predictions: target -> {"runs": [N], "predicted": [N], "measured": [N], "rank_correlation"}, each run predicted
            from all the others, as utility (the negative loss); the correlation is None where one side is constant.
        scores: regressor -> mean out-of-fold rank correlation over the targets.
        settings: of the mix, any JSON values.
        notes: sentences for the reader, on what was measured and its limits.
        method: of the weights, see `WeightResult`.
    """

    title: str
    weights: list[dict[str, Any]]
    baselines: dict[str, list[float]]
    predicted_utility: dict[str, float] = field(default_factory=dict)
    domains: list[str] = field(default_factory=list)
    influence: list[list[float]] = field(default_factory=list)
    curves: dict[str, dict[str, list[Any]]] = field(default_factory=dict)
    utility_curves: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    predictions: dict[str, dict[str, Any]] = field(default_factory=dict)
    scores: dict[str, float] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    method: str = ""

    def __post_init__(self) -> None:
        """Raises ValueError: parts that do not fit each other."""
        names = self.sources
        problems = [f"the source {name!r} occurs twice" for name in repeated(names)]
        problems += [
            f"baselines.{name}: {len(shares)} weights for {len(names)} sources"
            for name, shares in self.baselines.items()
            if len(shares) != len(names)
        ]
        shape = [len(row) for row in self.influence]
        if self.influence and shape != [len(self.domains)] * len(names):
            problems.append(
                f"influence: expected {len(names)} rows of {len(self.domains)}, found rows of {shape or 'none'}"
            )
        problems += [
            f"{key}.{name}: no source of this name"
            for key, curves in (("curves", self.curves), ("utility_curves", self.utility_curves))
            for name in curves
            if name not in names
        ]
        if not names:
            problems.append("weights: expected at least one source")
        if problems:
            raise ValueError("\n".join(f"report: {problem}" for problem in problems))

    @property
    def sources(self) -> list[str]:
        """Names of the K sources."""
        return [row["name"] for row in self.weights]

    def to_json(self) -> str:
        """All of it.

        Raises:
            ValueError: NaN or infinity, which JSON does not have, or a value that is not plain.
        """
        return json.dumps(asdict(self), indent=2, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str, name: str = "report") -> "MixReport":
        """Reads what `to_json` gave.

        Raises:
            ValueError: not JSON, or other keys than those of a report; `name` says which file.
        """
        try:
            content = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{name}: not valid JSON: {error}") from None
        known = {item.name for item in fields(cls)}
        if not isinstance(content, dict) or not {"title", "weights", "baselines"} <= content.keys() <= known:
            raise ValueError(f"{name}: expected an object with keys of {', '.join(sorted(known))}")
        return cls(**content)


def make_report(
    title: str,
    result: WeightResult,
    baselines: Mapping[str, np.ndarray],
    *,
    influence: np.ndarray | None = None,
    domains: Sequence[str] = (),
    curves: Mapping[str, InfluenceCurve] | None = None,
    values: Sequence[float] | np.ndarray | None = None,
    predictions: Mapping[str, dict[str, Any]] | None = None,
    **others: Any,
) -> MixReport:
    """The record from arrays.

    Args:
        title, baselines: see `MixReport`.
        result: the weights.
        influence: [K, D].
        domains: [D] names.
        curves: of the sources, by name.
        values: [D] what each domain counts in the utility; None: the record is without utility curves.
        predictions: see `prediction_record`.
        others: further fields of `MixReport`.

    Raises:
        ValueError: parts that do not fit each other.
    """
    curves = curves or {}
    together = {} if values is None else {name: utility_curve(curve, values) for name, curve in curves.items()}
    return MixReport(
        title,
        result.explain(),
        {name: np.asarray(shares).tolist() for name, shares in baselines.items()},
        domains=list(domains),
        influence=[] if influence is None else np.asarray(influence).tolist(),
        curves={name: {key: part.tolist() for key, part in vars(curve).items()} for name, curve in curves.items()},
        utility_curves={
            name: {"tokens": curves[name].tokens.tolist(), "mean": mean.tolist(), "deviation": deviation.tolist()}
            for name, (mean, deviation) in together.items()
        },
        predictions=dict(predictions or {}),
        method=result.method,
        **others,
    )


def prediction_record(
    targets: Sequence[str], runs: Sequence[str], predicted_losses: np.ndarray, losses: np.ndarray
) -> dict[str, dict[str, Any]]:
    """Predicted against measured utility of each target, for `MixReport.predictions`.

    Args:
        targets, runs: [T] and [N] names.
        predicted_losses: [N, T], of each run from the others (`leave_one_out`).
        losses: [N, T] as measured.
    """
    correlations = rank_correlation(predicted_losses, losses).tolist()
    return {
        target: {
            "runs": list(runs),
            "predicted": (-predicted_losses[:, number]).tolist(),
            "measured": (-losses[:, number]).tolist(),
            "rank_correlation": correlations[number] if np.isfinite(correlations[number]) else None,
        }
        for number, target in enumerate(targets)
    }

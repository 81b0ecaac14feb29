"""The result of a merge: the paper's Table 14 as merge.json and merge.md, and what is worth a warning."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mobilellm_pro.merging.drift import barrier
from mobilellm_pro.merging.weight_search import ALONE, LINE, UNIFORM, Candidate, line_shares
from mobilellm_pro.pipeline.merge_plan import MergePlan

SCORES = {"bits_per_byte": "bits per byte", "kl": "KL from the teacher, nats a token", "suite": "1 - score"}
PRE_ANNEAL = "pre-anneal"


def row_names(plan: MergePlan) -> dict[str, str]:
    """Key of a reported model -> its name in the table, in order."""
    final = {"given": "given weights"}.get(plan.search.method, "searched average")
    rows = {"parent": PRE_ANNEAL} | {f"branch {b.name}": f"specialist {b.name}" for b in plan.branches}
    return rows | {UNIFORM: "uniform average"} | ({} if plan.search.method == UNIFORM else {"merged": final})


def barriers(candidates: Sequence[Candidate], names: Sequence[str], points: int) -> dict[str, float | None]:
    """Of each branch, on the line to uniform weights; None where a score is no number. Empty without points."""
    if not points:
        return {}
    scores = {stage: [c.score for c in candidates if c.stage == stage] for stage in (UNIFORM, ALONE, LINE)}
    uniform, found = scores[UNIFORM][0], {}
    for number, name in enumerate(names):
        line = scores[LINE][number * points : (number + 1) * points]
        value = barrier((scores[ALONE][number], uniform), line_shares(points), line)
        found[name] = value if math.isfinite(value) else None
    return found


def warnings_of(
    plan: MergePlan, distances: Mapping[str, float], barriers: Mapping[str, float | None], rows: Sequence[Any]
) -> list[str]:
    """What the user should know before relying on the average."""
    limits, found = plan.warnings, []
    for name, distance in distances.items():
        if not distance <= limits.distance:
            found.append(
                f"branch {name} is {distance:.3g} of the parent's length away from it, more than warnings.distance = "
                f"{limits.distance:g}: an average with it may be worse than its parts; train it with a lower "
                "optimizer.lr or for fewer steps"
            )
    for name, value in barriers.items():
        if value is None or value > limits.barrier:
            size = "scores that are no numbers" if value is None else f"a barrier of {value:.3g}"
            found.append(
                f"between branch {name} and uniform weights there is {size} (warnings.barrier = {limits.barrier:g}): "
                "they do not lie in one basin"
            )
    found += [f"{row['name']}: bits per byte are no number: it diverged" for row in rows if row["mean"] is None]
    return found


def table(record: Mapping[str, Any]) -> str:
    """merge.md of merge.json."""
    branches, domains = record["branches"], record["domains"]
    head = ["model", *domains, "mean", f"dev {record['score']}", f"weights ({', '.join(branches)})"]
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(domains) + 2) + "---|"]
    best = {name: _least([row["bits_per_byte"][name] for row in record["rows"]]) for name in domains}
    least = _least([row["mean"] for row in record["rows"]])
    for row in record["rows"]:
        cells = [_number(row["bits_per_byte"][name], best[name]) for name in domains]
        weights = "; ".join(" ".join(f"{weight:.3f}" for weight in group) for group in row["weights"] or [])
        cells += [_number(row["mean"], least), _number(row["dev_score"]), weights or "–"]
        lines.append(f"| {row['name']} | " + " | ".join(cells) + " |")
    text = ["# Merge", ""]
    text += [
        f"Bits per byte on the part valid of each domain, the lowest in bold. Weights: {record['method']}, "
        f"{record['candidates']} candidates scored on the part dev."
    ]
    text += ["", *lines, ""]
    if len(record["groups"]) > 1:
        text.append(f"Groups of layers with weights of their own: {'; '.join(record['groups'])}.")
    distances = ", ".join(f"{name} {value:.3g}" for name, value in record["distances"].items())
    text.append(f"Distance from the parent, relative to its length: {distances}.")
    if record["barriers"]:
        values = (f"{name} {'–' if value is None else f'{value:.3g}'}" for name, value in record["barriers"].items())
        text.append(f"Barrier to uniform weights: {', '.join(values)}.")
    text += [""] * bool(record["warnings"]) + [f"- warning: {warning}" for warning in record["warnings"]]
    return "\n".join([*text, "", "![search](search.png)", ""])


def _least(values: Sequence[float | None]) -> float | None:
    return min((value for value in values if value is not None), default=None)


def _number(value: float | None, least: float | None = None) -> str:
    if value is None:
        return "no number"
    return f"**{value:.4f}**" if value == least else f"{value:.4f}"


def weight_rows(weights: np.ndarray) -> list[list[float]]:
    """[groups, branches] as JSON values."""
    return [[float(weight) for weight in row] for row in weights]

"""Tables of results in a run's report: the merge, the evaluation beside published models, the models' sizes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mobilellm_pro.evaluation.published_scores import MODELS, NEEDLE, SCORES
from mobilellm_pro.static_page import paragraph, table

_MB = 1e6


def merge_tables(record: Mapping[str, Any]) -> list[str]:
    """The paper's Table 14: before, each specialist, averages; by domain, with the weights and what they warn of.

    Args:
        record: merge.json.
    """
    domains, branches = record["domains"], record["branches"]
    header = ["model", *domains, "mean", "dev", "weights"]
    rows = [
        [
            row["name"],
            *(_bits(row["bits_per_byte"][domain]) for domain in domains),
            _bits(row["mean"]),
            _bits(row["dev_score"]),
            _weights(row["weights"], branches, record["groups"]),
        ]
        for row in record["rows"]
    ]
    means = [(row["mean"], number) for number, row in enumerate(record["rows"]) if row["mean"] is not None]
    best = [min(means)[1]] if means else []
    legend = (
        f"Bits per byte of held-out text; the lowest mean in bold. Dev: {record['score']}, on text that no other "
        f"column uses. Weights by {record['method']}: {record['candidates']} candidates."
    )
    parts = [table(header, rows, text=["weights"], strong=best), paragraph(legend, "note")]
    drift = [[name, record["distances"].get(name), record["barriers"].get(name)] for name in branches]
    parts.append(table(["branch", "distance from the parent / its length", "barrier to the uniform average"], drift))
    return [*parts, *(paragraph(f"Warning: {warning}") for warning in record["warnings"])]


def _bits(value: float | None) -> str:
    return "no number" if value is None else f"{value:.4f}"


def _weights(weights: Sequence[Sequence[float]] | None, branches: Sequence[str], groups: Sequence[str]) -> str | None:
    """Of the branches that count, for each group of layers."""
    if weights is None:
        return None
    said = [", ".join(f"{name} {weight:.3f}" for name, weight in zip(branches, row) if weight) for row in weights]
    same = len(set(said)) == 1
    return said[0] if same else "; ".join(f"{group}: {row}" for group, row in zip(groups, said, strict=True))


def evaluation_table(
    evaluations: Mapping[str, Mapping[str, Mapping[str, Any]]], needles: Mapping[str, Mapping[str, Any]]
) -> str:
    """Scores of evaluate phases beside the published ones, in percent.

    Args:
        evaluations: phase -> task -> metric, value, stderr.
        needles: phase -> needle test; those of phases that have been evaluated get a row.
    """
    tasks = dict.fromkeys([*SCORES, *(task for found in evaluations.values() for task in found)])
    nothing: tuple[float | None, ...] = (None,) * len(MODELS)
    rows = []
    for task in tasks:
        name, published = SCORES.get(task, (task, nothing))
        rows.append(_Row(name, [found.get(task) for found in evaluations.values()], published))
    tests = [needles[phase]["last"]["score"] if phase in needles else None for phase in evaluations]
    if any(score is not None for score in tests):
        scores = [
            None if score is None else {"metric": "exact_match", "value": score, "stderr": None} for score in tests
        ]
        rows.append(_Row(NEEDLE[0], scores, NEEDLE[1]))
    cells: list[list[str | None]] = [row.cells for row in rows]
    shared = [row.numbers for row in rows if None not in row.numbers]
    if shared:
        means = [sum(filter(None, column)) / len(shared) for column in zip(*shared, strict=True)]
        cells.append([f"mean of the {len(shared)} that all have", None, *map(_percent, means)])
    legend = (
        "Percent, perplexities as they are; ± the standard error. Published: Table 4 of the technical report, where "
        "choices are normalised by their characters (here: acc_norm where a task has it). –: not published or measured."
    )
    shown = table(["task", "metric", *evaluations, *MODELS], cells, text=["metric"], strong=[len(rows)])
    return shown + paragraph(legend, "note")


@dataclass(frozen=True)
class _Row:
    """A task of the evaluation."""

    name: str
    ours: Sequence[Mapping[str, Any] | None]
    published: Sequence[float | None]

    @property
    def numbers(self) -> list[float | None]:
        return [*(None if one is None else one["value"] for one in self.ours), *self.published]

    @property
    def cells(self) -> list[str | None]:
        metrics = dict.fromkeys(one["metric"] for one in self.ours if one is not None)
        return [self.name, ", ".join(metrics) or None, *map(_score, self.ours), *map(_percent, self.published)]


def _score(found: Mapping[str, Any] | None) -> str | None:
    if found is None:
        return None
    return f"{found['value']:.2f}" + ("" if found["stderr"] is None else f" ± {found['stderr']:.2f}")


def _percent(value: float | None) -> str | None:
    return None if value is None else f"{value:.2f}"


def size_table(sizes: Sequence[Mapping[str, Any]]) -> str:
    """Models on disk, in megabytes of a million bytes."""
    rows = []
    for size in sizes:
        number = size["parameters"]
        counted = [None, None] if number is None else [f"{number:,}", _megabytes(2 * number)]
        weights = None if size["weight_bytes"] is None else _megabytes(size["weight_bytes"])
        where = inside_phase(size["path"], size["phase"])
        dtypes, disk = ", ".join(size["dtypes"]) or None, _megabytes(size["disk_bytes"])
        rows.append([size["phase"], size["what"], counted[0], dtypes, weights, disk, counted[1], where])
    header = ["phase", "what", "parameters", "type", "weights (MB)", "on disk (MB)", "in bf16 (MB)", "where"]
    legend = "MB: a million bytes. On disk: a checkpoint with its optimizer, a folder's safetensors. In bf16: computed."
    return table(header, rows, text=["what", "type", "where"]) + paragraph(legend, "note")


def inside_phase(path: str, phase: str) -> str:
    """A path in the output without the name of the phase's own folder."""
    return "" if path == phase else path.removeprefix(f"{phase}/")


def _megabytes(num_bytes: float) -> str:
    return f"{num_bytes / _MB:,.2f}"

"""All numbers that the report of a run shows, as plain values: what report.json holds and the page is made from.

They are read from what the phases have left, by the files that are there and not by the kind of a phase: a report can
be made at any time of a run, and a kind of phase that comes later needs nothing here to be listed.
"""

import json
import math
import statistics
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mobilellm_pro.pipeline.ledger import Ledger
from mobilellm_pro.pipeline.phases import Phase, Pipeline
from mobilellm_pro.pipeline.pipeline_status import Progress
from mobilellm_pro.pipeline.run_report_results import (
    evaluation_scores,
    merge_result,
    mix_result,
    needle_scores,
    read_json,
)
from mobilellm_pro.pipeline.run_report_sizes import model_sizes
from mobilellm_pro.training.run_folder import read_metrics

CURVE_POINTS = 1000
"""Most points of a curve: of a longer run, every n-th logged step and the last."""

_TRAIN_KEYS = ("loss", "distill/kl", "distill/ce", "distill/teacher_ce")
_VALIDATION_KEYS = ("bits_per_byte", "teacher_bits_per_byte", "ce", "kl")
_NOT_OF_THE_MACHINE = ("command", "world_size")


@dataclass(frozen=True)
class RunReport:
    """A run as far as it is; P phases in their order.

    Attributes:
        pipeline: its file.
        output: its folder, to which all other paths here are relative where they lie in it.
        made: when this was read, in UTC.
        environment: "commit", "processor", "versions.torch", ... -> value -> the phases that ran with it.
        phases: [P] name, kind, state, starts, begun, ended, wall_seconds, steps, of_steps, tokens, tokens_per_second
            (median over the logged steps), loss, kl, ce, bits_per_byte, teacher_bits_per_byte (the last ones; nats a
            token, the bits held out), product, log, error; None where there is none.
        curves: phase -> {"train": [record], "validation": [record]}, records with step and terms of the loss.
        tokens: phase -> corpus -> {"tokens", "epochs"} read in it.
        mixes: phase -> {"page", "plots", "report"}, see `run_report_results.mix_result`.
        merges: phase -> merge.json and "plots", see `run_report_results.merge_result`.
        needles: phase -> {"score_by_step", "last"}: percent by step, and the last test's `summary` without cells.
        evaluations: phase -> task -> {"metric", "value", "stderr"}, see `run_report_results.evaluation_scores`.
        sizes: models on disk, see `run_report_sizes.model_sizes`.
    """

    pipeline: str
    output: str
    made: str
    environment: dict[str, dict[str, list[str]]]
    phases: list[dict[str, Any]]
    curves: dict[str, dict[str, list[dict[str, Any]]]]
    tokens: dict[str, dict[str, dict[str, Any]]]
    mixes: dict[str, dict[str, Any]]
    merges: dict[str, dict[str, Any]]
    needles: dict[str, dict[str, Any]]
    evaluations: dict[str, dict[str, dict[str, Any]]]
    sizes: list[dict[str, Any]]

    def to_json(self) -> str:
        """All of it; a loss that is not finite, for which JSON has no number, as the text "nan" or "inf"."""
        return json.dumps(_plain(asdict(self)), indent=2, allow_nan=False) + "\n"


def make_run_report(pipeline: Pipeline) -> RunReport:
    """Reads what the phases have left so far.

    Raises:
        ValueError: a file is not what its name says; it is named.
    """
    progress = Progress.read(pipeline, Ledger(pipeline.output))
    phases = pipeline.phases
    metrics = {phase.name: _metrics(phase) for phase in phases}
    needles = {phase.name: needle_scores(phase.folder) for phase in phases}
    evaluations = {phase.name: evaluation_scores(phase.folder) for phase in phases}
    merges = {phase.name: merge_result(phase.folder, pipeline.output) for phase in phases}
    mixes = {phase.name: mix_result(phase.folder, pipeline.output) for phase in phases}
    tokens = {name: _tokens(found["train"]) for name, found in metrics.items()}
    curves = {name: {kind: _thinned(records) for kind, records in found.items()} for name, found in metrics.items()}
    return RunReport(
        pipeline=str(pipeline.path),
        output=str(pipeline.output),
        made=datetime.now(UTC).isoformat(timespec="seconds"),
        environment=_environment(phases, progress),
        phases=[_phase_row(phase, progress, metrics[phase.name], pipeline.output) for phase in phases],
        curves={name: _of_interest(found) for name, found in curves.items() if any(found.values())},
        tokens={name: found for name, found in tokens.items() if found},
        mixes={name: found for name, found in mixes.items() if found is not None},
        merges={name: found for name, found in merges.items() if found is not None},
        needles={name: found for name, found in needles.items() if found is not None},
        evaluations={name: found for name, found in evaluations.items() if found is not None},
        sizes=[size for phase in phases for size in model_sizes(phase, pipeline.output)],
    )


def _metrics(phase: Phase) -> dict[str, list[dict[str, Any]]]:
    there = (phase.folder / "metrics.jsonl").is_file()
    return {kind: read_metrics(phase.folder, kind) if there else [] for kind in ("train", "validation")}


def _phase_row(
    phase: Phase, progress: Progress, metrics: Mapping[str, Sequence[dict[str, Any]]], output: Path
) -> dict[str, Any]:
    record = progress.records.get(phase.name)
    train, validation = (metrics[kind][-1] if metrics[kind] else {} for kind in ("train", "validation"))
    speeds = [one["tokens_per_second"] for one in metrics["train"] if "tokens_per_second" in one]
    row: dict[str, Any] = {"name": phase.name, "kind": phase.kind, "state": progress.state(phase.name)}
    for key in ("starts", "begun", "ended", "wall_seconds", "error"):
        row[key] = None if record is None else getattr(record, key) or None
    row["log"] = _relative(record.log, output) if record is not None and record.log else None
    row["product"] = _relative(record.product, output) if record is not None and record.product else None
    row |= {"steps": train.get("step"), "of_steps": _configured_steps(phase.folder)}
    row["tokens"] = int(train["n_tokens_seen"]) if "n_tokens_seen" in train else None
    row["tokens_per_second"] = statistics.median(speeds) if speeds else None
    row |= {"loss": train.get("loss"), "kl": train.get("distill/kl"), "ce": train.get("distill/ce")}
    return row | {key: validation.get(key) for key in ("bits_per_byte", "teacher_bits_per_byte")}


def _configured_steps(folder: Path) -> int | None:
    path = folder / "config.toml"
    return tomllib.loads(path.read_text()).get("training", {}).get("steps") if path.is_file() else None


def _relative(path: str, output: Path) -> str:
    inside = Path(path).is_relative_to(output)
    return str(Path(path).relative_to(output)) if inside else path


def _environment(phases: Sequence[Phase], progress: Progress) -> dict[str, dict[str, list[str]]]:
    """What each phase ran on; a training's own word counts more than the runner's, which may be on another machine."""
    found: dict[str, dict[str, list[str]]] = {}
    for phase in phases:
        record = progress.records.get(phase.name)
        if record is None:
            continue
        own = read_json(phase.folder / "environment.json") or {}
        values = {**record.environment, **own}
        values |= {f"versions.{name}": version for name, version in values.pop("versions", {}).items()}
        if "world_size" in own:
            values["processes"] = own["world_size"]
        for key, value in values.items():
            if key not in _NOT_OF_THE_MACHINE and value is not None:
                said = value if isinstance(value, str) else json.dumps(value)
                found.setdefault(key, {}).setdefault(said, []).append(phase.name)
    return found


def _tokens(records: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Of the last logged step, which counts from the beginning of the phase."""
    last = records[-1] if records else {}
    names = [key.removeprefix("tokens/") for key in last if key.startswith("tokens/")]
    return {name: {"tokens": last[f"tokens/{name}"], "epochs": last.get(f"epochs/{name}")} for name in names}


def _thinned(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    stride = -(-len(records) // CURVE_POINTS)
    kept = records[:: stride or 1]
    return kept if not records or kept[-1] is records[-1] else [*kept, records[-1]]


def _of_interest(curves: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, list[dict[str, Any]]]:
    keys = {"train": _TRAIN_KEYS, "validation": _VALIDATION_KEYS}
    return {
        kind: [{key: record[key] for key in ("step", *keys[kind]) if key in record} for record in records]
        for kind, records in curves.items()
    }


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value

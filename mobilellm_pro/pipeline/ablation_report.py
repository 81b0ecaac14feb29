"""What the variants of an ablation came to: a table, the same as JSON, and the needle scores by length as a plot."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mobilellm_pro.atomic_file import write_atomically
from mobilellm_pro.data import manifest
from mobilellm_pro.evaluation.held_out import held_out_settings
from mobilellm_pro.evaluation.needle_plot import plot_models
from mobilellm_pro.evaluation.needle_results import RESULT
from mobilellm_pro.model.checkpoint import latest_checkpoint
from mobilellm_pro.pipeline.ablation_grid import AblationGrid, Variant
from mobilellm_pro.pipeline.varied_job import word_of
from mobilellm_pro.training.run_folder import read_metrics


def write_report(plan: AblationGrid) -> list[dict[str, Any]]:
    """Prints the table and writes it beside the variants' folders, with JSON and plot.

    Returns:
        a row a variant, also of those without results yet: name, why, changes, steps, tokens, bits_per_byte, needle.
    """
    rows = [_row(plan, variant) for variant in plan.variants]
    target = plan.folder / plan.path.stem
    table = f"{markdown(rows)}\n{note(plan)}\n"
    plan.folder.mkdir(parents=True, exist_ok=True)
    write_atomically(target.with_suffix(".md"), table)
    description = {"grid": str(plan.path), "job": str(plan.job), "note": note(plan), "variants": rows}
    write_atomically(target.with_suffix(".json"), json.dumps(description, indent=2) + "\n")
    by_length = {row["name"]: row["needle"]["by_length"] for row in rows if row["needle"]}
    if by_length:
        plot_models(by_length, plan.needle.lengths, plan.path.stem, target.with_suffix(".png"))
    print(f"\n{table}\nin {plan.folder}")
    return rows


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table; a dash where there is no result."""
    lines = [
        "| variant | changed keys | steps | tokens | held-out bits/byte | needle % |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for row in rows:
        changes = ", ".join(f"`{key} = {word_of(value)}`" for key, value in row["changes"].items())
        numbers = [_number(row["steps"], ","), _number(row["tokens"], ","), _number(row["bits_per_byte"], ".4f")]
        score = "-" if row["needle"] is None else f"{row['needle']['score']:.2f}"
        lines.append(f"| {row['name']} | {changes} | " + " | ".join([*numbers, score]) + " |")
    return "\n".join(lines) + "\n"


def note(plan: AblationGrid) -> str:
    """What was measured, and how it is comparable."""
    settings, test = held_out_settings(plan.base), plan.needle
    cells = len(test.lengths) * test.depths * test.needles
    haystack = f"text of {test.haystack}" if test.haystack else "generated filler"
    return (
        f"Held-out bits/byte: all variants read the same {settings['tokens']:,} tokens of the held-out documents of "
        f"{plan.job}, in proportion to its weights, each document alone, from its first token, whole up to "
        f"{settings['longest_document_tokens']:,} tokens; the mask is causal, and no packing, truncation or choice of "
        f"documents of a variant applies. Needle: {cells} cells, {len(test.lengths)} lengths from "
        f"{min(test.lengths):,} to {max(test.lengths):,} tokens x {test.depths} depths x {test.needles} needles, "
        f"{haystack}, greedy, exact match. Steps and tokens are of this job alone, without what the first checkpoint "
        "had seen."
    )


def needle_folder(plan: AblationGrid, variant: Variant, checkpoint: Path) -> Path:
    """Where the needle test of a checkpoint lies; another test, other text or another checkpoint has another folder."""
    test = asdict(plan.needle)
    haystack = [test["haystack"]] if test["haystack"] else []
    return _results(variant, checkpoint) / f"needle_{_digest(checkpoint, test, haystack)}"


def held_out_file(plan: AblationGrid, variant: Variant, checkpoint: Path) -> Path:
    """Where the held-out result of a checkpoint lies; that of other documents has another name."""
    settings = held_out_settings(plan.base)
    digest = _digest(checkpoint, settings, [path for _, path, _ in settings["corpora"]])
    return _results(variant, checkpoint) / f"held_out_{digest}.json"


def _results(variant: Variant, checkpoint: Path) -> Path:
    return variant.folder / "evaluation" / checkpoint.name


def _digest(checkpoint: Path, settings: Mapping[str, Any], corpora: Sequence[str]) -> str:
    """Of what was asked, of the texts it was asked about, and of when the checkpoint was written."""
    files = [checkpoint / name for name in (".metadata", "config.json")]
    files += [Path(corpus) / manifest.FILE for corpus in corpora]
    written = [file.stat().st_mtime_ns if file.is_file() else 0 for file in files]
    return hashlib.sha256(json.dumps([settings, written], sort_keys=True).encode()).hexdigest()[:8]


def read_result(path: Path) -> dict[str, Any] | None:
    """A result, or None where there is none yet."""
    return json.loads(path.read_text()) if path.is_file() else None


def _row(plan: AblationGrid, variant: Variant) -> dict[str, Any]:
    row: dict[str, Any] = {"name": variant.name, "why": variant.why, "changes": dict(variant.changes)}
    row |= {"trained": variant.train, "steps": None, "tokens": None, "bits_per_byte": None, "needle": None}
    row["checkpoint"] = None
    if variant.train:
        checkpoint = latest_checkpoint(variant.folder / variant.config.checkpoint.folder)
        if checkpoint is None or not (variant.folder / "DONE").is_file():
            return row
        last = read_metrics(variant.folder, "train")[-1]
        row |= {"steps": last["step"], "tokens": int(last["n_tokens_seen"])}
    else:
        checkpoint = Path(variant.config.checkpoint.initial_load_path)
        row |= {"steps": 0, "tokens": 0}
    row["checkpoint"] = str(checkpoint)
    held_out = read_result(held_out_file(plan, variant, checkpoint))
    needle = read_result(needle_folder(plan, variant, checkpoint) / RESULT)
    row["bits_per_byte"] = None if held_out is None else held_out["bits_per_byte"]
    row["needle"] = None if needle is None else _needle_scores(needle)
    return row


def _needle_scores(result: Mapping[str, Any]) -> dict[str, Any]:
    return {key: result[key] for key in ("score", "correct", "total", "lengths", "by_length")}


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else f"{value:{form}}"

"""The `compare` verb: several runs as one table and one plot.

    mobilellm-pro compare distilled=outputs/debug/1_language labels=outputs/debug/1_language_ce

Everything is read from the runs' metrics.jsonl; nothing is computed again.
"""

import json
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path

from mobilellm_pro.pipeline.curve_plot import Curve, draw_curves
from mobilellm_pro.training.run_folder import read_metrics


@dataclass(frozen=True)
class Row:
    """One model of the table."""

    name: str
    step: int
    bits_per_byte: float
    """On the held-out documents: cross entropy / ln 2 / UTF-8 bytes."""

    cross_entropy: float | None
    """Nats a token, held out."""

    tokens_per_second: float | None
    """Median over the logged steps of training, all ranks together."""


def compare(runs: list[str], *, out: str = "outputs/comparison") -> list[Row]:
    """Print a table of runs (held-out bits per byte, tokens/s) and plot their loss curves.

    Writes comparison.md, comparison.json, training_loss.png and held_out.png. The teacher, where a run distilled one,
    gets a row of its own, measured on the same held-out rows.

    Args:
        runs: run folders, or name=folder; without a name the folder's own is taken.
        out: folder to write to.

    Raises:
        FileNotFoundError: a folder has no metrics.
        ValueError: a run was never validated.
    """
    folders = {name or Path(folder).name: Path(folder) for name, _, folder in (run.rpartition("=") for run in runs)}
    if len(folders) < len(runs):
        raise ValueError(f"two of {', '.join(runs)} have one name; give names as name=folder")
    rows = [row for name, folder in folders.items() for row in run_rows(name, folder)]
    target = Path(out)
    target.mkdir(parents=True, exist_ok=True)
    table = markdown(rows)
    (target / "comparison.md").write_text(table)
    (target / "comparison.json").write_text(json.dumps([asdict(row) for row in rows], indent=2))
    plot_training(folders, target / "training_loss.png")
    plot_held_out(folders, target / "held_out.png")
    print(table)
    return rows


def run_rows(name: str, folder: Path) -> list[Row]:
    """The run's own row and, if it distilled, its teacher's."""
    validations = read_metrics(folder, "validation")
    if not validations:
        raise ValueError(f"{folder}: no validation in metrics.jsonl; train with validation.enable = true")
    last = validations[-1]
    speeds = [record["tokens_per_second"] for record in read_metrics(folder, "train")]
    speed = statistics.median(speeds) if speeds else None
    rows = [Row(name, last["step"], last["bits_per_byte"], last["ce"], speed)]
    if "teacher_bits_per_byte" in last:
        rows.insert(0, Row(f"teacher of {name}", last["step"], last["teacher_bits_per_byte"], None, None))
    return rows


def markdown(rows: list[Row]) -> str:
    """The table in Markdown."""
    lines = ["| model | steps | held-out bits/byte | held-out nats/token | tokens/s |", "|---|---|---|---|---|"]
    for row in rows:
        nats = "" if row.cross_entropy is None else f"{row.cross_entropy:.4f}"
        speed = "" if row.tokens_per_second is None else f"{row.tokens_per_second:,.0f}"
        lines.append(f"| {row.name} | {row.step} | {row.bits_per_byte:.4f} | {nats} | {speed} |")
    return "\n".join(lines) + "\n"


def plot_training(folders: dict[str, Path], path: Path) -> None:
    """Cross entropy of the labels during training, which every objective logs."""
    _plot(folders, "train", "distill/ce", "training cross entropy (nats/token)", path)


def plot_held_out(folders: dict[str, Path], path: Path) -> None:
    """Held-out bits per byte, with the teacher's as a line."""
    _plot(folders, "validation", "bits_per_byte", "held-out bits per byte", path, teacher="teacher_bits_per_byte")


def _plot(folders: dict[str, Path], kind: str, key: str, label: str, path: Path, teacher: str | None = None) -> None:
    from matplotlib.figure import Figure

    runs = {name: read_metrics(folder, kind) for name, folder in folders.items()}
    levels = {
        f"teacher of {name}": records[-1][teacher]
        for name, records in runs.items()
        if teacher is not None and records and teacher in records[-1]
    }
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    curves = {name: Curve.of(records, key) for name, records in runs.items()}
    draw_curves(figure.subplots(), curves, label, levels=levels)
    figure.savefig(path, dpi=120)

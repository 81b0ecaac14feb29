"""How far a pipeline is: the `status` verb, and the table with which `run` begins."""

import shlex
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from mobilellm_pro.pipeline.ledger import Ledger, Record
from mobilellm_pro.pipeline.phase_estimates import Estimate, estimate_trainings
from mobilellm_pro.pipeline.phase_kinds import KINDS, training_job
from mobilellm_pro.pipeline.phases import PREFIX, Phase, Pipeline, load_pipeline
from mobilellm_pro.training.run_folder import read_metrics


@dataclass(frozen=True)
class Progress:
    """What the ledger says of a pipeline's phases."""

    records: dict[str, Record]
    """Of those that have been started."""

    held: frozenset[str]
    """Names of those that somebody runs now."""

    @classmethod
    def read(cls, pipeline: Pipeline, ledger: Ledger, *, forget: Collection[str] = ()) -> "Progress":
        """Reads the ledger, as if the phases named in `forget` had never been started."""
        names = [phase.name for phase in pipeline.phases if phase.name not in forget]
        records = {name: record for name in names if (record := ledger.read(name)) is not None}
        return cls(records, frozenset(name for name in names if ledger.is_held(name)))

    @property
    def done(self) -> dict[str, Record]:
        """Records of the phases that are done."""
        return {name: record for name, record in self.records.items() if record.state == "done"}

    @property
    def products(self) -> dict[str, Path]:
        """What they have made."""
        return {name: Path(record.product) for name, record in self.done.items() if record.product is not None}

    def state(self, name: str) -> str:
        """A word for a table."""
        if name in self.held:
            return "running"
        if name not in self.records:
            return "to run"
        return "killed" if self.records[name].state == "running" else self.records[name].state


def status(pipeline: str, *, output: str | None = None) -> None:
    """Print how far a pipeline is: state, steps, wall time and product of every phase.

    Args:
        pipeline: TOML file with the phases.
        output: folder of the run; default: the file's.

    Raises:
        ConfigError: everything that is wrong with the file.
    """
    loaded = load_pipeline(pipeline, output)
    progress = Progress.read(loaded, Ledger(loaded.output))
    rows = [["phase", "kind", "state", "steps", "starts", "wall", "made"]]
    for phase in loaded.phases:
        record = progress.records.get(phase.name)
        said = ["", "", ""] if record is None else [str(record.starts), duration(record.wall_seconds), _made(record)]
        rows.append([phase.name, phase.kind, progress.state(phase.name), _steps(phase, progress), *said])
    print(f"{loaded.output}\n\n{_aligned(rows)}")


def _made(record: Record) -> str:
    """The product, or the last words of an error."""
    return record.error.splitlines()[0] if record.state == "failed" else record.product or ""


def _steps(phase: Phase, progress: Progress) -> str:
    if phase.kind != "train" or not (phase.folder / "metrics.jsonl").is_file():
        return ""
    try:
        of = f"/{training_job(phase, progress.products).training.steps}"
    except ValueError:
        of = ""  # no place for errors: `run` names them
    records = read_metrics(phase.folder, "train")
    return f"{records[-1]['step']}{of}" if records else ""


def progress_table(
    pipeline: Pipeline, progress: Progress, chosen: Sequence[Phase], *, hardware: str | None, commands: bool
) -> str:
    """What `run` is about to do.

    Args:
        pipeline: of the phases.
        progress: of the pipeline.
        chosen: phases to show.
        hardware: for the estimates, see `estimate_trainings`.
        commands: whether to show the command of each phase too.
    """
    phases = {phase.name: phase for phase in pipeline.phases}
    estimates = estimate_trainings(phases, progress.products, progress.done, hardware)
    rows = [["phase", "kind", "state", "ranks", "tokens", "time"]]
    for phase in chosen:
        state, estimate = progress.state(phase.name), estimates.get(phase.name)
        numbers = ["", ""] if estimate is None else [f"{estimate.ranks:,}", f"{estimate.tokens:,}"]
        rows.append([phase.name, phase.kind, state, *numbers, _time(progress.done.get(phase.name), estimate)])
    source = f"{pipeline.path}: {len(chosen)} of {len(pipeline.phases)} phases, in {pipeline.output}"
    said = [source, "", _aligned(rows)]
    if commands:
        made = {phase.name: Path(f"{PREFIX}{phase.name}") for phase in pipeline.phases} | progress.products
        for phase in chosen:
            said += ["", f"{phase.name}:", f"  {_command(phase, made)}"]
    return "\n".join(said)


def _command(phase: Phase, products: dict[str, Path]) -> str:
    before = "" if phase.nproc is None else f"NPROC={phase.nproc} "
    return before + shlex.join(KINDS[phase.kind].command(phase, products))


def _time(record: Record | None, estimate: Estimate | None) -> str:
    """What it took, or about what it will take."""
    if record is not None:
        return duration(record.wall_seconds)
    return "" if estimate is None or estimate.seconds is None else f"about {duration(estimate.seconds)}"


def duration(seconds: float) -> str:
    """`45 s`, `12 min 5 s`, `3 h 20 min`, `28.1 days`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    if whole < 86_400:
        return f"{whole // 3600} h {whole % 3600 // 60} min"
    return f"{seconds / 86_400:.1f} days"


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
                     for row in rows)  # fmt: skip

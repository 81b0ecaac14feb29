"""Is a disturbed run the undisturbed one? kill -9 at random moments of the debug pipeline, against a run left alone.

    bash launch/quickstart.sh                            # makes the text, and the run that is left alone
    python benchmarks/pipeline_kills.py --kills 20       # about twice as long as the quickstart

Each kill hits one process of the run's tree at a random moment: the runner, torchrun, a rank, or what else there is (a
shell, `mix`, `merge`, a worker). Then the same command is started again. In the end every checkpoint of both runs,
optimizer states included, and the weights of the mix and of the merge are compared bit by bit.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from machine import ROOT, descendants, describe
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from mobilellm_pro.atomic_file import write_atomically
from mobilellm_pro.model.checkpoint import latest_checkpoint
from mobilellm_pro.pipeline.ledger import Ledger, Record
from mobilellm_pro.pipeline.phase_kinds import training_job
from mobilellm_pro.pipeline.phases import Phase, Pipeline, load_pipeline
from mobilellm_pro.training.run_folder import read_metrics

PIPELINE = "train_configs/debug/pipeline.toml"
GRACE_SECONDS = 60
"""How long a run may take to notice that a process is gone: a training that ends saves a checkpoint first."""


@dataclass(frozen=True)
class Kill:
    """One of them."""

    phase: str
    process: str
    seconds: float
    """Of work, as long as the run left alone took for it."""


def main() -> None:
    """Command line."""
    os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # for `mobilellm-pro`
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1, help="of the moments and of whom they hit")
    parser.add_argument("--undisturbed", type=Path, default=ROOT / "outputs/debug")
    parser.add_argument("--disturbed", type=Path, default=ROOT / "outputs/killed")
    parser.add_argument("--write", type=Path, help="Markdown file")
    arguments = parser.parse_args()
    alone, killed = (load_pipeline(PIPELINE, folder) for folder in (arguments.undisturbed, arguments.disturbed))
    seconds = sum(_record(alone, phase.name).wall_seconds for phase in alone.phases)
    kills = list(_disturbed(alone, killed, random.Random(arguments.seed), arguments.kills))
    lines = _report(alone, killed, kills, seconds)
    print("\n".join(lines))
    if arguments.write:
        write_atomically(arguments.write, "\n".join(lines) + "\n")


def _command(pipeline: Pipeline) -> list[str]:
    return [sys.executable, "-m", "mobilellm_pro", "run", PIPELINE, "--output", str(pipeline.output)]


def _disturbed(alone: Pipeline, killed: Pipeline, choice: random.Random, count: int) -> Iterator[Kill]:
    """Runs the pipeline to its end, with kills when so much of the work is done; what is lost by one is done again."""
    seconds = {phase.name: _record(alone, phase.name).wall_seconds for phase in alone.phases}
    moments = sorted(choice.uniform(0, sum(seconds.values())) for _ in range(count))
    hits: Counter[str] = Counter()
    runner = _start(killed)
    for moment in moments:
        while _work(killed, seconds) < moment:
            time.sleep(0.5)
            if runner.poll() == 0:
                return  # done before the last kill
            if runner.poll() is not None:
                runner = _start(killed)
        if runner.poll() is not None:  # two moments near each other
            runner = _start(killed)
        yield _kill_one(killed, runner.pid, choice, hits, moment)
        try:
            runner.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            continue  # nobody missed that process
    while runner.wait() != 0:
        runner = _start(killed)


def _record(pipeline: Pipeline, name: str) -> Record:
    record = Ledger(pipeline.output).read(name)
    if record is None or record.state != "done":
        sys.exit(f"error: {pipeline.output}: {name} is not done; run bash launch/quickstart.sh before")
    return record


def _work(pipeline: Pipeline, seconds: dict[str, float]) -> float:
    """Seconds of the run left alone to where this one is: of phases that are done, and of the steps of a training."""
    done = 0.0
    for phase in pipeline.phases:
        record = Ledger(pipeline.output).read(phase.name)
        if record is None:
            return done
        if record.state == "done":
            done += seconds[phase.name]
        else:
            return done + seconds[phase.name] * _share(phase)
    return done


def _share(phase: Phase) -> float:
    """Of a phase that is running: steps of a training; of another, which says nothing, a moment by chance."""
    if phase.kind != "train":
        return random.random()
    if not (phase.folder / "metrics.jsonl").is_file():
        return 0.0
    steps = [record["step"] for record in read_metrics(phase.folder, "train")]
    return steps[-1] / training_job(phase, {}).training.steps if steps else 0.0


def _start(pipeline: Pipeline) -> "subprocess.Popen[bytes]":
    """Returns when a phase runs; imports and checks are none."""
    runner = subprocess.Popen(_command(pipeline), cwd=ROOT)
    while _running_phase(pipeline) is None and runner.poll() is None:
        time.sleep(0.1)
    return runner


def _kill_one(pipeline: Pipeline, runner: int, choice: random.Random, hits: Counter[str], moment: float) -> Kill:
    phase = _running_phase(pipeline) or "between phases"
    by_name: dict[str, list[int]] = {}
    for process in descendants(runner):
        by_name.setdefault(_name(process, runner), []).append(process)
    # All kinds alike: the moments are random, and one of a few kinds would seldom be hit.
    fewest = min(hits[name] for name in by_name)
    name = choice.choice(sorted(name for name in by_name if hits[name] == fewest))
    hits[name] += 1
    try:
        os.kill(choice.choice(by_name[name]), signal.SIGKILL)
    except ProcessLookupError:
        name += " (had ended)"
    kill = Kill(phase, name, moment)
    print(f"-- killed {name} in {phase} after {kill.seconds:.0f} s", flush=True)
    return kill


def _running_phase(pipeline: Pipeline) -> str | None:
    ledger = Ledger(pipeline.output)
    return next((phase.name for phase in pipeline.phases if ledger.is_held(phase.name)), None)


def _name(process: int, runner: int) -> str:
    """Who a process is, by its command."""
    if process == runner:
        return "runner"
    try:
        words = Path(f"/proc/{process}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return "other"
    text = " ".join(words)
    if "torchrun" in text:
        return "torchrun"
    if "mobilellm_pro train" in text:
        return "rank"
    for verb in ("prepare", "mix", "convert", "merge"):
        if f"mobilellm-pro {verb}" in text:
            return verb
    return "other"


def _report(alone: Pipeline, killed: Pipeline, kills: list[Kill], seconds: float) -> list[str]:
    compared = [(phase.name, *_differences(phase.folder, killed[phase.name].folder)) for phase in alone.phases]
    different = [name for name, _, differ in compared if differ]
    by_process = Counter(kill.process for kill in kills)
    lines = [
        "# Runs that were killed against one that was left alone, debug pipeline",
        "",
        *describe(["torch", "torchtitan", "numpy"]),
        "",
        f"{len(kills)} kills: " + ", ".join(f"{name} {count}" for name, count in sorted(by_process.items()))
        + f"; the run left alone takes {seconds:.0f} s in its phases.",
        "",
        "| phase | kills | starts | wall s alone | wall s killed | values compared | differences |",
        "|---|---:|---:|---:|---:|---:|---|",
    ]  # fmt: skip
    for name, count, differ in compared:
        ours, theirs = (Ledger(pipeline.output).read(name) for pipeline in (killed, alone))
        assert ours is not None and theirs is not None
        hits = sum(kill.phase == name for kill in kills)
        lines.append(f"| {name} | {hits} | {ours.starts} | {theirs.wall_seconds:.0f} | {ours.wall_seconds:.0f} | "
                     f"{count:,} | {', '.join(differ[:3]) or 'none'} |")  # fmt: skip
    verdict = f"**different: {', '.join(different)}**" if different else "equal to the bit"
    lines += ["", f"Every checkpoint, mix and merge: {verdict}.", ""]
    lines += ["Doubts: one seed of moments; start-up of a run (imports, checks) is not a phase, so fewer kills hit it; "
              "a phase's wall time lacks the starts in which the runner itself was killed."]  # fmt: skip
    return lines


def _differences(one: Path, other: Path) -> tuple[int, list[str]]:
    """Numbers that were compared, and what differs between two folders of a phase."""
    count, differ = 0, []
    steps = [latest_checkpoint(folder / "checkpoint") for folder in (one, other)]
    if steps[0] is not None and steps[1] is not None:
        ours, theirs = (_tensors(step) for step in steps if step is not None)
        differ += sorted(ours.keys() ^ theirs.keys())
        for name in sorted(ours.keys() & theirs.keys()):
            count += ours[name].numel()
            if not torch.equal(ours[name].view(torch.uint8), theirs[name].view(torch.uint8)):
                differ.append(name)
    for name in ("weights.toml", "model.safetensors"):
        if (one / name).is_file():
            count += 1
            differ += [name] * ((one / name).read_bytes() != (other / name).read_bytes())
    if (one / "merge.json").is_file():
        count += 1
        ours, theirs = (json.loads((folder / "merge.json").read_text()) for folder in (one, other))
        differ += ["merge.json: weights"] * (ours["weights"] != theirs["weights"])
    return count, differ


def _tensors(step: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, whole."""
    stored = FileSystemReader(str(step)).read_metadata().state_dict_metadata
    found = {name: torch.empty(entry.size, dtype=entry.properties.dtype)
             for name, entry in stored.items() if isinstance(entry, TensorStorageMetadata)}  # fmt: skip
    dcp.load(found, checkpoint_id=str(step), no_dist=True)
    return {name: tensor.reshape(-1) for name, tensor in found.items()}


if __name__ == "__main__":
    main()

"""The `ablate` verb: a job in variants, one after another, and one table of what they came to.

    NPROC=2 mobilellm-pro ablate train_configs/debug/ablations/context.toml

    export TRAIN_COMMAND="srun --nodes 8 --ntasks-per-node 1 bash launch/train.sh"
    mobilellm-pro ablate train_configs/mobilellm_pro_1b/ablations/context.toml --dry-run

What is done already is not done again: finished runs are left alone, stopped ones go on from their checkpoint, needle
tests from their last cell.

    <job.dump_folder>/../ablations/<grid>/<variant>/                    the run's folder
    <job.dump_folder>/../ablations/<grid>/<variant>/evaluation/step-N/  needle_*/needle.json, .png; held_out_*.json
    <job.dump_folder>/../ablations/<grid>/logs/<variant>_train.log      what its commands printed
    <job.dump_folder>/../ablations/<grid>/<grid>.md .json .png          the table
"""

import os
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mobilellm_pro.config import JobError, smallest_world_size
from mobilellm_pro.config.job_config import Needle
from mobilellm_pro.evaluation.held_out import held_out
from mobilellm_pro.evaluation.needle import needle
from mobilellm_pro.evaluation.needle_online import OnlineNeedle
from mobilellm_pro.evaluation.needle_results import RESULT
from mobilellm_pro.model.checkpoint import latest_checkpoint
from mobilellm_pro.pipeline.ablation_grid import AblationGrid, Variant, choose, load_grid
from mobilellm_pro.pipeline.ablation_report import held_out_file, needle_folder, read_result, write_report
from mobilellm_pro.pipeline.run_command import (
    EVALUATE,
    TRAIN,
    evaluate_command,
    num_processes,
    run_logged,
    train_command,
)
from mobilellm_pro.pipeline.train_job import online_evaluations
from mobilellm_pro.training.preflight import problems
from mobilellm_pro.training.run import is_finished


def ablate(
    grid: str, *, dry_run: bool = False, only: list[str] | None = None, output: str | None = None
) -> list[dict[str, Any]] | None:
    """Train the variants of a grid one after another, test each final checkpoint, and write one table.

    Variants that are done are skipped, the first that fails ends it. $TRAIN_COMMAND starts a training and gets the
    job's file and its overrides as words (default: bash launch/train.sh, which takes NPROC and its other variables);
    $EVALUATE_COMMAND is what stands before `needle ...` and `held-out ...`, as torchrun -m mobilellm_pro (default: this
    process does both itself).

    Args:
        grid: TOML file: the job that is varied, and [[variant]] tables.
        dry_run: print the variants and their commands, and start nothing.
        only: names of the variants to run; the table has all.
        output: folder for everything. Default: ablations/ and the grid's name, beside the job's dump_folder.

    Returns:
        the rows of the table; None with dry_run.

    Raises:
        ConfigError: everything that is wrong with the grid and the jobs of its variants.
        JobError: what keeps a variant from running on this machine, before any is started.
        CommandFailed: a training or an evaluation did.
    """
    plan = load_grid(grid, output)
    chosen = choose(plan, only)
    print(_describe(plan, chosen, commands=dry_run))
    if dry_run:
        return None
    _check(plan, chosen)
    for variant in chosen:
        if variant.train and not is_finished(variant.config):
            _run(plan, variant, "train", _train_command(plan, variant))
    for variant in chosen:
        _evaluate(plan, variant)
    return write_report(plan)


def _describe(plan: AblationGrid, chosen: Sequence[Variant], *, commands: bool) -> str:
    processes = num_processes()
    said = f"as ${TRAIN} starts" if processes is None else str(processes)
    lines = [f"{plan.path}: {len(chosen)} of {len(plan.variants)} variants of {plan.job}, processes of a run: {said}"]
    for variant in chosen:
        state = "not trained" if not variant.train else "DONE" if _is_done(variant) else "to run"
        lines += [""] * commands + [f"{variant.name} ({state}): {variant.why}"]
        if not commands:
            continue
        if variant.train:
            lines.append(f"  {shlex.join(_train_command(plan, variant))}")
        checkpoint = _expected(variant)
        needle_command = evaluate_command("needle", checkpoint, [], _needle_options(plan, variant, checkpoint))
        lines.append(f"  {shlex.join(needle_command)}")
        lines.append(f"  {shlex.join(_held_out_command(plan, variant, checkpoint))}")
    return "\n".join(lines)


def _is_done(variant: Variant) -> bool:
    """For the plan, which is no place for errors."""
    try:
        return is_finished(variant.config)
    except ValueError:
        return False


def _check(plan: AblationGrid, chosen: Sequence[Variant]) -> None:
    """All that can be known to be wrong beforehand, of all variants."""
    variants: dict[str, list[str]] = {}
    for variant in chosen:
        for problem in _problems(variant):
            variants.setdefault(problem, []).append(variant.name)
    found = [f"{problem} (variant {', '.join(names)})" for problem, names in variants.items()]
    settings = Needle(enable=True, **asdict(plan.needle))
    found += OnlineNeedle(settings, plan.base.data.tokenizer, plan.folder).problems()
    if not plan.base.validation.enable:
        found.append("validation.enable = false: it says how much held-out text every variant is tested on")
    if TRAIN not in os.environ and not Path("launch/train.sh").is_file():
        found.append(f"launch/train.sh: not found; start from the repository, or set {TRAIN}")
    if found:
        raise JobError(str(plan.path), list(dict.fromkeys(found)))


def _problems(variant: Variant) -> Iterator[str]:
    config = variant.config
    if not variant.train:
        initial = Path(config.checkpoint.initial_load_path)
        if not any((initial / name).is_file() for name in (".metadata", "config.json")):
            yield f"checkpoint.initial_load_path = {str(initial)!r}: no complete checkpoint"
        return
    try:
        if not is_finished(config):
            processes = num_processes() or smallest_world_size(config)
            yield from problems(config, processes, online_evaluations(config))
    except ValueError as error:
        yield str(error)


def _train_command(plan: AblationGrid, variant: Variant) -> list[str]:
    return train_command(plan.job, variant.words)


def _expected(variant: Variant) -> Path:
    """The checkpoint that is tested: the last of the run, there or not yet, or what an untrained one begins with."""
    checkpoint = variant.config.checkpoint
    if not variant.train:
        return Path(checkpoint.initial_load_path)
    folder = variant.folder / checkpoint.folder
    found = latest_checkpoint(folder) if _is_done(variant) else None
    return found or folder / f"step-{variant.config.training.steps}"


def _evaluate(plan: AblationGrid, variant: Variant) -> None:
    """What is missing of needle test and held-out documents, here or by the user's command."""
    checkpoint = _expected(variant)
    options = _needle_options(plan, variant, checkpoint)
    elsewhere = EVALUATE in os.environ
    if read_result(needle_folder(plan, variant, checkpoint) / RESULT) is None:
        print(f"\n{variant.name}: needle test of {checkpoint}", flush=True)
        if elsewhere:
            _run(plan, variant, "needle", evaluate_command("needle", checkpoint, [], options))
        else:
            needle(str(checkpoint), **options)
    if read_result(held_out_file(plan, variant, checkpoint)) is None:
        if elsewhere:
            _run(plan, variant, "held-out", _held_out_command(plan, variant, checkpoint))
        else:
            held_out(str(checkpoint), plan.base, output=str(held_out_file(plan, variant, checkpoint)))


def _needle_options(plan: AblationGrid, variant: Variant, checkpoint: Path) -> dict[str, Any]:
    """Of the verb, and of its function."""
    test = plan.needle
    options: dict[str, Any] = {"output": str(needle_folder(plan, variant, checkpoint)), "lengths": test.lengths}
    options |= {"depths": test.depths, "needles": test.needles, "batch": test.batch}
    options |= {"haystack": test.haystack} if test.haystack else {}
    return options | ({} if variant.train else {"allow_longer": True})


def _held_out_command(plan: AblationGrid, variant: Variant, checkpoint: Path) -> list[str]:
    output = {"output": str(held_out_file(plan, variant, checkpoint))}
    return evaluate_command("held-out", checkpoint, [str(plan.job), *plan.base_words], output)


def _run(plan: AblationGrid, variant: Variant, kind: str, command: list[str]) -> None:
    """Runs a command to its end; what it prints goes to a log."""
    run_logged("variant", variant.name, kind, command, plan.folder / "logs" / f"{variant.name}_{kind}.log")

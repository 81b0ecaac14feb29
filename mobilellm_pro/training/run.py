"""A run from beginning to end: checks, run folder, torchtitan's loop, DONE.

Started again, it goes on from the newest complete checkpoint: of a run that was killed, or that was asked to stop
(`stop_request`) and has saved one for the purpose. The `train` verb is this with the evaluations that the
configuration asks for (`mobilellm_pro.pipeline.train_job`).
"""

import json
import os
import socket
import time
import tomllib
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import torch.distributed as dist
from torchtitan.tools.logging import init_logger, logger

from mobilellm_pro.atomic_file import write_atomically
from mobilellm_pro.config import JobError, load, resolved_toml
from mobilellm_pro.config.job_config import JobConfig
from mobilellm_pro.model.checkpoint import latest_checkpoint
from mobilellm_pro.training.checkpoints import remove_torn
from mobilellm_pro.training.distill_trainer import DistillTrainer
from mobilellm_pro.training.launcher import end_with_launcher
from mobilellm_pro.training.online_evaluation import OnlineEvaluation
from mobilellm_pro.training.preflight import problems
from mobilellm_pro.training.run_folder import describe_data, describe_environment, read_metrics
from mobilellm_pro.training.run_lock import run_lock
from mobilellm_pro.training.stop_request import StopRequest, begin_of_this_run
from mobilellm_pro.training.train_spec import register


def train(config: JobConfig, config_path: str, evaluations: Sequence[OnlineEvaluation] = ()) -> None:
    """Trains the configured model; a run that is DONE is left alone. One that was asked to stop ends without DONE.

    Args:
        config: a loaded configuration.
        config_path: where it is from, for messages.
        evaluations: to run while it trains.

    Raises:
        JobError: listing everything that is wrong with the configuration, the data or the teacher; or another run is
            at work in the folder.
        FloatingPointError: a step is not finite; see [guard].
        TimeoutError: ranks waited too long for others.
        CheckpointFailed: a checkpoint could not be written; the one before it stays.
    """
    set_default_environment()
    end_with_launcher()
    world_size = int(os.environ["WORLD_SIZE"])
    folder = Path(config.job.dump_folder)
    init_logger()
    if is_finished(config):
        logger.info(f"{folder} is DONE; raise training.steps to go on with it")
        return
    found = problems(config, world_size, evaluations)
    if found:
        raise JobError(config_path, found)
    is_first = os.environ["RANK"] == "0"
    stop = StopRequest(folder, looks_at_file=is_first)
    with ExitStack() as held:
        held.enter_context(stop.listening())
        if is_first:
            folder.mkdir(parents=True, exist_ok=True)
            held.enter_context(run_lock(folder))
            _begin(folder, config, world_size, stop)
        _run(folder, config, evaluations, stop)


def _begin(folder: Path, config: JobConfig, world_size: int, stop: StopRequest) -> None:
    """What the first rank does with the folder before anybody trains."""
    stop.remove(older_than=begin_of_this_run())
    (folder / "DONE").unlink(missing_ok=True)
    remove_torn(folder / config.checkpoint.folder)
    write_atomically(folder / "config.toml", resolved_toml(config))
    write_atomically(folder / "environment.json", json.dumps(describe_environment(world_size), indent=2))


def _run(folder: Path, config: JobConfig, evaluations: Sequence[OnlineEvaluation], stop: StopRequest) -> None:
    register()
    start = time.monotonic()
    trainer = DistillTrainer(config, evaluations, stop)
    if dist.get_rank() == 0:
        write_atomically(folder / "data.json", json.dumps(describe_data(config, trainer.dataloader.mixture), indent=2))
    try:
        trainer.train()
    finally:
        trainer.close()
    if dist.get_rank() == 0:
        stop.remove()
        if not trainer.stopped:
            _write_done(folder, config, trainer, time.monotonic() - start, evaluations)
    dist.destroy_process_group()


def set_default_environment() -> None:
    """What torchrun would set, for one process without it."""
    if "RANK" in os.environ:
        return
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    defaults = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    os.environ.update(defaults)


def is_finished(config: JobConfig) -> bool:
    """Whether this very job has been run in its folder: same configuration, as many steps.

    Raises:
        JobError: the folder holds a finished run of another configuration; the keys that differ are named.
    """
    folder = Path(config.job.dump_folder)
    done = folder / "DONE"
    if not done.is_file() or json.loads(done.read_text())["configured_steps"] < config.training.steps:
        return False
    earlier = load(folder / "config.toml")  # a key that has come since then has its default there
    before, now = (tomllib.loads(resolved_toml(job)) for job in (earlier, config))
    changed = [
        f"{section}.{key}"
        for section in sorted(before.keys() | now.keys())
        for key in sorted(before.get(section, {}).keys() | now.get(section, {}).keys())
        if before.get(section, {}).get(key) != now.get(section, {}).get(key)
        and (section, key) not in {("training", "steps"), ("job", "description")}
    ]
    if changed:
        cure = "choose another job.dump_folder, or remove this one to run the job again"
        raise JobError(str(folder), [f"a run with other values of {', '.join(changed)} is DONE here; {cure}"])
    return True


def _write_done(
    folder: Path, config: JobConfig, trainer: DistillTrainer, seconds: float, evaluations: Sequence[OnlineEvaluation]
) -> None:
    kinds = ["validation"] * config.validation.enable + [evaluation.name for evaluation in evaluations]
    last = {kind: read_metrics(folder, kind)[-1:] for kind in kinds}
    checkpoint = latest_checkpoint(folder / config.checkpoint.folder) if config.checkpoint.enable else None
    record = {
        "steps": trainer.step,
        "configured_steps": config.training.steps,  # more than `steps` where data.on_max_epochs stopped the run
        "skipped_steps": trainer.metrics_processor.skipped_steps,
        "wall_seconds_of_last_start": round(seconds, 1),
        "checkpoint": None if checkpoint is None else str(checkpoint),
        "validation": None,
        **{kind: records[0] for kind, records in last.items() if records},
    }
    write_atomically(folder / "DONE", json.dumps(record, indent=2))

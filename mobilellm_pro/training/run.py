"""A run from beginning to end: checks, run folder, torchtitan's loop, DONE.

Started again, it goes on from the newest complete checkpoint. The `train` verb is this with the evaluations that the
configuration asks for (`mobilellm_pro.pipeline.train_job`).
"""

import json
import os
import shutil
import socket
import time
import tomllib
from collections.abc import Sequence
from pathlib import Path

import torch.distributed as dist
from torchtitan.tools.logging import init_logger, logger

from mobilellm_pro.config import JobError, load, resolved_toml
from mobilellm_pro.config.job_config import JobConfig
from mobilellm_pro.model.checkpoint import latest_checkpoint
from mobilellm_pro.training.distill_trainer import DistillTrainer
from mobilellm_pro.training.online_evaluation import OnlineEvaluation
from mobilellm_pro.training.preflight import problems
from mobilellm_pro.training.run_folder import describe_data, describe_environment, read_metrics, write_atomically
from mobilellm_pro.training.train_spec import register


def train(config: JobConfig, config_path: str, evaluations: Sequence[OnlineEvaluation] = ()) -> None:
    """Trains the configured model; a run that is DONE is left alone.

    Args:
        config: a loaded configuration.
        config_path: where it is from, for messages.
        evaluations: to run while it trains.

    Raises:
        JobError: listing everything that is wrong with the configuration, the data or the teacher.
    """
    _default_environment()
    world_size = int(os.environ["WORLD_SIZE"])
    folder = Path(config.job.dump_folder)
    init_logger()
    if is_finished(config):
        logger.info(f"{folder} is DONE; raise training.steps to go on with it")
        return
    found = problems(config, world_size, evaluations)
    if found:
        raise JobError(config_path, found)
    if os.environ["RANK"] == "0":
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "DONE").unlink(missing_ok=True)
        _remove_torn_checkpoints(folder / config.checkpoint.folder)
        write_atomically(folder / "config.toml", resolved_toml(config))
        write_atomically(folder / "environment.json", json.dumps(describe_environment(world_size), indent=2))
    register()
    start = time.monotonic()
    trainer = DistillTrainer(config, evaluations)
    if dist.get_rank() == 0:
        write_atomically(folder / "data.json", json.dumps(describe_data(config, trainer.dataloader.mixture), indent=2))
    try:
        trainer.train()
    finally:
        trainer.close()
    if dist.get_rank() == 0:
        kinds = ["validation"] * config.validation.enable + [evaluation.name for evaluation in evaluations]
        _write_done(folder, config, trainer.step, time.monotonic() - start, kinds)
    dist.destroy_process_group()


def _default_environment() -> None:
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


def _remove_torn_checkpoints(folder: Path) -> None:
    """Removes what a kill left of an unfinished checkpoint, and the folder itself if nothing complete is in it.

    torchtitan loads `checkpoint.initial_load_path` only where the folder does not exist: a torn first checkpoint would
    make the restarted run begin, without a word, from random weights.
    """
    for step in folder.glob("step-*"):
        if not (step / ".metadata").is_file():
            logger.warning(f"removing {step}, which is incomplete")
            shutil.rmtree(step)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def _write_done(folder: Path, config: JobConfig, step: int, seconds: float, kinds: Sequence[str]) -> None:
    last = {kind: read_metrics(folder, kind)[-1:] for kind in kinds}
    checkpoint = latest_checkpoint(folder / config.checkpoint.folder) if config.checkpoint.enable else None
    record = {
        "steps": step,
        "configured_steps": config.training.steps,  # more than `steps` where data.on_max_epochs stopped the run
        "wall_seconds_of_last_start": round(seconds, 1),
        "checkpoint": None if checkpoint is None else str(checkpoint),
        "validation": None,
        **{kind: records[0] for kind, records in last.items() if records},
    }
    write_atomically(folder / "DONE", json.dumps(record, indent=2))

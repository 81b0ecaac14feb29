"""The `train` verb: checks, run folder, torchtitan's loop, DONE.

    torchrun --nproc_per_node=8 -m mobilellm_pro train train_configs/mobilellm_pro_1b/1_language.toml

Without torchrun the same command trains in one process. Started again, it goes on from the newest complete checkpoint.
"""

import json
import os
import shutil
import socket
import time
import tomllib
from pathlib import Path

import torch.distributed as dist
from torchtitan.tools.logging import init_logger, logger

from mobilellm_pro.config import JobError, resolved_toml
from mobilellm_pro.config.job_config import JobConfig
from mobilellm_pro.model.checkpoint import latest_checkpoint
from mobilellm_pro.training.distill_trainer import DistillTrainer
from mobilellm_pro.training.preflight import problems
from mobilellm_pro.training.run_folder import describe_data, describe_environment, read_metrics, write_atomically
from mobilellm_pro.training.train_spec import register


def train(config: JobConfig, config_path: str) -> None:
    """Train the configured model: a student from its teacher (kl), from labels (ce), or a teacher (model llama4_text).

    Writes checkpoints, TensorBoard events, metrics.jsonl, the resolved configuration and, last, DONE to
    `job.dump_folder`. A run that is DONE is left alone.

    Raises:
        JobError: listing everything that is wrong with the configuration, the data or the teacher.
    """
    _default_environment()
    world_size = int(os.environ["WORLD_SIZE"])
    folder = Path(config.job.dump_folder)
    init_logger()
    if _finished(folder, config):
        logger.info(f"{folder} is DONE; raise training.steps to go on with it")
        return
    found = problems(config, world_size)
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
    trainer = DistillTrainer(config)
    if dist.get_rank() == 0:
        write_atomically(folder / "data.json", json.dumps(describe_data(config, trainer.dataloader.mixture), indent=2))
    try:
        trainer.train()
    finally:
        trainer.close()
    if dist.get_rank() == 0:
        _write_done(folder, config, trainer.step, time.monotonic() - start)
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


def _finished(folder: Path, config: JobConfig) -> bool:
    """Whether this very job has been run: same configuration, as many steps.

    Raises:
        JobError: the folder holds a finished run of another configuration; the keys that differ are named.
    """
    done = folder / "DONE"
    if not done.is_file() or json.loads(done.read_text())["configured_steps"] < config.training.steps:
        return False
    before, now = (tomllib.loads(text) for text in ((folder / "config.toml").read_text(), resolved_toml(config)))
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


def _write_done(folder: Path, config: JobConfig, step: int, seconds: float) -> None:
    validations = read_metrics(folder, "validation") if config.validation.enable else []
    checkpoint = latest_checkpoint(folder / config.checkpoint.folder) if config.checkpoint.enable else None
    record = {
        "steps": step,
        "configured_steps": config.training.steps,  # more than `steps` where data.on_max_epochs stopped the run
        "wall_seconds_of_last_start": round(seconds, 1),
        "checkpoint": None if checkpoint is None else str(checkpoint),
        "validation": validations[-1] if validations else None,
    }
    write_atomically(folder / "DONE", json.dumps(record, indent=2))

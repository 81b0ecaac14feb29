"""torchtitan's checkpoints, made safe against full disks, failures in the background, and kills.

A checkpoint is complete when it has its metadata, which is written last and by rename. Nothing here touches a complete
one before a newer one is complete.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.api import CheckpointException
from torchtitan.components.checkpoint import MODEL, AsyncMode, CheckpointManager
from torchtitan.tools.logging import logger
from torchtitan.train import Trainer

from mobilellm_pro.config.job_config import JobConfig
from mobilellm_pro.model.checkpoint import latest_checkpoint
from mobilellm_pro.model.quantized_modules import begin_ranges, is_range
from mobilellm_pro.training.disk_room import checkpoint_bytes, free_bytes, in_words

_METADATA = ".metadata"


class CheckpointFailed(RuntimeError):
    """A checkpoint could not be written; the one before it is as it was."""


class RunCheckpoints(CheckpointManager):
    """The checkpoints of one run, on every rank."""

    def __init__(self, *, size_bytes: int, **settings: Any) -> None:
        """
        Args:
            size_bytes: of a checkpoint, for messages.
            settings: torchtitan's.
        """
        super().__init__(**settings)
        self._size_bytes = size_bytes
        self._latest_save = 0

    def save(self, curr_step: int, last_step: bool = False) -> None:
        """torchtitan's, on all ranks.

        Raises:
            CheckpointFailed: on all ranks, of this checkpoint or of one that was being written in the background.
        """
        if not self._should_save(curr_step, last_step):
            return
        self.wait()
        self._latest_save = curr_step
        with self._failure_is_named():
            super().save(curr_step, last_step)
        if last_step:  # torchtitan returns before it
            self._purge_stale_checkpoints()

    def dcp_load(self, state_dict: dict[str, Any], checkpoint_id: str, from_hf: bool, from_quantized: bool) -> None:
        """torchtitan's; learned ranges that a checkpoint in full precision lacks begin at those of its weights."""
        lacking = {name for name in state_dict if is_range(name)}
        if lacking and not from_hf:
            lacking -= FileSystemReader(checkpoint_id).read_metadata().state_dict_metadata.keys()
        known = {name: value for name, value in state_dict.items() if name not in lacking}
        super().dcp_load(known, checkpoint_id, from_hf, from_quantized)
        if lacking:
            for model in self.states[MODEL].model:
                begin_ranges(model)

    @torch.no_grad()
    def save_to_go_on(self, step: int) -> bool:
        """Has everything of a step on disk on return, so that the run can go on; False where checkpoints are off.

        Args:
            step: that has just been done; `save` has been called for it.

        Raises:
            CheckpointFailed: on all ranks.
        """
        if not self.enable or self.load_only:
            return False
        self.wait()
        if not self._should_save(step):  # else it is there
            self._latest_save = step
            logger.info(f"Saving a full checkpoint, step {step}.")
            with self._failure_is_named():
                self.dcp_save(self._flattened_model_states_sd(), self._create_checkpoint_id(step), AsyncMode.DISABLED)
            self._purge_stale_checkpoints()
        return True

    def has_failed(self) -> bool:
        """Whether a save in the background has ended with an error on this rank; waits for nothing."""
        future = getattr(self, "save_future", None)
        return future is not None and future.done() and future.exception() is not None

    def wait(self) -> None:
        """Returns when nothing is being written in the background.

        Raises:
            CheckpointFailed: what was being written could not be; on all ranks.
        """
        if self.enable:
            with self._failure_is_named():
                self._async_wait()

    @contextmanager
    def _failure_is_named(self) -> Iterator[None]:
        """Makes what DCP raises, on all ranks and after all have ended their writing, one message with the cure."""
        try:
            yield
        except CheckpointException as error:
            torn = Path(self._create_checkpoint_id(self._latest_save))
            if dist.get_rank() == 0:
                _remove_if_torn(torn)
                _remove_if_empty(torn.parent)
            dist.barrier()  # all ranks say what is free then
            free, reasons = free_bytes(torn), [f"rank {rank}: {e[0]!r}" for rank, e in error.failures.items()]
            kept = latest_checkpoint(torn.parent)
            found = f"{torn}: the checkpoint could not be written ({'; '.join(reasons[:4])})"
            room = f"it takes {in_words(self._size_bytes)}, {in_words(free)} are free on that disk"
            cure = f"{'free space' if free < self._size_bytes else 'mend the cause'} and start again"
            rest = f"the run goes on from {kept}" if kept else "the run begins anew: nothing was saved before"
            raise CheckpointFailed(f"{found}; {room}. What was written of it is removed. {cure}; {rest}") from error

    def _purge_stale_checkpoints(self) -> None:
        """Removes all but the newest `keep_latest_k` complete checkpoints; one that is being written is no such.

        torchtitan's own counts that one too. The metadata goes first: what a kill leaves of the rest is seen as torn.
        """
        if self.keep_latest_k <= 0 or dist.get_rank() != 0:
            return
        complete = [path for path in Path(self.folder).glob("step-*") if (path / _METADATA).is_file()]
        complete.sort(key=lambda path: int(path.name.removeprefix("step-")))
        for path in complete[: -self.keep_latest_k]:
            (path / _METADATA).unlink()
            self.purge_queue.put(str(path))


def run_checkpoints(trainer: Trainer) -> RunCheckpoints:
    """Takes the place of the manager that torchtitan's trainer has made, out of the same parts."""
    trainer.checkpointer.close()
    config = trainer.job_config
    assert isinstance(config, JobConfig)
    return RunCheckpoints(
        size_bytes=checkpoint_bytes(config) if config.checkpoint.enable else 0,
        dataloader=trainer.dataloader,
        model_parts=trainer.model_parts,
        optimizers=trainer.optimizers,
        lr_schedulers=trainer.lr_schedulers,
        states={"train_state": trainer},
        checkpoint_config=config.checkpoint,
        sd_adapter=getattr(trainer.checkpointer, "sd_adapter", None),  # where checkpoints are enabled,
        base_folder=config.job.dump_folder,
    )


def remove_torn(folder: Path) -> None:
    """Removes what is left of unfinished checkpoints, and the folder itself if nothing complete is in it.

    torchtitan loads `checkpoint.initial_load_path` only where the folder does not exist: a torn first checkpoint would
    make the restarted run begin, without a word, from random weights.

    Args:
        folder: that of a run's checkpoints; need not exist.
    """
    for step in folder.glob("step-*"):
        _remove_if_torn(step)
    _remove_if_empty(folder)


def _remove_if_torn(step: Path) -> None:
    if step.is_dir() and not (step / _METADATA).is_file():
        logger.warning(f"removing {step}, which is incomplete")
        shutil.rmtree(step)


def _remove_if_empty(folder: Path) -> None:
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()

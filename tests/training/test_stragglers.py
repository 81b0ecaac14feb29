"""A rank that hangs: the others end and name it."""

import os
import time

import pytest

from tests.ranks import run_ranks
from tests.training.small_world import SmallWorld, train_job


def train_and_hang(job: str, folder: str, overrides: list[str], step: int) -> None:
    """A run whose last rank does not come to a step."""
    from mobilellm_pro.training.distill_trainer import DistillTrainer

    train_step = DistillTrainer.train_step

    def hanging_step(self: DistillTrainer, data: object) -> None:
        if self.step == step and os.environ["RANK"] == "1":
            time.sleep(60)
        train_step(self, data)

    DistillTrainer.train_step = hanging_step
    train_job(job, folder, overrides)


def test_a_rank_that_hangs_is_named_with_the_key(world: SmallWorld) -> None:
    """Also where a run goes on from a checkpoint: torchtitan would leave it with the long timeout of the start."""
    saving = ["--training.local_batch_size", "2", "--checkpoint.enable", "--checkpoint.no_last_save_model_only",
              "--lr_scheduler.total_steps", "9", "--comm.train_timeout_seconds", "2"]  # fmt: skip
    folder = world.run("stragglers", 2, *saving, "--training.steps", "2")
    overrides = [*saving, "--training.steps", "9"]
    with pytest.raises(AssertionError) as error:
        run_ranks(train_and_hang, 2, str(world.job), str(folder), overrides, 4)
    text = str(error.value)
    assert (
        "TimeoutError: ranks waited for each other longer than comm.train_timeout_seconds = 2: rank 1 did not" in text
    )

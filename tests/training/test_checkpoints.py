"""Checkpoints on a disk that is full, in the background, and of those only the latest few."""

import os
import queue
import resource
from pathlib import Path

import pytest

from mobilellm_pro.config import load
from mobilellm_pro.model.checkpoint import latest_checkpoint
from mobilellm_pro.training import disk_room
from mobilellm_pro.training.checkpoints import RunCheckpoints, remove_torn
from mobilellm_pro.training.preflight import problems
from mobilellm_pro.training.run_folder import read_metrics
from tests.ranks import run_ranks
from tests.training.small_world import SmallWorld, train_job
from tests.training.test_resume import assert_same_run
from tests.training.test_stop_request import RANKS, STEPS, undisturbed  # noqa: F401  a fixture

SAVING = ("--training.steps", str(STEPS), "--checkpoint.enable", "--checkpoint.interval", "2",
          "--checkpoint.keep_latest_k", "2", "--training.local_batch_size", "2")  # fmt: skip
LIMIT_BYTES = 100_000


def train_on_a_full_disk(job: str, folder: str, overrides: list[str], step: int) -> None:
    """A run in which the last rank cannot write more than the beginning of the checkpoint of a step."""
    save = RunCheckpoints.save

    def save_on_a_full_disk(self: RunCheckpoints, now: int, last_step: bool = False) -> None:
        if now == step and os.environ["RANK"] == str(RANKS - 1):
            resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT_BYTES, LIMIT_BYTES))
        save(self, now, last_step)

    RunCheckpoints.save = save_on_a_full_disk
    train_job(job, folder, overrides)


@pytest.mark.parametrize("mode", ["disabled", "async"])
def test_a_full_disk_keeps_the_checkpoint_before(
    world: SmallWorld,
    undisturbed: Path,  # noqa: F811
    mode: str,
) -> None:
    name, overrides = f"disk/{mode}", [*SAVING, "--checkpoint.async_mode", mode]
    folder = world.folder / name
    with pytest.raises(AssertionError) as error:
        run_ranks(train_on_a_full_disk, RANKS, str(world.job), str(folder), overrides, 4)
    text = str(error.value)
    assert f"CheckpointFailed: {folder}/checkpoint/step-4: the checkpoint could not be written (rank 1: " in text
    assert f"mend the cause and start again; the run goes on from {folder}/checkpoint/step-2" in text
    assert [path.name for path in (folder / "checkpoint").iterdir()] == ["step-2"]
    assert len(read_metrics(folder, "train")) <= 6  # a failure in the background shows before the next save is over
    if mode == "disabled":
        return  # how a run goes on from a checkpoint is the same
    world.run(name, RANKS, *overrides)
    assert_same_run(folder, undisturbed)
    assert sorted(path.name for path in (folder / "checkpoint").iterdir()) == ["step-6", "step-8"]


def test_only_complete_checkpoints_are_replaced_by_complete_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two are kept of the complete ones, whatever else is there; of those that go, the metadata goes at once."""
    for step in (2, 4, 6, 8, 10):
        (tmp_path / f"step-{step}").mkdir()
        (tmp_path / f"step-{step}/data").touch()
    for step in (2, 4, 6, 8):
        (tmp_path / f"step-{step}/.metadata").touch()
    checkpoints = RunCheckpoints.__new__(RunCheckpoints)
    checkpoints.enable, checkpoints.folder, checkpoints.keep_latest_k = False, str(tmp_path), 2
    checkpoints.purge_queue = queue.Queue()
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 0)
    checkpoints._purge_stale_checkpoints()
    assert [Path(checkpoints.purge_queue.get_nowait()).name for _ in range(2)] == ["step-2", "step-4"]
    assert checkpoints.purge_queue.empty() and latest_checkpoint(tmp_path) == tmp_path / "step-8"
    remove_torn(tmp_path)  # a kill before the files were removed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-6", "step-8"]


def test_room_for_one_checkpoint_is_looked_for(world: SmallWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load(world.job, [*SAVING[2:], "--training.steps", "4"])
    weights = sum(parameter.numel() for parameter in disk_room.model_on_meta(config).parameters())
    assert disk_room.checkpoint_bytes(config) == 3 * 4 * weights
    last_only = load(world.job, ["--checkpoint.enable", "--checkpoint.interval", "500"])
    assert disk_room.checkpoint_bytes(last_only) == 4 * weights
    assert problems(config, RANKS) == []
    monkeypatch.setattr(disk_room, "free_bytes", lambda folder: 12 * weights - 1)
    (problem,) = problems(config, RANKS)
    assert "checkpoint: a checkpoint of this run takes" in problem and "free space" in problem
    assert problems(last_only, 1) == []


def test_the_size_is_that_on_disk(world: SmallWorld, undisturbed: Path) -> None:  # noqa: F811
    (folder,) = [path for path in (undisturbed / "checkpoint").iterdir() if path.name == "step-4"]
    size = sum(path.stat().st_size for path in folder.iterdir())
    expected = disk_room.checkpoint_bytes(load(undisturbed / "config.toml"))
    assert expected <= size < 1.2 * expected  # names and shapes are a lot, of a toy

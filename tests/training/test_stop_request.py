"""A run that is asked to stop ends after its step, and goes on to the bit as if nobody had asked."""

import os
import signal
import time
from pathlib import Path

import pytest

from mobilellm_pro.model.checkpoint import latest_checkpoint
from mobilellm_pro.training.run_folder import read_metrics
from mobilellm_pro.training.stop_request import STOP, StopRequest, begin_of_this_run, in_words
from tests.ranks import run_ranks
from tests.training.small_world import SmallWorld, train_job
from tests.training.test_resume import STEPS, assert_same_run

RANKS = 2
SAVING = ("--training.steps", str(STEPS), "--checkpoint.enable", "--checkpoint.interval", "4",
          "--checkpoint.keep_latest_k", "0", "--training.local_batch_size", "2")  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(world: SmallWorld) -> Path:
    return world.run("stop/undisturbed", RANKS, *SAVING)


def train_and_ask(job: str, folder: str, overrides: list[str], step: int, number: int | None) -> None:
    """A run that somebody asks to stop when it has logged a step: by the file, or by a signal to the last rank."""
    from mobilellm_pro.training.metrics import DistillMetrics

    log, rank = DistillMetrics.log, int(os.environ["RANK"])

    def asking_log(self: DistillMetrics, now: int, *args: object, **kwargs: object) -> None:
        log(self, now, *args, **kwargs)
        if now == step and number is None and rank == 0:
            Path(folder, STOP).touch()
        if now == step and number is not None and rank == RANKS - 1:
            os.kill(os.getpid(), number)

    DistillMetrics.log = asking_log
    train_job(job, folder, overrides)


def test_stops_after_the_step_and_goes_on(world: SmallWorld, undisturbed: Path) -> None:
    """Twice, off the checkpoints' interval, in a run whose last checkpoint is to hold the model only."""
    name = "stop/twice"
    folder, overrides = world.folder / name, [*SAVING, "--checkpoint.async_mode", "async"]
    for words, step, number in ((list(SAVING), 2, None), (overrides, 5, signal.SIGUSR1)):
        run_ranks(train_and_ask, RANKS, str(world.job), str(folder), words, step, number)
        assert latest_checkpoint(folder / "checkpoint") == folder / f"checkpoint/step-{step + 1}"
        assert [record["step"] for record in read_metrics(folder, "train")] == list(range(1, step + 2))
        assert not (folder / "DONE").exists() and not (folder / STOP).exists()
    world.run(name, RANKS, *overrides)
    assert_same_run(folder, undisturbed)


def test_a_signal_and_the_file_are_requests(tmp_path: Path) -> None:
    request, other = StopRequest(tmp_path, looks_at_file=True), StopRequest(tmp_path, looks_at_file=False)
    before = signal.getsignal(signal.SIGTERM)
    assert request.look() == 0
    (tmp_path / STOP).touch()
    assert in_words(request.look()) == "STOP asks" and other.look() == 0
    with request.listening():
        os.kill(os.getpid(), signal.SIGTERM)
        assert in_words(request.look()) == "a signal asks"
    assert signal.getsignal(signal.SIGTERM) == before


def test_only_a_file_from_before_the_start_is_stale(tmp_path: Path) -> None:
    assert time.time() - 3600 < begin_of_this_run() < time.time()
    request, file = StopRequest(tmp_path, looks_at_file=True), tmp_path / STOP
    file.touch()
    request.remove(older_than=begin_of_this_run())
    assert request.look()
    os.utime(file, (1.0, 1.0))
    request.remove(older_than=begin_of_this_run())
    assert not file.exists()
    request.remove()  # nothing to remove is no error

"""A run that is stopped at any moment and started again gives, to the bit, what it would have given undisturbed."""

import os
import signal
from pathlib import Path

import pytest
import torch

from mobilellm_pro.model.checkpoint import latest_checkpoint, load_model
from mobilellm_pro.training.run_folder import read_metrics
from tests.ranks import Ranks
from tests.training.small_world import SmallWorld, losses, train_job, wait_for_step

STEPS = 8
CHECKPOINTS = ("--training.steps", str(STEPS), "--checkpoint.enable", "--checkpoint.interval", "2",
               "--checkpoint.keep_latest_k", "0", "--checkpoint.no_last_save_model_only")  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(world: SmallWorld) -> Path:
    return world.run("resume/undisturbed", 1, *CHECKPOINTS)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_model(folder).model.state_dict()


def assert_same_run(folder: Path, undisturbed: Path) -> None:
    assert losses(folder) == losses(undisturbed) and len(losses(folder)) == STEPS
    assert losses(folder, "grad_norm") == losses(undisturbed, "grad_norm")
    expected = weights(undisturbed)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(folder).items())
    assert (folder / "DONE").is_file()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT], ids=lambda n: n.name)
def test_stopped_by_a_signal(world: SmallWorld, undisturbed: Path, number: signal.Signals) -> None:
    folder = world.folder / f"resume/{number.name}"
    ranks = Ranks(train_job, 1, str(world.job), str(folder), list(CHECKPOINTS))
    wait_for_step(folder, 3)
    os.kill(ranks.processes[0].pid, number)
    ranks.processes[0].join(timeout=30)
    ranks.stop()
    assert not (folder / "DONE").exists()
    complete = latest_checkpoint(folder / "checkpoint")
    assert complete is not None and weights(folder)  # what is there is loadable
    world.run(f"resume/{number.name}", 1, *CHECKPOINTS)
    assert_same_run(folder, undisturbed)


def die_while_writing(job: str, folder: str, overrides: list[str], save: int) -> None:
    """Dies in the `save`-th checkpoint, when its tensors are on disk and its metadata is not."""
    from torch.distributed.checkpoint.filesystem import FileSystemWriter

    saves, finish = [], FileSystemWriter.finish

    def killing_finish(self: FileSystemWriter, *args: object, **kwargs: object) -> None:
        saves.append(1)
        if len(saves) == save:
            os.kill(os.getpid(), signal.SIGKILL)
        finish(self, *args, **kwargs)

    FileSystemWriter.finish = killing_finish
    train_job(job, folder, overrides)


@pytest.mark.parametrize("save", [1, 3])
def test_killed_while_a_checkpoint_is_written(world: SmallWorld, undisturbed: Path, save: int) -> None:
    folder = world.folder / f"resume/torn{save}"
    ranks = Ranks(die_while_writing, 1, str(world.job), str(folder), list(CHECKPOINTS), save)
    ranks.processes[0].join(timeout=90)
    ranks.stop()
    torn = folder / f"checkpoint/step-{2 * save}"
    assert torn.is_dir() and not (torn / ".metadata").exists()
    expected = None if save == 1 else folder / f"checkpoint/step-{2 * (save - 1)}"
    assert latest_checkpoint(folder / "checkpoint") == expected
    world.run(f"resume/torn{save}", 1, *CHECKPOINTS)
    assert_same_run(folder, undisturbed)


def test_a_torn_first_checkpoint_does_not_hide_the_initial_weights(world: SmallWorld, undisturbed: Path) -> None:
    """torchtitan looks at the initial path only where no checkpoint folder is."""
    initial = ("--checkpoint.initial_load_path", str(undisturbed / "checkpoint/step-8"))
    expected = losses(world.run("resume/initial", 1, *CHECKPOINTS, *initial))
    folder = world.folder / "resume/initial_torn"
    ranks = Ranks(die_while_writing, 1, str(world.job), str(folder), [*CHECKPOINTS, *initial], 1)
    ranks.processes[0].join(timeout=90)
    ranks.stop()
    assert (folder / "checkpoint/step-2").is_dir()
    assert losses(world.run("resume/initial_torn", 1, *CHECKPOINTS, *initial)) == expected
    assert expected[0] < losses(undisturbed)[0]


def test_asynchronous_checkpoints_are_the_same(world: SmallWorld, undisturbed: Path) -> None:
    folder = world.run("resume/async", 1, *CHECKPOINTS, "--checkpoint.async_mode", "async")
    assert_same_run(folder, undisturbed)


@pytest.mark.parametrize(
    ("ranks", "layout"),
    [
        (4, ("--training.local_batch_size", "2", "--parallelism.tensor_parallel_degree", "2")),
        (4, ("--training.local_batch_size", "1")),
        (1, ()),
    ],
    ids=["FSDP2xTP2", "FSDP4", "one"],
)
def test_resumed_on_another_layout(world: SmallWorld, undisturbed: Path, ranks: int, layout: tuple[str, ...]) -> None:
    """Half of the steps on two ranks, the rest on others: the same losses and the same rows."""
    name = f"resume/{ranks}{len(layout)}"
    half = ("--training.steps", "4", "--lr_scheduler.total_steps", str(STEPS), "--training.local_batch_size", "2")
    world.run(name, 2, *CHECKPOINTS[2:], *half)
    folder = world.run(name, ranks, *CHECKPOINTS, "--lr_scheduler.total_steps", str(STEPS), *layout)
    assert losses(folder) == pytest.approx(losses(undisturbed), rel=2e-5)
    assert losses(folder, "tokens/a") == losses(undisturbed, "tokens/a")


def test_a_finished_run_is_left_alone_and_can_be_extended(world: SmallWorld) -> None:
    schedule = (*CHECKPOINTS[2:], "--lr_scheduler.total_steps", str(STEPS))
    folder = world.run("resume/extended", 1, *schedule, "--training.steps", "4")
    before = (folder / "metrics.jsonl").stat().st_mtime_ns
    world.run("resume/extended", 1, *schedule, "--training.steps", "4")
    assert (folder / "metrics.jsonl").stat().st_mtime_ns == before
    with pytest.raises(AssertionError, match=r"other values of optimizer\.lr is DONE here; choose another"):
        world.run("resume/extended", 1, *schedule, "--training.steps", "4", "--optimizer.lr", "1e-5")
    world.run("resume/extended", 1, *schedule, "--training.steps", "6")
    assert [record["step"] for record in read_metrics(folder, "train")] == [1, 2, 3, 4, 5, 6]


def test_other_data_cannot_be_resumed(world: SmallWorld) -> None:
    """The state is one number; in another mixture it would mean other rows."""
    schedule = (*CHECKPOINTS[2:], "--lr_scheduler.total_steps", str(STEPS))
    world.run("resume/data", 1, *schedule, "--training.steps", "2")
    with pytest.raises(AssertionError, match="the checkpoint's data were seed 3"):
        world.run("resume/data", 1, *schedule, "--training.steps", "4", "--data.seed", "4")


def test_a_run_saved_as_model_only_cannot_go_on(world: SmallWorld) -> None:
    saving = ("--checkpoint.enable", "--lr_scheduler.total_steps", str(STEPS))
    world.run("resume/model_only", 1, *saving, "--training.steps", "2")
    with pytest.raises(AssertionError, match="holds the model only, so the run cannot go on from it"):
        world.run("resume/model_only", 1, *saving, "--training.steps", "4")


def test_teacher_is_in_no_checkpoint(undisturbed: Path) -> None:
    from torch.distributed.checkpoint import FileSystemReader

    checkpoint = latest_checkpoint(undisturbed / "checkpoint")
    assert checkpoint is not None
    names = FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    assert not [name for name in names if "expert" in name or "router" in name or "lm_head" in name]
    assert "embed_tokens.weight" in names and "optimizer.state.embed_tokens.weight.exp_avg" in names

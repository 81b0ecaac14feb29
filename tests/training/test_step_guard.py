"""A step that is not finite: said with all that is needed to find its cause, or left out on all ranks."""

import json
import math

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from mobilellm_pro.config import load
from mobilellm_pro.training.loader import open_mixture
from mobilellm_pro.training.run_folder import read_metrics
from tests.ranks import run_ranks
from tests.training.small_world import SmallWorld, losses, train_job

RANKS, MICRO_BATCHES = 2, 2
LAYOUT = ("--training.local_batch_size", "1")
"""Two ranks, two micro-batches of one row."""


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def sequence(step: int, rank: int, micro_batch: int) -> int:
    """Number of the row, in the mixture, that a rank reads in a micro-batch (from 0) of a step (from 1)."""
    return ((step - 1) * MICRO_BATCHES + micro_batch) * RANKS + rank


def train_with_a_nan(job: str, folder: str, overrides: list[str], rows: list[int]) -> list[tuple[bool, bool]]:
    """A run whose teacher gives a NaN on some rows of the mixture; whether (weights, moments) changed, by step."""
    from mobilellm_pro.training.distill_trainer import DistillTrainer

    hidden, train_step, changes = DistillTrainer._teacher_hidden, DistillTrainer.train_step, []

    def spoilt_hidden(self: DistillTrainer, teacher: object, input_dict: dict[str, Tensor], *rest: object) -> Tensor:
        found = hidden(self, teacher, input_dict, *rest)
        place = (int(input_dict["corpus"][0]), int(input_dict["row"][0]))
        if place in [self.dataloader.mixture.place(row) for row in rows]:
            found = found.clone()
            found[0, 3, 2] = torch.nan
        return found

    def state(self: DistillTrainer) -> tuple[float, float]:
        (optimizer,) = self.optimizers
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        moments = [optimizer.state[p]["exp_avg"] for p in parameters if p in optimizer.state]
        return tuple(sum(float(local(t).double().abs().sum()) for t in ts) for ts in (parameters, moments))

    def observed_step(self: DistillTrainer, data: object) -> None:
        before = state(self)
        train_step(self, data)
        after = state(self)
        changes.append((before[0] != after[0], before[1] != after[1]))

    DistillTrainer._teacher_hidden, DistillTrainer.train_step = spoilt_hidden, observed_step
    train_job(job, folder, overrides)
    return changes


def rows_of(world: SmallWorld, number: int) -> str:
    """How a message names a row of the mixture."""
    config = load(world.job, [])
    mixture = open_mixture(config.data, "train", config.training.seq_len)
    corpus, row = mixture.place(number)
    documents = list(dict.fromkeys(mixture.streams[corpus].pieces(row).documents))
    return (
        f"row {row} of {mixture.names[corpus]} (document{'s' * (len(documents) > 1)} {', '.join(map(str, documents))})"
    )


def test_stop_names_everything(world: SmallWorld) -> None:
    bad = sequence(2, 1, 1)
    folder = world.folder / "guard/stop"
    with pytest.raises(AssertionError) as error:
        run_ranks(train_with_a_nan, RANKS, str(world.job), str(folder), list(LAYOUT), [bad])
    where = "loss is nan at step 2 on rank 1, micro-batch 2 of 2"
    what = "teacher_hidden [1, 64, 128]: 1 NaN, 0 infinite, first at [0, 3, 2]"
    assert f"FloatingPointError: {where}; {what}; its rows: {rows_of(world, bad)}\n" in str(error.value)
    assert [record["step"] for record in read_metrics(folder, "train")] == [1] and not (folder / "DONE").exists()


def test_skip_drops_the_step_on_all_ranks(world: SmallWorld) -> None:
    bad = sequence(2, 1, 1)
    folder, overrides = world.folder / "guard/skip", [*LAYOUT, "--guard.non_finite", "skip", "--training.steps", "4"]
    for changes in run_ranks(train_with_a_nan, RANKS, str(world.job), str(folder), overrides, [bad]):
        assert changes == [(True, True), (False, False), (True, True), (True, True)]
    records = read_metrics(folder, "train")
    assert [(record["step"], record["skipped_steps"]) for record in records] == [(1, 0), (3, 1), (4, 1)]
    assert all(math.isfinite(record[key]) for record in records for key in ("loss", "grad_norm", "distill/kl"))
    # The schedule knows nothing of it: a step of warm-up, then three of a cosine.
    assert losses(folder, "lr")[1:] == pytest.approx([3e-3 * (1 + math.cos(math.pi * k / 3)) / 2 for k in (1, 2)])
    (skipped,) = read_metrics(folder, "skipped")
    assert skipped["step"] == 2 and "on rank 1, micro-batch 2 of 2; its rows" in skipped["report"]
    assert json.loads((folder / "DONE").read_text())["skipped_steps"] == 1


def test_too_many_in_a_row_stop_the_run(world: SmallWorld) -> None:
    overrides = ["--guard.non_finite", "skip", "--guard.max_skipped_steps", "2", "--training.steps", "9"]
    folder, spoilt = world.folder / "guard/many", [4 * (step - 1) for step in (1, 3, 4, 5, 6)]
    with pytest.raises(AssertionError, match=r"3 steps in a row, more than guard\.max_skipped_steps = 2"):
        run_ranks(train_with_a_nan, 1, str(world.job), str(folder), overrides, spoilt)
    assert [record["step"] for record in read_metrics(folder, "skipped")] == [1, 3, 4]
    assert [record["step"] for record in read_metrics(folder, "train")] == [2]


class Overflow(torch.autograd.Function):
    """Gives on what it gets, and infinite gradients."""

    @staticmethod
    def forward(context: object, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(context: object, gradient: Tensor) -> Tensor:
        return gradient * torch.inf


def train_with_an_overflow(job: str, folder: str, overrides: list[str]) -> None:
    """A run whose second step has finite losses and, from its second micro-batch on rank 0, infinite gradients."""
    from mobilellm_pro.training.distill_trainer import DistillTrainer

    terms = DistillTrainer.distillation_terms

    def overflowing(self: DistillTrainer, input_dict: dict[str, Tensor], *args: object, **kwargs: object) -> object:
        found, labels = terms(self, input_dict, *args, **kwargs)
        place = (int(input_dict["corpus"][0]), int(input_dict["row"][0]))
        if place == self.dataloader.mixture.place(sequence(2, 0, 1)):
            found = found._replace(loss=Overflow.apply(found.loss))
        return found, labels

    DistillTrainer.distillation_terms = overflowing
    train_job(job, folder, overrides)


def test_gradients_without_a_bad_loss(world: SmallWorld) -> None:
    folder = world.folder / "guard/gradients"
    with pytest.raises(AssertionError) as error:
        run_ranks(train_with_an_overflow, RANKS, str(world.job), str(folder), list(LAYOUT))
    text = str(error.value)
    assert "FloatingPointError: gradient norm is nan, every loss is finite, at step 2 on rank" in text
    assert "micro-batch 2 of 2; it gives gradients that are not finite to " in text and "micro-batch 1 of 2" not in text


def test_held_out_losses_are_watched_too(world: SmallWorld) -> None:
    extra = ["--validation.enable", "--validation.steps", "1", "--validation.seq_len", "64", "--validation.freq", "1",
             "--validation.local_batch_size", "2"]  # fmt: skip
    folder = world.folder / "guard/valid"
    with pytest.raises(AssertionError, match="on held-out documents after step 1: bits_per_byte is nan, ce is nan"):
        run_ranks(validate_badly, 1, str(world.job), str(folder), extra)


def validate_badly(job: str, folder: str, overrides: list[str]) -> None:
    """A run whose student is lost after its first step."""
    from mobilellm_pro.training.validation import HeldOutValidator

    batch_sums = HeldOutValidator._batch_sums
    HeldOutValidator._batch_sums = lambda self, *args: (
        batch_sums(self, *args) + torch.tensor([0.0, torch.nan] + [0.0] * 4)
    )
    train_job(job, folder, overrides)

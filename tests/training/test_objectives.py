"""What is minimised, with what weights, and what of it is logged."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torchtitan.config import Optimizer

from mobilellm_pro.training.run_folder import read_metrics
from mobilellm_pro.training.step_ranges import STEP_RANGES
from mobilellm_pro.training.train_spec import build_optimizers
from tests.training.small_world import SmallWorld, losses


def test_objectives_are_one_loss_with_weights(world: SmallWorld) -> None:
    """Before the first step all three objectives see the same logits, so their first losses are one linear family."""
    first = {}
    for name, extra in {
        "kl": (),
        "ce": ("--distill.objective", "ce"),
        "weighted": ("--distill.objective", "weighted", "--distill.kl_weight", "0.25", "--distill.ce_weight", "0.5"),
    }.items():
        folder = world.run(f"objectives/{name}", 1, "--training.steps", "1", *extra)
        first[name] = read_metrics(folder, "train")[0]
    assert first["kl"]["loss"] == pytest.approx(first["kl"]["distill/kl"], rel=1e-6)
    assert first["ce"]["loss"] == pytest.approx(first["kl"]["distill/ce"], rel=1e-6)
    expected = 0.25 * first["kl"]["distill/kl"] + 0.5 * first["kl"]["distill/ce"]
    assert first["weighted"]["loss"] == pytest.approx(expected, rel=1e-6)
    assert "distill/kl" not in first["ce"] and "distill/teacher_ce" not in first["ce"]


def test_kl_counts_no_teacher_entropy(world: SmallWorld) -> None:
    """KL = cross entropy to the teacher's distribution minus the teacher's entropy, so it is far below both."""
    record = read_metrics(world.run("objectives/entropy", 1, "--training.steps", "1"), "train")[0]
    assert 0 < record["distill/kl"] < 1 < record["distill/teacher_entropy"] < math.log(4096)


def test_distillation_brings_the_student_nearer_to_its_teacher(world: SmallWorld) -> None:
    """Even to a random one, which has little to teach beyond its favourite tokens."""
    folder = world.run("objectives/learns", 1, "--training.steps", "40", "--optimizer.lr", "1e-2")
    kl = losses(folder, "distill/kl")
    assert kl[-1] < 0.95 * kl[0]


def test_compute_saving_switches_change_no_number(world: SmallWorld) -> None:
    plain = losses(world.run("objectives/plain", 1))
    for name, extra in {
        "full": ("--activation_checkpoint.mode", "full"),
        "op": ("--activation_checkpoint.mode", "selective", "--activation_checkpoint.selective_ac_option", "op"),
        "chunks": ("--distill.chunk_tokens", "7"),
        "workers": ("--training.dataloader.num_workers", "2"),
    }.items():
        assert losses(world.run(f"objectives/{name}", 1, *extra)) == pytest.approx(plain, rel=1e-6), name


def test_a_profile_has_the_parts_of_a_step(world: SmallWorld) -> None:
    profiled = ("--profiling.enable_profiling", "--profiling.profile_freq", "4", "--training.steps", "4")
    folder = world.run("objectives/profiled", 1, *profiled)
    (trace,) = (folder / "profile_traces").rglob("*_trace.json")
    names = {event.get("name") for event in json.loads(trace.read_text())["traceEvents"]}
    assert names.issuperset(STEP_RANGES)


@pytest.mark.slow
def test_compiled_layers_change_no_number(world: SmallWorld) -> None:
    """Whole layers without a graph break: `fullgraph` makes one an error."""
    plain = losses(world.run("objectives/eager", 1))
    compiled = world.run("objectives/compiled", 1, "--compile.enable", "--compile.components", "model")
    assert losses(compiled) == pytest.approx(plain, rel=1e-5)


@pytest.mark.parametrize("ranks", [1, 2])
def test_bf16_is_near_fp32(world: SmallWorld, ranks: int) -> None:
    batch = ("--training.local_batch_size", str(4 // ranks))
    plain = losses(world.run(f"objectives/fp32_{ranks}", ranks, *batch))
    half = losses(world.run(f"objectives/bf16_{ranks}", ranks, *batch, "--training.mixed_precision_param", "bfloat16"))
    assert half == pytest.approx(plain, rel=0.03) and half != plain


def test_masks_and_positions_are_switches(world: SmallWorld) -> None:
    """Each of the four keys changes what the models see."""
    default = read_metrics(world.run("objectives/masks", 1, "--training.steps", "1"), "train")[0]
    for key, value, moved in (
        ("student_mask", "causal", "distill/ce"),
        ("teacher_mask", "causal", "distill/teacher_ce"),
        ("positions", "reset", "distill/teacher_ce"),
        ("window", "4", "distill/ce"),
    ):
        folder = world.run(f"objectives/{key}", 1, "--training.steps", "1", f"--attention.{key}", value)
        assert read_metrics(folder, "train")[0][moved] != default[moved], key


def test_weight_decay_is_not_on_norms() -> None:
    model = nn.Sequential(nn.Embedding(8, 4), nn.RMSNorm(4), nn.Linear(4, 4, bias=False))
    optimizer = build_optimizers([model], Optimizer(lr=0.1, weight_decay=0.5, implementation="for-loop"), None)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer.step()
    embedding, norm, linear = model.parameters()
    assert torch.equal(norm, before[1])
    torch.testing.assert_close(embedding, before[0] * 0.95)
    torch.testing.assert_close(linear, before[2] * 0.95)


@pytest.mark.parametrize("decay", ["cosine", "linear"])
def test_schedules_end_at_zero(world: SmallWorld, decay: str) -> None:
    """Warm-up in two steps, then 8 decaying ones: the step after the last would have rate 0."""
    extra = ("--training.steps", "10", "--lr_scheduler.warmup_steps", "2", "--lr_scheduler.decay_type", decay)
    rates = losses(world.run(f"objectives/{decay}", 1, *extra, "--distill.objective", "ce"), "lr")
    left = [1 - step / 8 for step in range(1, 8)] if decay == "linear" else [
        0.5 * (1 + math.cos(math.pi * step / 8)) for step in range(1, 8)
    ]  # fmt: skip
    assert rates[-7:] == pytest.approx([3e-3 * share for share in left], rel=1e-6), rates


def test_the_first_step_of_every_start_shows_the_teacher(world: SmallWorld) -> None:
    saving = ("--metrics.log_freq", "100", "--checkpoint.enable", "--checkpoint.no_last_save_model_only",
              "--lr_scheduler.total_steps", "5")  # fmt: skip
    for start, steps in enumerate(("3", "5")):
        folder = world.run("objectives/first_step", 1, *saving, "--training.steps", steps)
        records = read_metrics(folder, "train")
        assert [record["step"] for record in records] == [1, 4][: start + 1]
        assert all(record["distill/teacher_ce"] > 5 for record in records)


def test_a_nan_stops_the_run_with_its_name(world: SmallWorld, tmp_path: Path) -> None:
    teacher = tmp_path / "teacher"
    shutil.copytree(world.folder / "teacher", teacher)
    tensors = load_file(teacher / "model.safetensors")
    tensors["lm_head.weight"][7, 3] = float("nan")
    save_file(tensors, teacher / "model.safetensors")
    with pytest.raises(
        AssertionError, match=r"loss is nan at step 1 on rank 0, micro-batch 1 of 1; teacher_head \[4096, 128\]: 1 NaN"
    ):
        world.run("objectives/nan", 1, "--teacher.path", str(teacher))


def test_tensorboard_has_the_numbers(world: SmallWorld) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    extra = ("--metrics.enable_tensorboard", "--validation.enable", "--validation.steps", "1", "--validation.freq", "3",
             "--validation.seq_len", "64", "--validation.local_batch_size", "2")  # fmt: skip
    folder = world.run("objectives/tensorboard", 1, *extra)
    (events,) = (folder / "tb").iterdir()
    accumulator = EventAccumulator(str(events))
    accumulator.Reload()
    tags = set(accumulator.Tags()["scalars"])
    assert {"loss_metrics/global_avg_loss", "distill/kl", "distill/teacher_entropy", "tokens/a", "tokens/b"} <= tags
    assert {"validation_metrics/bits_per_byte", "validation_metrics/kl", "throughput(tps)"} <= tags
    assert [event.step for event in accumulator.Scalars("distill/kl")] == [1, 2, 3]

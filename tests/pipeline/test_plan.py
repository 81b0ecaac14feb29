"""What a plan predicts is what a real step takes: bytes held, kept, allocated and resident, operations, bytes moved."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torchtitan.tools.utils import device_type

from mobilellm_pro.__main__ import main
from mobilellm_pro.config import JobError, load
from mobilellm_pro.model.attention_mask import PackedRows
from mobilellm_pro.model.row_shard import Span
from mobilellm_pro.pipeline.plan import plan
from mobilellm_pro.pipeline.step_shape import step_shape
from mobilellm_pro.pipeline.step_time import Hardware, Links, step_time, transfer_seconds
from mobilellm_pro.pipeline.step_work import Transfer
from tests.pipeline.measured_step import (
    RETURN_FREED,
    load_step,
    measure_flops,
    measure_memory,
    measure_transfers,
    predict,
)

CONFIGS = Path(__file__).parents[2] / "train_configs"
PHASE_1 = CONFIGS / "mobilellm_pro_1b/1_language.toml"
BF16 = ("--training.mixed_precision_param=bfloat16", "--teacher.dtype=bfloat16")
SHORT_BF16 = (*BF16, "--training.seq_len=256")  # products of this type are slow on most CPUs
FULL = ("--activation_checkpoint.mode=full",)
BY_OPERATION = ("--activation_checkpoint.mode=selective",)
EVERY_SECOND = (*BY_OPERATION, "--activation_checkpoint.selective_ac_option=2")
on_cpu = pytest.mark.skipif(device_type != "cpu", reason="kernels of the CPU are counted")


@on_cpu
@pytest.mark.parametrize(
    ("flavor", "ranks", "overrides"),
    [
        ("debug", 1, ()),
        ("debug", 1, FULL),
        ("mid", 1, ("--training.dtype=bfloat16", *SHORT_BF16)),
        ("mid", 1, FULL),
        ("mid", 1, SHORT_BF16),
        ("mid", 8, SHORT_BF16),
        ("mid", 8, (*SHORT_BF16, *FULL)),
        ("mid", 8, BY_OPERATION),
        ("mid", 4, ("--parallelism.context_parallel_degree=2", *FULL)),
        ("mid", 4, ("--teacher.parallelism.tensor_parallel_degree=2",)),
        ("mid", 4, ("--teacher.parallelism.resident", *FULL)),
    ],
    ids=lambda value: " ".join(x.removeprefix("--") for x in value) if isinstance(value, tuple) else str(value),
)
def test_memory(flavor: str, ranks: int, overrides: tuple[str, ...]):
    config, teacher = load_step(flavor, *overrides)
    predicted, measured = predict(config, ranks, teacher).memory, measure_memory(config, ranks, teacher)
    held = predicted.held
    assert held["parameters"] == measured.parameters
    assert held["gradients"] == measured.gradients
    assert held["optimizer state"] == measured.optimizer_state
    assert held["teacher"] == measured.teacher
    assert predicted.peak == pytest.approx(max(measured.moments.values()), rel=0.1)


@on_cpu
@pytest.mark.parametrize("overrides", [(), FULL, EVERY_SECOND, ("--training.dtype=bfloat16", *BF16)])
def test_kept_activations(overrides: tuple[str, ...]):
    config, teacher = load_step("debug", *overrides)
    predicted, measured = predict(config, 1, teacher), measure_memory(config, 1, teacher)
    kept = predicted.memory.activations[predicted.shape.checkpointing]
    assert kept == pytest.approx(measured.saved_activations, rel=0.1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")
@pytest.mark.parametrize("overrides", [BF16, (*BF16, *FULL)])
def test_memory_on_a_gpu(overrides: tuple[str, ...]):
    config, teacher = load_step("mid", "--training.dtype=bfloat16", *overrides)
    predicted, measured = predict(config, 1, teacher).memory, measure_memory(config, 1, teacher)
    assert predicted.peak == pytest.approx(max(measured.moments.values()), rel=0.1)


@on_cpu
@pytest.mark.skipif(sys.platform != "linux", reason="resident size as Linux reports it")
def test_resident_memory():
    """In a process of its own, so that nobody else's memory is counted."""
    program = """
import mobilellm_pro.config
from tests.pipeline.measured_step import load_step, measure_resident, predict
config, teacher = load_step("large")
print(predict(config, 1, teacher).memory.peak, measure_resident(config, teacher))
"""
    environment = {**os.environ, **RETURN_FREED}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
    assert done.returncode == 0, done.stderr
    predicted, measured = map(int, done.stdout.splitlines()[-1].split())
    assert predicted == pytest.approx(measured, rel=0.1)


@on_cpu
@pytest.mark.parametrize(
    ("ranks", "overrides"),
    [
        (1, ()),
        (1, FULL),
        (1, BY_OPERATION),
        (1, EVERY_SECOND),
        (1, (*BF16, "--distill.fp32_logits")),
        (4, ("--teacher.parallelism.tensor_parallel_degree=2",)),
        (4, ("--parallelism.context_parallel_degree=2",)),
    ],
)
def test_operations(ranks: int, overrides: tuple[str, ...]):
    config, teacher = load_step("debug", *overrides)
    predicted, measured = predict(config, ranks, teacher).flops, measure_flops(config, ranks, teacher)
    for part, amount in predicted.items():
        assert amount == pytest.approx(measured[part], rel=0.01), part


@on_cpu
@pytest.mark.parametrize(
    ("ranks", "overrides"),
    [
        (8, FULL),
        (8, ("--parallelism.data_parallel_replicate_degree=2",)),
        (4, ("--parallelism.context_parallel_degree=2", *BY_OPERATION, *BF16)),
        (4, ("--parallelism.context_parallel_degree=2", *FULL)),
        (4, ("--teacher.parallelism.tensor_parallel_degree=2",)),
        (4, ("--teacher.parallelism.tensor_parallel_degree=2", "--teacher.parallelism.data_parallel_shard_degree=1")),
        (4, ("--teacher.parallelism.resident",)),
    ],
)
def test_bytes_moved(ranks: int, overrides: tuple[str, ...]):
    config, teacher = load_step("debug", *overrides)
    assert predict(config, ranks, teacher).num_bytes == pytest.approx(
        measure_transfers(config, ranks, teacher), rel=0.01
    )


@pytest.mark.parametrize("span", [Span(), Span(window=24), Span(chunk=32)])
@pytest.mark.parametrize("document", [None, 40, 128])
@pytest.mark.parametrize("positions", ["continue", "reset"])
def test_visible_keys_are_those_of_the_masks(span: Span, document: int | None, positions: str):
    words = ["--training.seq_len=256", "--parallelism.context_parallel_degree=4", f"--attention.positions={positions}"]
    config = load(CONFIGS / "debug/1_language.toml", [*words, "--training.global_batch_size=-1"])
    shape = step_shape(config, 4, document_tokens=document)
    index = torch.arange(256)[None]
    ids = index // (document or 256)
    dense = PackedRows(ids, positions).masks({"kind": span})["kind"].dense
    assert dense is not None
    visible = dense[0, 0].sum(-1, dtype=torch.float64)
    assert shape.mean_keys(span, "block_causal", everywhere=True) == pytest.approx(visible.mean().item())
    assert shape.mean_keys(span, "block_causal") == pytest.approx(visible[-64:].mean().item())


def test_published_figures(capsys: pytest.CaptureFixture[str]):
    """6.5 GFLOP a token for the student and 32.3 for Scout, heads included, beside attention; 3.4 GB of Scout."""
    config = load(PHASE_1, [])
    (one,) = plan(config, str(PHASE_1), world_size=[64], teacher="scout", document_tokens=1)
    tokens = one.shape.step_tokens
    student = one.flops["student forward"] + one.flops["student backward"] + one.flops["loss, student head"]
    assert student / tokens == pytest.approx(6.5e9, rel=0.01)
    assert (one.flops["teacher forward"] + one.flops["loss, teacher head"]) / tokens == pytest.approx(32.3e9, rel=0.01)
    assert one.memory.held["teacher"] == pytest.approx(215.54e9 / 64, rel=0.001)
    assert one.memory.held["parameters"] == pytest.approx(4 * 1_084_453_120 / 64, rel=0.001)
    assert tokens == 1088 * 2048
    printed = capsys.readouterr().out
    assert "107,769,861,120" in printed and "fits H200" in printed and "Assumed, not measured" in printed


def test_seconds_of_a_transfer():
    links = Links(node_bandwidth=400e9, network_bandwidth=50e9, ranks_per_node=8)
    inside = Transfer("x", 400e9, range(8))
    assert transfer_seconds(inside, links) == pytest.approx(1)
    # 16 ranks on two nodes: half of the whole comes from the other node, through eight cards.
    across = Transfer("x", 15 / 16 * 800e9, range(16))
    assert transfer_seconds(across, links) == pytest.approx(max(15 / 16 * 2, 400e9 / (8 * 50e9)))
    # One rank of a group on each node: all of it through one card.
    apart = Transfer("x", 50e9, [0, 8])
    assert transfer_seconds(apart, links) == pytest.approx(1)
    # Pairs of neighbours on two nodes: half of the whole from the other node, through two cards.
    pairs = Transfer("x", 3 / 4 * 200e9, [0, 1, 8, 9])
    assert transfer_seconds(pairs, links) == pytest.approx(1)


def test_seconds_of_one_kind_in_groups_of_two_sizes():
    links = Links(node_bandwidth=1.0, network_bandwidth=1.0, ranks_per_node=8)
    moved = [Transfer("gather", 5.0, range(8), "teacher"), Transfer("gather", 2.0, [0, 4], "teacher")]
    moved.append(Transfer("sum", 1.0, range(2)))
    card = Hardware("", 1.0, peak_flops=2.0, memory_bandwidth=1.0)
    products = {"student": 1.0, "teacher": 4.0}
    time = step_time(products, moved, {}, card, links, utilisation=0.5)
    assert time.transfers == {"gather": 7, "sum": 1}
    assert time.waiting == 7 - 4 + 1


def test_json_and_defaults(tmp_path: Path):
    path = tmp_path / "plan.json"
    words = ["plan", str(PHASE_1), "--training.global_batch_size=-1", "--teacher", "scout", "--hardware", "h100"]
    assert main([*words, "--world-size", "2", "16", "--tokens", "1000000000", "--json", str(path)]) == 0
    written = json.loads(path.read_text())
    assert [one["shape"]["world_size"] for one in written["plans"]] == [2, 16]
    first = written["plans"][0]
    assert first["memory"]["peak"] == max(first["memory"]["moments"].values())
    assert math.isfinite(first["times"]["h100"]["total"]) and set(written["hardware"]) == {"h100"}


def test_without_a_teacher():
    config = load(PHASE_1, ["--distill.objective=ce"])
    (one,) = plan(config, str(PHASE_1), world_size=[64], teacher="configured")
    assert one.flops["teacher forward"] == one.flops["loss, teacher head"] == one.memory.held["teacher"] == 0
    assert not [transfer for transfer in one.transfers if transfer.kind.startswith("teacher")]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--world-size", "64", "256", "--teacher", "scout"], "a multiple of 4352"),
        (["--world-size", "64"], "with --teacher scout it takes that of Llama 4 Scout"),
        (["--world-size", "64", "--teacher", "scout", "--hardware", "h900"], "h900: unknown; expected h100 or h200"),
        (["--world-size", "64", "--teacher", "scout", "--mfu", "1.5"], "--mfu 1.5: expected a share"),
        (["--world-size", "64", "--teacher", "scout", "--network-gb", "0"], "--network-gb"),
        (["--world-size", "64", "--teacher", "scout", "--tokens", "-1"], "--tokens -1"),
        (
            ["--world-size", "64", "--teacher", "scout", "--teacher.parallelism.tensor_parallel_degree", "64"],
            "teacher.parallelism.tensor_parallel_degree = 64 does not divide num_attention_heads = 40",
        ),
        (
            ["--world-size", "48", "--teacher", "scout", "--teacher.parallelism.expert_parallel_degree", "3"],
            "expert_parallel_degree = 3 does not divide the 16 experts of Llama 4 Scout",
        ),
        (["--world-size", "64", "--teacher", "scout", "--distill.impl", "torch"], "the reference"),
        (
            ["--world-size", "64", "--model.name", "llama4_text", "--model.flavor", "scout", "--compile.no_enable"],
            "a plan is for the student",
        ),
        (
            ["--teacher", "scout", "--quantization.scheme", "cpu", '--model.converters=["qat"]'],
            "a plan knows neither fake quantization nor a student as teacher",
        ),
    ],
)
def test_mistakes_are_named(words: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    assert main(["plan", str(PHASE_1), *words]) == 2
    assert message in capsys.readouterr().err


def test_a_batch_that_does_not_divide_is_no_plan():
    with pytest.raises(JobError, match=r"training\.global_batch_size"):
        plan(load(PHASE_1, []), str(PHASE_1), world_size=[1024], teacher="scout")

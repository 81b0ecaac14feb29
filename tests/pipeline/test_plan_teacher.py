"""The frozen teacher's part of a plan: what a rank holds of it, what is gathered, by whom, and weights in FP8."""

from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest
import torch

from mobilellm_pro.config import load
from mobilellm_pro.config.job_config import TeacherParallelism
from mobilellm_pro.model.registry import configured_args
from mobilellm_pro.model.student import StudentArgs
from mobilellm_pro.model.teacher import FLAVORS, Teacher, TeacherLayer
from mobilellm_pro.model.teacher_layout import degree_problems
from mobilellm_pro.model.teacher_quantization import quantize_layer
from mobilellm_pro.pipeline.peak_memory import StudentStep
from mobilellm_pro.pipeline.plan import plan, teacher_step
from mobilellm_pro.pipeline.step_memory import restored_bytes
from mobilellm_pro.pipeline.step_shape import step_shape
from mobilellm_pro.pipeline.step_time import Links, transfer_seconds
from mobilellm_pro.pipeline.step_work import transfers
from mobilellm_pro.training.fake_ranks import fake_ranks, student_shards, teacher_shards
from tests.pipeline.measured_step import allocated, load_step

CONFIGS = Path(__file__).parents[2] / "train_configs"
PHASE_1 = CONFIGS / "mobilellm_pro_1b/1_language.toml"


def test_splits_of_the_teacher():
    """Parts of heads and experts are the rank's own; what is left is shared by all who hold it."""
    config = load(
        CONFIGS / "debug/1_language.toml",
        ["--training.global_batch_size=-1", "--teacher.parallelism.expert_parallel_degree=2"],
    )
    with fake_ranks(config, 4):
        split = teacher_shards(config, FLAVORS["debug"], 4)
    experts = [unit for unit in split.units if unit.name.endswith("experts")]
    assert {unit.shard_degree for unit in experts} == {2}
    half = 4 * 3 * 128 * 256 // 2  # of a layer's four experts
    assert all(unit.gathered_numel == half for unit in experts)
    assert split.num_parameters == sum(2 * u.gathered_numel if u in experts else u.gathered_numel for u in split.units)


def test_experts_that_no_other_rank_has():
    """With as many shards as parts of the experts, these are whole on their rank, and only the rest is gathered."""
    degrees = ["--teacher.parallelism.expert_parallel_degree=2", "--teacher.parallelism.data_parallel_shard_degree=2"]
    config = load(CONFIGS / "debug/1_language.toml", ["--training.global_batch_size=-1", *degrees])
    with fake_ranks(config, 4):
        split = teacher_shards(config, FLAVORS["debug"], 4)
    whole = [unit for unit in split.units if unit.shard_degree == 1]
    assert [unit.local_numel for unit in whole] == [4 * 3 * 128 * 256 // 2] * 4
    gathered = sum(unit.gathered_numel for unit in split.units if unit.shard_degree == 2)
    assert split.num_parameters == gathered + sum(2 * unit.local_numel for unit in whole)


def test_split_experts_are_gathered_in_groups_of_their_own():
    degrees = ["--teacher.parallelism.expert_parallel_degree=16"]
    (one,) = plan(load(PHASE_1, degrees), str(PHASE_1), world_size=[64], teacher="scout", hardware=["h100"])
    kind = "teacher weights, all-gather"
    experts, rest = (transfer for transfer in one.transfers if transfer.kind == kind)
    assert list(experts.members) == [0, 16, 32, 48] and list(rest.members) == list(range(64))
    links = Links(450e9, 50e9, 8)
    seconds = transfer_seconds(experts, links), transfer_seconds(rest, links)
    assert seconds == pytest.approx((0.181, 0.049), rel=0.02)
    assert one.times["h100"].transfers[kind] == pytest.approx(sum(seconds))


def test_groups_of_the_teacher_are_those_of_its_layout():
    """Under context parallelism neighbours share a row, and their experts."""
    words = ["--parallelism.context_parallel_degree=2", "--teacher.parallelism.expert_parallel_degree=2"]
    config, teacher = load_step("debug", *words)
    shape = step_shape(config, 8)
    with fake_ranks(config, 8) as dims:
        args = cast(StudentArgs, configured_args(config))
        student = StudentStep(args, student_shards(config, dims))
        moved = transfers(student, teacher_step(config, teacher, 8), shape)
    members = [(transfer.kind, list(transfer.members)) for transfer in moved if transfer.kind.startswith("teacher")]
    assert members == [
        ("teacher weights, all-gather", [0, 1, 4, 5]),
        ("teacher weights, all-gather", list(range(8))),
        ("teacher tokens, all-to-all to experts", [0, 2]),
        ("teacher keys and values, context parallel", [0, 1]),
    ]


def test_experts_that_stay_are_not_gathered():
    """Eight parts of the experts in shards of eight: a rank keeps its own, and gathers attention and the rest."""
    degrees = ["--teacher.parallelism.expert_parallel_degree=8", "--teacher.parallelism.data_parallel_shard_degree=8"]
    (one,) = plan(load(PHASE_1, degrees), str(PHASE_1), world_size=[64], teacher="scout")
    args = FLAVORS["scout"]
    experts = 2 * args.num_hidden_layers * args.num_local_experts * 3 * args.hidden_size * args.intermediate_size
    rest = 2 * one.teacher_parameters - experts
    (gathered,) = (transfer for transfer in one.transfers if transfer.kind == "teacher weights, all-gather")
    assert gathered.num_bytes / one.shape.micro_batches == pytest.approx(7 / 8 * rest, rel=1e-3)
    assert gathered.num_bytes / one.shape.micro_batches == pytest.approx(19.5e9, rel=0.01)
    assert list(gathered.members) == list(range(8))
    assert one.memory.held["teacher"] == pytest.approx((experts + rest) / 8, rel=1e-3)
    layer = 2 * (one.teacher_parameters - 2 * args.vocab_size * args.hidden_size) - experts
    assert one.memory.at_work["teacher gathered: layers"] == pytest.approx(3 * layer / 48, rel=1e-3)


@pytest.mark.parametrize("interleaved", [1, 2, 8])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(("tensor", "experts"), [(1, 1), (2, 2)])
def test_weights_in_fp8(dtype: str, interleaved: int, tensor: int, experts: int):
    """Held, and allocated while the largest matrix is restored; with experts in all, every second or no layer."""
    pytest.importorskip("torchao")
    words = [f"--teacher.dtype={dtype}", f"--teacher.parallelism.tensor_parallel_degree={tensor}"]
    words += [f"--teacher.parallelism.expert_parallel_degree={experts}"]
    words += ["--teacher.quantization=float8", "--teacher.parallelism.data_parallel_shard_degree=1"]
    config = load(CONFIGS / "debug/1_language.toml", ["--training.global_batch_size=-1", *words])
    args = replace(FLAVORS["debug"], interleave_moe_layer_step=interleaved)
    with fake_ranks(config, 4):
        planned = teacher_step(config, args, 4)
    model = Teacher(args, planned.layout.split).to(getattr(torch, dtype))
    held = most = 0
    for layer in model.layers.values():
        quantize_layer(cast(TeacherLayer, layer))
    for weight in model.parameters():
        quantized = hasattr(weight, "qdata")
        held += weight.qdata.nbytes + weight.scale.nbytes if quantized else weight.nbytes
        most = max(most, allocated(weight.dequantize)[0] if quantized else 0)
    assert planned.held_bytes == held
    assert restored_bytes(planned) == pytest.approx(most, rel=0.02)


def test_from_a_cache_the_teacher_is_its_head():
    config = load(PHASE_1, ["--teacher.cache=read", "--teacher.cache_path=somewhere"])
    (one,) = plan(config, str(PHASE_1), world_size=[64], teacher="scout")
    assert one.flops["teacher forward"] == 0 < one.flops["loss, teacher head"]
    assert one.memory.held["teacher"] == 2 * 202_048 * 5120 // 64


def test_a_cached_teacher_has_nothing_in_fp8():
    config = load(PHASE_1, ["--teacher.cache=read", "--teacher.cache_path=somewhere"])
    with fake_ranks(config, 64):
        head = teacher_step(config, FLAVORS["scout"], 64)
    quantized = replace(head, quantized=True)
    assert quantized.held_bytes == head.held_bytes == 2 * 202_048 * 5120 // 64
    assert restored_bytes(quantized) == 0


def test_the_largest_layer_is_the_one_that_is_gathered():
    """Every second layer has experts that stay; the dense ones between them gather more."""
    degrees = ["--teacher.parallelism.expert_parallel_degree=2", "--teacher.parallelism.data_parallel_shard_degree=2"]
    config = load(CONFIGS / "debug/1_language.toml", ["--training.global_batch_size=-1", *degrees])
    args = replace(FLAVORS["debug"], interleave_moe_layer_step=2)
    with fake_ranks(config, 4):
        split = teacher_shards(config, args, 4)
    (largest,) = split.largest("layers")
    attention = 2 * args.hidden_size * (args.num_attention_heads + args.num_key_value_heads) * args.head_dim
    assert largest.gathered_numel == attention + (3 * args.intermediate_size_mlp + 2) * args.hidden_size


@pytest.mark.parametrize(
    ("changes", "degrees", "dtype", "messages"),
    [
        ({}, {"tensor_parallel_degree": 2, "expert_parallel_degree": 4}, "bfloat16", []),
        (
            {"interleave_moe_layer_step": 2, "intermediate_size_mlp": 511},
            {"tensor_parallel_degree": 2},
            "bfloat16",
            ["does not divide intermediate_size_mlp = 511 of here"],
        ),
        ({"intermediate_size_mlp": 511}, {"tensor_parallel_degree": 2}, "bfloat16", []),
        ({"interleave_moe_layer_step": 8, "intermediate_size": 255}, {"tensor_parallel_degree": 2}, "bfloat16", []),
        (
            {"interleave_moe_layer_step": 8},
            {"expert_parallel_degree": 2},
            "bfloat16",
            ["divide the 1 experts"],
        ),
        ({"intermediate_size": 264}, {"tensor_parallel_degree": 2}, "bfloat16", ["leaves 132 columns of an expert"]),
        ({"intermediate_size": 264}, {"tensor_parallel_degree": 2}, "float32", []),
    ],
)
def test_degrees_that_do_not_divide(changes: dict[str, int], degrees: dict[str, int], dtype: str, messages: list[str]):
    args = replace(FLAVORS["debug"], **changes)
    found = list(degree_problems(args, TeacherParallelism(**degrees), dtype, "here"))
    assert len(found) == len(messages)
    for message, problem in zip(messages, found):
        assert message in problem

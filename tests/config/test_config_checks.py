"""Disagreements between keys, each with a configuration that shows it."""

from dataclasses import replace

import pytest

from mobilellm_pro.config import JobConfig, check_machine, check_world_size, smallest_world_size
from mobilellm_pro.config.checks import check_keys
from mobilellm_pro.config.job_config import Dataset
from mobilellm_pro.config.no_effect import NO_EFFECT, value_at
from mobilellm_pro.config.typed_values import all_keys


def valid(**values: object) -> JobConfig:
    """A configuration without problems, changed by `section__key = value`."""
    config = JobConfig()
    config.teacher.path = "teacher"
    config.data.tokenizer = "llama4"
    config.data.datasets = [Dataset("prose", "p", 0.5), Dataset("code", "c", 0.5)]
    for name, value in values.items():
        *sections, key = name.split("__")
        target = config
        for section in sections:
            target = getattr(target, section)
        assert hasattr(target, key)
        setattr(target, key, value)
    return config


def test_the_defaults_need_only_teacher_and_data():
    assert check_keys(valid()) == []
    assert {issue.key for issue in check_keys(JobConfig())} == {"teacher.path", "data.tokenizer", "data.datasets"}


FLOAT8 = {"model__name": "mobilellm_pro", "model__converters": ["quantize.linear.float8"]}
CASES = [
    ({"distill__objective": "weighted", "teacher__path": ""}, "teacher.path"),
    ({"distill__kl_weight": 0.5}, "distill.kl_weight"),
    ({"distill__objective": "ce", "distill__ce_weight": 0.5}, "distill.ce_weight"),
    ({"distill__objective": "weighted", "distill__ce_weight": -0.5}, "distill.ce_weight"),
    ({"distill__objective": "weighted", "distill__kl_weight": 0.0}, "distill.kl_weight"),
    ({"distill__temperature": 0.0}, "distill.temperature"),
    ({"distill__chunk_tokens": 0}, "distill.chunk_tokens"),
    ({"distill__impl": "torch", "parallelism__tensor_parallel_degree": 2}, "distill.impl"),
    ({"attention__window": 0}, "attention.window"),
    ({"attention__rope_base": -1.0}, "attention.rope_base"),
    ({"attention__global_layers": [3, 3]}, "attention.global_layers"),
    ({"attention__global_layers": [-1]}, "attention.global_layers"),
    ({"data__datasets": [Dataset("a", "a", 0.5), Dataset("a", "b", 0.5)]}, "data.datasets"),
    ({"data__datasets": [Dataset("a", "a", 0.5), Dataset("b", "b", 0.4)]}, "data.datasets"),
    ({"data__datasets": [Dataset("a", "", 1.0)]}, "data.datasets[0].path"),
    ({"data__datasets": [Dataset("", "a", 1.0)]}, "data.datasets[0].name"),
    ({"data__datasets": [Dataset("a", "a", 1.0), Dataset("b", "b", 0.0)]}, "data.datasets[1].weight"),
    ({"data__datasets": [Dataset("a", "a", 1.0, max_epochs=0.0)]}, "data.datasets[0].max_epochs"),
    ({"data__max_document_tokens": 0}, "data.max_document_tokens"),
    ({"data__min_document_tokens": 0}, "data.min_document_tokens"),
    ({"data__datasets": [Dataset("a", "a", 1.0, clusters=[])]}, "data.datasets[0].clusters"),
    ({"data__datasets": [Dataset("a", "a", 1.0, clusters=[1, -1])]}, "data.datasets[0].clusters"),
    ({"data__datasets": [Dataset("a", "a", 1.0, clusters=[1, 1])]}, "data.datasets[0].clusters"),
    ({"training__steps": 0, "lr_scheduler__warmup_steps": 0}, "training.steps"),
    ({"training__global_batch_size": 12}, "training.global_batch_size"),
    ({"training__global_batch_size": 0}, "training.global_batch_size"),
    ({"training__global_batch_size": 24, "parallelism__data_parallel_shard_degree": 2}, "training.global_batch_size"),
    ({"training__seq_len": 100, "parallelism__context_parallel_degree": 8}, "training.seq_len"),
    (
        {"training__seq_len": 36, "parallelism__context_parallel_degree": 4, "parallelism__tensor_parallel_degree": 2},
        "training.seq_len",
    ),
    ({"attention__context_layout": "head_tail"}, "attention.context_layout"),
    (
        {
            "training__seq_len": 36,
            "parallelism__context_parallel_degree": 4,
            "attention__context_layout": "head_tail",
        },
        "training.seq_len",
    ),
    ({"parallelism__tensor_parallel_degree": 0}, "parallelism.tensor_parallel_degree"),
    ({"parallelism__data_parallel_shard_degree": 0}, "parallelism.data_parallel_shard_degree"),
    (
        {"parallelism__data_parallel_replicate_degree": 2, "parallelism__data_parallel_shard_degree": 1},
        "parallelism.data_parallel_replicate_degree",
    ),
    ({"lr_scheduler__warmup_steps": 20_000}, "lr_scheduler.warmup_steps"),
    ({"lr_scheduler__total_steps": 500}, "lr_scheduler.total_steps"),
    ({"lr_scheduler__decay_ratio": 1.5}, "lr_scheduler.decay_ratio"),
    ({"lr_scheduler__decay_ratio": 1.0}, "lr_scheduler.decay_ratio"),
    ({"lr_scheduler__min_lr_factor": 2.0}, "lr_scheduler.min_lr_factor"),
    ({"optimizer__name": "SGD"}, "optimizer.name"),
    ({"optimizer__beta2": 1.0}, "optimizer.beta2"),
    ({"optimizer__weight_decay": -0.1}, "optimizer.weight_decay"),
    ({"checkpoint__keep_latest_k": 1}, "checkpoint.keep_latest_k"),
    ({"checkpoint__load_step": -2}, "checkpoint.load_step"),
    ({"checkpoint__initial_load_path": "x"}, "checkpoint.initial_load_path"),
    ({"checkpoint__enable": True, "checkpoint__initial_load_in_hf": True}, "checkpoint.initial_load_in_hf"),
    ({"checkpoint__last_save_in_hf": True}, "checkpoint.last_save_in_hf"),
    ({"compile__enable": True}, "compile.components"),
    ({"activation_checkpoint__mode": "memory_budget"}, "activation_checkpoint.mode"),
    ({"activation_checkpoint__selective_ac_option": "some"}, "activation_checkpoint.selective_ac_option"),
    ({"validation__enable": True}, "validation.steps"),
    ({"training__dataloader__prefetch_factor": 2}, "training.dataloader.prefetch_factor"),
    ({"comm__mode": "fake_backend"}, "comm.mode"),
    ({"compile__enable": True, "compile__components": ["model"], "model__name": "llama4_text"}, "compile.enable"),
    (
        {"compile__enable": True, "compile__components": ["model"], "parallelism__tensor_parallel_degree": 2},
        "compile.enable",
    ),
    ({"model__converters": ["quantize.linear.mx"]}, "model.converters"),
    (FLOAT8 | {"model__name": "llama4_text"}, "model.converters"),
    (FLOAT8 | {"parallelism__tensor_parallel_degree": 2}, "model.converters"),
    (
        FLOAT8
        | {
            "training__seq_len": 1000,
            "training__local_batch_size": 1,
            "training__global_batch_size": 8,
        },
        "training.seq_len",
    ),
    (
        FLOAT8
        | {
            "quantize__linear__float8__emulate": True,
            "quantize__linear__float8__recipe_name": "rowwise",
        },
        "quantize.linear.float8.recipe_name",
    ),
    (
        FLOAT8
        | {
            "quantize__linear__float8__enable_fsdp_float8_all_gather": True,
        },
        "quantize.linear.float8.enable_fsdp_float8_all_gather",
    ),
    ({"quantize__linear__float8__recipe_name": "rowwise"}, "quantize.linear.float8.recipe_name"),
    (
        FLOAT8
        | {
            "quantize__linear__float8__emulate": True,
            "compile__enable": True,
            "compile__components": ["model"],
        },
        "quantize.linear.float8.emulate",
    ),
    ({"quantize__linear__mx__recipe_name": "mxfp8_emulated"}, "quantize.linear.mx.recipe_name"),
    ({"training__dataset": "c4"}, "training.dataset"),
    ({"fault_tolerance__enable": True}, "fault_tolerance.enable"),
    ({"parallelism__pipeline_parallel_degree": 2}, "parallelism.pipeline_parallel_degree"),
    ({"quantize__linear__float8__recipe_name": "rowwise"}, "quantize.linear.float8.recipe_name"),
    ({"needle__enable": True}, "needle.lengths"),
    ({"needle__enable": True, "needle__lengths": [512, 512]}, "needle.lengths"),
    ({"needle__enable": True, "needle__lengths": [0]}, "needle.lengths"),
    ({"needle__enable": True, "needle__lengths": [4096]}, "needle.lengths"),
    ({"needle__enable": True, "needle__lengths": [512], "needle__freq": 0}, "needle.freq"),
    ({"needle__enable": True, "needle__lengths": [512], "needle__depths": 0}, "needle.depths"),
    ({"needle__enable": True, "needle__lengths": [512], "needle__needles": 0}, "needle.needles"),
    ({"needle__enable": True, "needle__lengths": [512], "needle__batch": 0}, "needle.batch"),
    ({"needle__enable": True, "needle__lengths": [512], "model__name": "llama4_text"}, "needle.enable"),
]


@pytest.mark.parametrize(("values", "key"), CASES, ids=[str(case[0])[1:-1] for case in CASES])
def test_one_disagreement(values: dict, key: str):
    assert [issue.key for issue in check_keys(valid(**values))] == [key]


@pytest.mark.parametrize(
    "values",
    [
        {"data__datasets": [Dataset("a", "a", 3.0), Dataset("b", "b", 1.0)], "data__renormalize_weights": True},
        {"data__datasets": [Dataset("a", "a", 0.333), Dataset("b", "b", 0.667)]},
        {"distill__objective": "ce", "teacher__path": ""},
        {"distill__objective": "weighted", "distill__ce_weight": 0.1},
        {"compile__enable": True, "compile__components": ["model"], "activation_checkpoint__mode": "memory_budget"},
        {"parallelism__data_parallel_replicate_degree": 2},
        {"lr_scheduler__decay_ratio": 0.5},
        {"needle__lengths": [0], "needle__freq": 0},
        {"needle__enable": True, "needle__lengths": [4096], "needle__allow_longer": True},
        {"needle__enable": True, "needle__lengths": [512, 2048]},
    ],
)
def test_what_is_allowed(values: dict):
    assert check_keys(valid(**values)) == []


def test_every_key_without_effect_exists():
    keys = {key for key, _ in all_keys(JobConfig)}
    for listed in NO_EFFECT:
        assert any(key == listed or key.startswith(f"{listed}.") for key in keys), listed
        value_at(JobConfig(), listed)


@pytest.mark.parametrize(
    ("degrees", "world_size", "keys"),
    [
        ((1, -1, 1, 1), 1, []),
        ((1, -1, 2, 2), 8, []),
        ((2, 2, 2, 1), 8, []),
        ((2, -1, 1, 1), 4, []),
        ((1, -1, 2, 2), 6, ["parallelism.data_parallel_shard_degree"]),
        ((1, 2, 1, 1), 4, ["parallelism.data_parallel_shard_degree"]),
        ((2, -1, 1, 1), 2, ["parallelism.data_parallel_replicate_degree"]),
    ],
)
def test_world_size(degrees: tuple[int, ...], world_size: int, keys: list[str]):
    replicate, shard, context, tensor = degrees
    config = valid()
    config.parallelism = replace(
        config.parallelism,
        data_parallel_replicate_degree=replicate,
        data_parallel_shard_degree=shard,
        context_parallel_degree=context,
        tensor_parallel_degree=tensor,
    )
    assert [problem.key for problem in check_world_size(config, world_size)] == keys
    assert check_world_size(config, smallest_world_size(config)) == []


def test_the_world_size_problem_says_which_degrees_and_the_cure():
    config = valid(parallelism__tensor_parallel_degree=2, parallelism__data_parallel_shard_degree=1)
    (problem,) = check_world_size(config, 8)
    assert "tensor_parallel_degree 2" in str(problem) and "for 8 processes" in str(problem)
    assert "data_parallel_shard_degree = 4 or -1, or 2 processes" in str(problem)


def test_the_batch_must_divide_among_the_ranks():
    config = valid(training__local_batch_size=2, training__global_batch_size=12)
    assert check_world_size(config, 3) == []
    assert [problem.key for problem in check_world_size(config, 4)] == ["training.global_batch_size"]


def test_pinned_memory_needs_cuda():
    config = valid(checkpoint__enable=True, checkpoint__async_mode="async_with_pinned_mem")
    assert [problem.key for problem in check_machine(config, "cpu")] == ["checkpoint.async_mode"]
    assert check_machine(config, "cuda") == []


def test_a_snapshot_of_a_gpus_memory_needs_one():
    config = valid(profiling__enable_memory_snapshot=True)
    assert [problem.key for problem in check_machine(config, "cpu")] == ["profiling.enable_memory_snapshot"]


def test_a_gpu_kernel_without_a_gpu():
    config = valid(distill__impl="triton")
    assert [problem.key for problem in check_machine(config, "cpu")] == ["distill.impl"]
    assert check_machine(config, "cuda") == []


def test_float8_is_no_quantization():
    config = valid(**FLOAT8 | {"model__converters": ["qat", "quantize.linear.float8"], "quantization__scheme": "cpu"})
    assert check_keys(config)[0].expected == "one of them: a weight has one low precision"


def test_float8_needs_a_gpu_or_patience(monkeypatch: pytest.MonkeyPatch):
    config = valid(**FLOAT8)
    assert [problem.key for problem in check_machine(config, "cpu")] == ["model.converters"]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "without torchao" in check_machine(config, "cpu")[0].found
    monkeypatch.undo()
    config.quantize.linear.float8.emulate = True
    assert check_machine(config, "cpu") == [] and check_keys(config) == []

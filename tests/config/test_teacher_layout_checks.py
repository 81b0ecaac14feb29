"""Layouts of the teacher that cannot be, found from the keys, the number of processes and the kind of machine."""

from dataclasses import replace

import pytest

from mobilellm_pro.config import JobConfig, check_machine, check_world_size, smallest_world_size
from mobilellm_pro.config.checks import check_keys
from tests.config.test_config_checks import valid

LAYOUT = "teacher.parallelism"


def laid_out(tensor: int = 1, expert: int = 1, shard: int = -1, **values: object) -> JobConfig:
    config = valid(**values)
    config.teacher.parallelism = replace(
        config.teacher.parallelism,
        tensor_parallel_degree=tensor,
        expert_parallel_degree=expert,
        data_parallel_shard_degree=shard,
    )
    return config


@pytest.mark.parametrize(
    ("config", "key"),
    [
        (laid_out(tensor=0), f"{LAYOUT}.tensor_parallel_degree"),
        (laid_out(expert=-1), f"{LAYOUT}.expert_parallel_degree"),
        (laid_out(shard=0), f"{LAYOUT}.data_parallel_shard_degree"),
        (laid_out(tensor=3, parallelism__tensor_parallel_degree=2), f"{LAYOUT}.tensor_parallel_degree"),
        (laid_out(teacher__quantization="float8"), f"{LAYOUT}.data_parallel_shard_degree"),
        (laid_out(expert=2, teacher__overlap=True, training__global_batch_size=64), "teacher.overlap"),
        (laid_out(teacher__overlap=True), "teacher.overlap"),
    ],
)
def test_keys_that_exclude_each_other(config: JobConfig, key: str) -> None:
    assert [issue.key for issue in check_keys(config)] == [key]


@pytest.mark.parametrize(
    "config",
    [
        laid_out(tensor=4, parallelism__tensor_parallel_degree=2),
        laid_out(tensor=2, parallelism__tensor_parallel_degree=4),
        laid_out(shard=1, teacher__quantization="float8"),
        laid_out(teacher__overlap=True, training__global_batch_size=64),
        laid_out(teacher__quantization="float8", teacher__cache="read", teacher__cache_path="cache"),
    ],
)
def test_what_is_allowed(config: JobConfig) -> None:
    assert check_keys(config) == []


@pytest.mark.parametrize(
    ("config", "world_size", "keys"),
    [
        (laid_out(tensor=8), 8, []),
        (laid_out(tensor=4, parallelism__tensor_parallel_degree=2), 4, []),
        (laid_out(tensor=4, parallelism__tensor_parallel_degree=2), 6, ["tensor_parallel_degree"]),
        (laid_out(tensor=2), 1, ["tensor_parallel_degree"]),
        (laid_out(tensor=2, parallelism__context_parallel_degree=4), 4, ["tensor_parallel_degree"]),
        (laid_out(tensor=2, expert=4), 8, []),
        (laid_out(tensor=2, expert=4), 4, ["expert_parallel_degree"]),
        (laid_out(expert=2, parallelism__tensor_parallel_degree=4), 4, ["expert_parallel_degree"]),
        (laid_out(shard=4), 8, []),
        (laid_out(shard=3), 8, ["data_parallel_shard_degree"]),
        (laid_out(tensor=2, shard=8), 8, ["data_parallel_shard_degree"]),
        (laid_out(expert=4, shard=2), 8, []),
        (laid_out(expert=4, shard=6), 24, ["data_parallel_shard_degree"]),
        (laid_out(tensor=3, distill__objective="ce", teacher__path=""), 4, []),
    ],
)
def test_layouts_on_a_number_of_processes(config: JobConfig, world_size: int, keys: list[str]) -> None:
    assert [problem.key for problem in check_world_size(config, world_size)] == [f"{LAYOUT}.{key}" for key in keys]


def test_the_smallest_job_has_room_for_the_teacher() -> None:
    config = laid_out(tensor=2, expert=4, shard=4)
    assert smallest_world_size(config) == 8 and check_world_size(config, 8) == []
    assert smallest_world_size(laid_out(tensor=8, parallelism__tensor_parallel_degree=2)) == 8
    config = laid_out(tensor=8, parallelism__data_parallel_shard_degree=2)
    assert smallest_world_size(config) == 2 and check_world_size(config, 2) != []


def test_overlap_needs_cuda_and_float8_torchao(monkeypatch: pytest.MonkeyPatch) -> None:
    config = laid_out(teacher__overlap=True, training__global_batch_size=64)
    assert [problem.key for problem in check_machine(config, "cpu")] == ["teacher.overlap"]
    assert check_machine(config, "cuda") == []
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    config = laid_out(shard=1, teacher__quantization="float8")
    assert [problem.key for problem in check_machine(config, "cpu")] == ["teacher.quantization"]
    config = laid_out(teacher__quantization="float8", teacher__cache="read", teacher__cache_path="cache")
    assert check_machine(config, "cpu") == []  # no body is loaded

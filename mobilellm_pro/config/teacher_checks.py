"""What the keys of [teacher] and [teacher.parallelism] must be to each other and to the rest."""

import importlib.util
import json
from collections.abc import Iterable, Iterator
from dataclasses import fields

from mobilellm_pro.config.config_error import Issue, Problem
from mobilellm_pro.config.job_config import JobConfig, TeacherParallelism
from mobilellm_pro.config.no_effect import value_at

_LAYOUT = "teacher.parallelism"


def check_teacher_layout(config: JobConfig) -> Iterator[Issue]:
    """Degrees, and options that exclude each other."""
    teacher, own = config.teacher, config.teacher.parallelism
    for name in ("tensor_parallel_degree", "expert_parallel_degree"):
        if getattr(own, name) <= 0:
            yield Issue((f"{_LAYOUT}.{name}",), str(getattr(own, name)), "a positive number")
    if own.data_parallel_shard_degree != -1 and own.data_parallel_shard_degree <= 0:
        expected = "a positive number, or -1 for all ranks that hold the same weights"
        yield Issue((f"{_LAYOUT}.data_parallel_shard_degree",), str(own.data_parallel_shard_degree), expected)
    small, large = sorted((own.tensor_parallel_degree, config.parallelism.tensor_parallel_degree))
    if small > 0 and large % small:
        keys = (f"{_LAYOUT}.tensor_parallel_degree", "parallelism.tensor_parallel_degree")
        found = f"{own.tensor_parallel_degree} with the student's {config.parallelism.tensor_parallel_degree}"
        yield Issue(keys, found, "degrees of which one divides the other: their groups lie inside each other")
    if _quantizes(config) and own.data_parallel_shard_degree != 1:
        keys = (f"{_LAYOUT}.data_parallel_shard_degree", "teacher.quantization")
        found = f'{own.data_parallel_shard_degree} with teacher.quantization = "float8"'
        expected = "1: quantized weights are not sharded; use tensor and expert parallelism, or no quantization"
        yield Issue(keys, found, expected)
    if teacher.overlap and own.expert_parallel_degree > 1:
        found = f"true with expert_parallel_degree = {own.expert_parallel_degree}"
        expected = "one of the two: the host waits in every layer for the number of tokens of each expert"
        yield Issue(("teacher.overlap", f"{_LAYOUT}.expert_parallel_degree"), found, expected)
    if teacher.overlap and config.training.global_batch_size == -1:
        found = "true without gradient accumulation, where a step has no next micro-batch"
        expected = "a global_batch_size of several micro-batches, or false"
        yield Issue(("teacher.overlap", "training.global_batch_size"), found, expected)


def check_teacher_ranks(config: JobConfig, world_size: int) -> Iterator[Issue]:
    """Degrees of the teacher on this number of processes, on which the student's degrees fit already."""
    own, student = config.teacher.parallelism, config.parallelism
    if config.distill.objective == "ce":
        return
    tensor, expert, shard = own.tensor_parallel_degree, own.expert_parallel_degree, own.data_parallel_shard_degree
    data_ranks = world_size // (student.context_parallel_degree * student.tensor_parallel_degree)
    in_tensor = max(1, tensor // student.tensor_parallel_degree)
    batch = config.training.global_batch_size
    if config.teacher.overlap and batch == config.training.local_batch_size * data_ranks:
        found = f"true with one micro-batch a step, {batch} rows on {data_ranks} data-parallel ranks"
        yield Issue(("teacher.overlap", "training.global_batch_size"), found, "several micro-batches a step, or false")
    said = f"{data_ranks} data-parallel ranks ({world_size} processes)"
    if data_ranks % in_tensor:
        keys = (f"{_LAYOUT}.tensor_parallel_degree", "parallelism.tensor_parallel_degree")
        found = f"{tensor}, {in_tensor} times the student's {student.tensor_parallel_degree}, on {said}"
        yield Issue(keys, found, f"a degree of which that factor divides {data_ranks}")
        return
    if data_ranks // in_tensor % expert:
        keys = (f"{_LAYOUT}.expert_parallel_degree", f"{_LAYOUT}.tensor_parallel_degree")
        found = f"{expert} on {said} in tensor groups of {in_tensor}"
        yield Issue(keys, found, f"a divisor of {data_ranks // in_tensor}")
        return
    holders = world_size // tensor
    key = f"{_LAYOUT}.data_parallel_shard_degree"
    if shard != -1 and holders % shard:
        found = f"{shard} for {holders} ranks that hold the same weights ({world_size} processes)"
        yield Issue((key, f"{_LAYOUT}.tensor_parallel_degree"), found, f"-1 or a divisor of {holders}")
    elif shard != -1 and shard % expert and expert % shard:
        found = f"{shard} with expert_parallel_degree = {expert}"
        yield Issue((key, f"{_LAYOUT}.expert_parallel_degree"), found, "-1, or degrees of which one divides the other")


def check_teacher_machine(config: JobConfig, device_type: str) -> Iterator[Problem]:
    """What the teacher needs of the machine."""
    if config.teacher.overlap and device_type != "cuda":
        found = f"true on a {device_type} machine, which has no second stream"
        yield Problem("machine", "teacher.overlap", found, "false")
    if _quantizes(config) and importlib.util.find_spec("torchao") is None:
        cure = '`pip install "torchao>=0.18,<0.19"` or "none"'
        yield Problem("machine", "teacher.quantization", '"float8", without torchao', cure)


def _quantizes(config: JobConfig) -> bool:
    """Whether a body in float8 is loaded; a job that reads a cache only says whose hidden states it reads."""
    return config.teacher.quantization == "float8" and config.teacher.cache != "read"


def check_teacher_cache(config: JobConfig) -> Iterator[Issue]:
    """Cache of hidden states: where it is, what fills it, and what a run that reads it no longer does."""
    teacher = config.teacher
    if teacher.cache_file_mib <= 0:
        yield Issue(("teacher.cache_file_mib",), str(teacher.cache_file_mib), "a positive number of MiB")
    if teacher.cache == "off":
        yield from _unused(config, ("cache_path", "cache_dtype"), 'teacher.cache = "write" or "read"')
        return
    if not teacher.cache_path:
        expected = f'the folder of the cache, because teacher.cache = "{teacher.cache}"'
        yield Issue(("teacher.cache_path", "teacher.cache"), "nothing", expected)
    if config.distill.objective == "ce":
        found = f'"{teacher.cache}" with distill.objective = "ce", which has no teacher'
        yield Issue(("teacher.cache", "distill.objective"), found, '"off", or an objective with a teacher')
    if teacher.cache == "read":
        layout = (f"parallelism.{field.name}" for field in fields(TeacherParallelism))
        yield from _unused(config, ("compile", "overlap", *layout), "the default: the teacher does not run")


def _unused(config: JobConfig, names: Iterable[str], expected: str) -> Iterator[Issue]:
    """Keys of [teacher] that are set, and that this kind of cache does not read."""
    for key in (f"teacher.{name}" for name in names):
        value = value_at(config, key)
        if value != value_at(JobConfig(), key):
            found = f'{json.dumps(value)} with teacher.cache = "{config.teacher.cache}", which does not read it'
            yield Issue((key, "teacher.cache"), found, expected)

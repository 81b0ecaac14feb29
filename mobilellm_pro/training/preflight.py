"""Everything that can be known to be wrong with a run before it starts, found without a process group or a GPU.

`mobilellm-pro validate` and `mobilellm-pro train` both call `problems`: a job of a thousand ranks should die within
seconds, with all of its problems, not one by one in the queue.
"""

import os
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torchtitan.tools.utils import device_type

from mobilellm_pro.config import check_machine, check_world_size
from mobilellm_pro.config.job_config import JobConfig
from mobilellm_pro.data.mixture import Mixture
from mobilellm_pro.data.tokenizer import Tokenizer
from mobilellm_pro.model.checkpoint import architecture, checkpoint_problems, find_checkpoint, latest_checkpoint
from mobilellm_pro.model.registry import configured_args, model_on_meta
from mobilellm_pro.model.student import Student, StudentArgs
from mobilellm_pro.model.teacher import Teacher, TeacherArgs
from mobilellm_pro.model.teacher_layout import degree_problems
from mobilellm_pro.model.tensor_files import tensor_problems
from mobilellm_pro.quantization.scheme import SCHEMES
from mobilellm_pro.training.disk_room import checkpoint_room_problems
from mobilellm_pro.training.hidden_state_cache import cache_problems
from mobilellm_pro.training.loader import open_mixture, step_rows
from mobilellm_pro.training.online_evaluation import OnlineEvaluation


def problems(
    config: JobConfig,
    world_size: int,
    evaluations: Sequence[OnlineEvaluation] = (),
    *,
    skip: Collection[str] = (),
) -> list[str]:
    """All problems of a configuration on `world_size` ranks, each with what was expected and the cure.

    Args:
        config: a loaded configuration.
        world_size: number of processes of the job.
        evaluations: that run while it trains.
        skip: "datasets", "teacher", "cache", "checkpoints": what another job has yet to make.
    """
    found = [str(problem) for problem in (*check_world_size(config, world_size), *check_machine(config, device_type))]
    files = {"datasets": _datasets, "teacher": _teacher, "cache": _cache, "checkpoints": _checkpoints}
    wanted = (check for name, check in files.items() if name not in skip)
    for check in (_model, _tensor_parallel, _tokenizer, _room, *wanted):
        found += _collect(check, config, world_size)
    for evaluation in evaluations:
        found += evaluation.problems()
    return found


def _collect(check: Callable[[JobConfig, int], Iterator[str]], config: JobConfig, world_size: int) -> list[str]:
    found: list[str] = []
    try:
        found.extend(check(config, world_size))  # keeps what was found before an error
    except (ValueError, OSError) as error:
        found.append(str(error))
    return found


def _model(config: JobConfig, world_size: int) -> Iterator[str]:
    configured_args(config)
    if config.quantization.scheme != "none":
        yield from _group_problems(config)


def _group_problems(config: JobConfig) -> Iterator[str]:
    """Groups of weights that would lie across the ranks between which a layer's columns are split."""
    model, degree = model_on_meta(config), config.parallelism.tensor_parallel_degree
    group = SCHEMES[config.quantization.scheme].weights.group
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        layer = model.get_submodule(f"layers.0.{name}")
        assert isinstance(layer, nn.Linear)
        columns = layer.in_features // degree
        if group is not None and layer.in_features % degree == 0 and columns % group:
            yield (
                f"layers.0.{name}: tensor_parallel_degree = {degree} leaves {columns} columns a rank, which do not "
                f'divide into groups of {group} of quantization.scheme = "{config.quantization.scheme}"; lower it'
            )


def _known_model(config: JobConfig) -> Any:
    """The model's arguments, or None where `_model` has already complained."""
    try:
        return configured_args(config)
    except ValueError:
        return None


def _tensor_parallel(config: JobConfig, world_size: int) -> Iterator[str]:
    yield from student_degree_problems(config)


def student_degree_problems(config: JobConfig) -> Iterator[str]:
    """What of the configured model the tensor-parallel degree does not divide."""
    degree = config.parallelism.tensor_parallel_degree
    args = _known_model(config)
    if degree == 1 or args is None:
        return
    if not isinstance(args, StudentArgs):
        yield (
            f"parallelism.tensor_parallel_degree = {degree}: model {config.model.name} trains with FSDP2 and context "
            "parallelism only; set it to 1"
        )
        return
    for key in ("num_attention_heads", "num_key_value_heads", "intermediate_size", "vocab_size"):
        if getattr(args, key) % degree:
            yield (
                f"parallelism.tensor_parallel_degree = {degree} does not divide {key} = {getattr(args, key)} of "
                f"{config.model.name}/{config.model.flavor}"
            )


@lru_cache(maxsize=1)
def _load_tokenizer(source: str) -> Tokenizer:
    """Two checks need it, and 200,000 ranks take a while to read."""
    return Tokenizer.load(source)


def _tokenizer(config: JobConfig, world_size: int) -> Iterator[str]:
    tokenizer = _load_tokenizer(config.data.tokenizer)
    args = _known_model(config)
    if args is not None and tokenizer.vocab_size != args.vocab_size:
        yield (
            f"data.tokenizer = {config.data.tokenizer!r} has {tokenizer.vocab_size:,} ids, model {config.model.name}/"
            f"{config.model.flavor} has {args.vocab_size:,}; choose the tokenizer or the flavor that fits"
        )


def _datasets(config: JobConfig, world_size: int) -> Iterator[str]:
    try:
        fingerprint = _load_tokenizer(config.data.tokenizer).fingerprint
    except (ValueError, OSError):
        return  # reported by _tokenizer
    check_index = os.environ.get("LOCAL_RANK", "0") == "0"  # one process of each machine reads all of every index
    mixture = open_mixture(config.data, "train", config.training.seq_len, fingerprint, check_index=check_index)
    yield from _max_epochs(config, mixture, world_size)
    if not config.validation.enable:
        return
    settings = config.validation
    mixture = open_mixture(config.data, "valid", settings.seq_len, fingerprint, check_index=check_index)
    rows = settings.steps * settings.local_batch_size * _batch_ranks(config, world_size)
    for dataset, stream, share in zip(config.data.datasets, mixture.streams, mixture.weights, strict=True):
        wanted, held_out = int(rows * share), int(stream.rows_per_epoch)
        if wanted > held_out:
            yield (
                f"validation asks for {wanted:,} held-out rows of {dataset.name}, {dataset.path} has {held_out:,}: "
                "lower validation.steps, or prepare the corpus with a larger holdout"
            )


def _max_epochs(config: JobConfig, mixture: Mixture, world_size: int) -> Iterator[str]:
    limit = mixture.rows_until([dataset.max_epochs for dataset in config.data.datasets])
    training, rows_per_step = config.training, step_rows(config, _batch_ranks(config, world_size))
    if limit is None or limit[0] >= training.steps * rows_per_step:
        return
    step = limit[0] // rows_per_step
    if config.data.on_max_epochs == "error" or step == 0:
        yield (
            f"data.datasets: {limit[1]} passes its max_epochs after step {step:,} of {training.steps:,}: give it more "
            'text, a lower weight or more epochs, lower training.steps, or set data.on_max_epochs = "stop"'
        )


def _teacher(config: JobConfig, world_size: int) -> Iterator[str]:
    if config.distill.objective == "ce" or not config.teacher.path:
        return
    folder = config.teacher.path
    args, student = architecture(folder), _known_model(config)
    if student is not None:
        yield from vocabulary_problems(args, student, folder)
    if isinstance(args, StudentArgs):
        yield from _student_as_teacher(config, args)
        return
    yield from degree_problems(args, config.teacher.parallelism, config.teacher.dtype, folder)
    with torch.device("meta"):
        yield from tensor_problems(Teacher(args), folder)


def _student_as_teacher(config: JobConfig, args: StudentArgs) -> Iterator[str]:
    """It is small: it has no parts over ranks, no few bits and no cache."""
    teacher, own, folder = config.teacher, config.teacher.parallelism, config.teacher.path
    for key, value, only in (
        ("teacher.parallelism.tensor_parallel_degree", own.tensor_parallel_degree, 1),
        ("teacher.parallelism.expert_parallel_degree", own.expert_parallel_degree, 1),
        ("teacher.quantization", teacher.quantization, "none"),
        ("teacher.cache", teacher.cache, "off"),
    ):
        if value != only:
            yield f"{key} = {value!r}: {folder} is a student, as whose teacher only {only!r} is possible"
    with torch.device("meta"):
        model = Student(args)
    if (Path(folder) / "config.json").is_file():
        yield from tensor_problems(model, folder)
    else:
        yield from checkpoint_problems(model, find_checkpoint(folder).step)


def vocabulary_problems(teacher: TeacherArgs | StudentArgs, student: StudentArgs, source: str) -> Iterator[str]:
    """Whether both models have equally many ids; `source` says where the teacher is from."""
    if teacher.vocab_size != student.vocab_size:
        yield (
            f"{source}: the teacher's vocabulary has {teacher.vocab_size:,} ids, the student's "
            f"{student.vocab_size:,}; distillation over the full vocabulary needs the same tokenizer"
        )


def _cache(config: JobConfig, world_size: int) -> Iterator[str]:
    if config.distill.objective != "ce" and config.teacher.path:
        yield from cache_problems(config, _batch_ranks(config, world_size))


def _checkpoints(config: JobConfig, world_size: int) -> Iterator[str]:
    if not config.checkpoint.enable or _known_model(config) is None:
        return
    own = latest_checkpoint(Path(config.job.dump_folder) / config.checkpoint.folder)
    if own is not None:
        yield from checkpoint_problems(model_on_meta(config), own, resume=True)
        return
    initial = config.checkpoint.initial_load_path
    if not initial:
        return
    if not Path(initial).is_dir():
        yield f"checkpoint.initial_load_path = {initial!r}: no such folder"
    elif config.checkpoint.initial_load_in_hf:
        yield from tensor_problems(model_on_meta(config), initial)
    else:
        yield from checkpoint_problems(model_on_meta(config), Path(initial), begins=True)
        yield from _other_scheme(config, Path(initial))


def _other_scheme(config: JobConfig, initial: Path) -> Iterator[str]:
    """A student that was trained under one scheme and would go on under another, or under none."""
    try:
        before = find_checkpoint(initial).config.quantization.scheme
    except FileNotFoundError:
        return  # a checkpoint without its run, or what other checks name
    now = config.quantization.scheme
    if before not in ("none", now):
        yield (
            f'checkpoint.initial_load_path = {str(initial)!r} was trained with quantization.scheme = "{before}", this '
            f'job has "{now}"; begin with the checkpoint in full precision that it began with'
        )


def _room(config: JobConfig, world_size: int) -> Iterator[str]:
    if config.checkpoint.enable and not config.checkpoint.load_only and _known_model(config) is not None:
        yield from checkpoint_room_problems(config)


def _batch_ranks(config: JobConfig, world_size: int) -> int:
    parallelism = config.parallelism
    return max(1, world_size // (parallelism.tensor_parallel_degree * parallelism.context_parallel_degree))

"""What keys of a configuration must be to each other, beyond their types.

`check_keys` needs no machine and runs whenever a file is loaded. `check_machine` needs the kind of device and
`mesh_checks.check_world_size` the number of processes: they run before a job starts. torchtitan asserts some of all
this late, adjusts some in silence and misses some.
"""

import importlib.util
from collections.abc import Callable, Iterator

from mobilellm_pro.config.config_error import Issue, Problem
from mobilellm_pro.config.converter_checks import check_converter_machine, check_converters
from mobilellm_pro.config.distillation_checks import check_attention, check_data, check_distill
from mobilellm_pro.config.evaluation_checks import check_needle, check_suite, check_validation
from mobilellm_pro.config.job_config import JobConfig
from mobilellm_pro.config.mesh_checks import check_data_parallelism
from mobilellm_pro.config.no_effect import check_no_effect
from mobilellm_pro.config.teacher_checks import (
    check_teacher_cache,
    check_teacher_layout,
    check_teacher_machine,
)


def check_keys(config: JobConfig) -> list[Issue]:
    """Every disagreement between keys that can be seen without knowing the machine."""
    return [issue for check in _CHECKS for issue in check(config)]


def check_machine(config: JobConfig, device_type: str) -> list[Problem]:
    """Problems of the configuration on this machine.

    Args:
        config: a loaded configuration.
        device_type: "cpu", "cuda", ... as `torchtitan.tools.utils.device_type`.
    """
    problems = []
    if config.checkpoint.enable and config.checkpoint.async_mode == "async_with_pinned_mem" and device_type != "cuda":
        found = f'"async_with_pinned_mem" on a {device_type} machine'
        problems.append(Problem("machine", "checkpoint.async_mode", found, '"async" or "disabled" without CUDA'))
    if config.profiling.enable_memory_snapshot and device_type != "cuda":
        found = f"true on a {device_type} machine"
        problems.append(Problem("machine", "profiling.enable_memory_snapshot", found, "false: it is of a GPU's memory"))
    if config.distill.impl == "triton" and device_type != "cuda":
        problems.append(
            Problem("machine", "distill.impl", f'"triton" on a {device_type} machine', '"auto" or "chunked"')
        )
    if config.metrics.enable_wandb and importlib.util.find_spec("wandb") is None:
        problems.append(
            Problem("machine", "metrics.enable_wandb", "true, without wandb", "`pip install wandb` or false")
        )
    return [*problems, *check_teacher_machine(config, device_type), *check_converter_machine(config, device_type)]


def _positive(config: JobConfig) -> Iterator[Issue]:
    """Numbers that mean nothing at zero or below."""
    keys = ["training.seq_len", "training.local_batch_size", "training.steps", "training.max_norm", "training.gc_freq"]
    keys += ["metrics.log_freq", "optimizer.lr", "optimizer.eps", "checkpoint.interval", "profiling.profile_freq"]
    keys += ["comm.init_timeout_seconds", "comm.train_timeout_seconds", "guard.max_skipped_steps"]
    keys += [
        f"parallelism.{name}_degree" for name in ("data_parallel_replicate", "tensor_parallel", "context_parallel")
    ]
    if config.validation.enable:
        keys += ["validation.local_batch_size", "validation.seq_len", "validation.freq"]
    for key in keys:
        section, name = key.split(".")
        value = getattr(getattr(config, section), name)
        if value <= 0:
            yield Issue((key,), str(value), "a positive number")


def _batch(config: JobConfig) -> Iterator[Issue]:
    training, parallelism = config.training, config.parallelism
    keys = ("training.global_batch_size", "training.local_batch_size", "parallelism.data_parallel_replicate_degree")
    if training.global_batch_size == -1:
        return
    if training.global_batch_size <= 0:
        yield Issue(keys[:1], str(training.global_batch_size), "a positive number, or -1 for one batch of every rank")
        return
    # The shard degree may be -1, the ranks that are left: check_world_size knows how many.
    unit = (
        training.local_batch_size
        * parallelism.data_parallel_replicate_degree
        * max(1, parallelism.data_parallel_shard_degree)
    )
    if unit > 0 and training.global_batch_size % unit:
        yield Issue(
            keys, str(training.global_batch_size), f"a multiple of local_batch_size times data parallelism, {unit}"
        )


def _sequence(config: JobConfig) -> Iterator[Issue]:
    parallelism = config.parallelism
    shards = parallelism.context_parallel_degree * parallelism.tensor_parallel_degree
    lengths = {"training.seq_len": config.training.seq_len}
    if config.validation.enable:
        lengths["validation.seq_len"] = config.validation.seq_len
    for key, length in lengths.items():
        if shards > 0 and length > 0 and length % shards:
            keys = (key, "parallelism.context_parallel_degree", "parallelism.tensor_parallel_degree")
            expected = f"a multiple of {shards}, context times tensor parallel degree: ranks hold equal shards"
            yield Issue(keys, str(length), expected)
        pieces = 2 * parallelism.context_parallel_degree
        if config.attention.context_layout == "head_tail" and pieces > 2 and length % pieces:
            keys = (key, "parallelism.context_parallel_degree", "attention.context_layout")
            yield Issue(keys, str(length), f"a multiple of {pieces}: head_tail gives a context rank two equal pieces")
    if config.attention.context_layout == "head_tail" and parallelism.context_parallel_degree == 1:
        both = ("attention.context_layout", "parallelism.context_parallel_degree")
        yield Issue(both, "head_tail on one context rank", "contiguous, or a context_parallel_degree above 1")


def _schedule(config: JobConfig) -> Iterator[Issue]:
    schedule, steps = config.lr_scheduler, config.training.steps
    total = steps if schedule.total_steps is None else schedule.total_steps
    key = "lr_scheduler.warmup_steps"
    if total < steps:
        found = f"{total} for a run of {steps} steps, where the learning rate would become negative"
        yield Issue(("lr_scheduler.total_steps", "training.steps"), found, "training.steps or more")
    if not 0 <= schedule.warmup_steps <= total:
        found = f"{schedule.warmup_steps} for a schedule of {total} steps"
        yield Issue((key, "training.steps", "lr_scheduler.total_steps"), found, f"a number from 0 to {total}")
    if not 0 <= schedule.min_lr_factor <= 1:
        yield Issue(("lr_scheduler.min_lr_factor",), str(schedule.min_lr_factor), "a number from 0 to 1")
    ratio = schedule.decay_ratio
    if ratio is not None and not 0 < ratio <= 1:
        yield Issue(("lr_scheduler.decay_ratio",), str(ratio), "a number above 0, up to 1")
    elif ratio is not None and schedule.warmup_steps + round(total * ratio) > total:
        found = f"{ratio}, {round(total * ratio)} of {total} steps, after {schedule.warmup_steps} steps of warmup"
        yield Issue(
            ("lr_scheduler.decay_ratio", key, "training.steps"), found, "warmup and decay that fit one after another"
        )


def _optimizer(config: JobConfig) -> Iterator[Issue]:
    optimizer = config.optimizer
    if optimizer.name not in ("Adam", "AdamW"):
        yield Issue(("optimizer.name",), f'"{optimizer.name}"', '"Adam" or "AdamW"')
    for name, beta in (("beta1", optimizer.beta1), ("beta2", optimizer.beta2)):
        if not 0 <= beta < 1:
            yield Issue((f"optimizer.{name}",), str(beta), "a number from 0 up to, but not, 1")
    if optimizer.weight_decay < 0:
        yield Issue(("optimizer.weight_decay",), str(optimizer.weight_decay), "zero or a positive number")


def _checkpoint(config: JobConfig) -> Iterator[Issue]:
    checkpoint = config.checkpoint
    latest = checkpoint.keep_latest_k
    if latest == 1 or latest < 0:
        expected = "0 (keep all), or 2 or more: the last one may still be in writing"
        yield Issue(("checkpoint.keep_latest_k",), str(latest), expected)
    if checkpoint.load_step < -1:
        yield Issue(("checkpoint.load_step",), str(checkpoint.load_step), "a step, or -1 for the latest")
    if checkpoint.initial_load_path and not checkpoint.enable:
        found = "a path that would not be loaded with checkpoint.enable = false"
        yield Issue(("checkpoint.initial_load_path", "checkpoint.enable"), found, "checkpoint.enable = true")
    if checkpoint.initial_load_in_hf and not checkpoint.initial_load_path:
        keys = ("checkpoint.initial_load_in_hf", "checkpoint.initial_load_path")
        yield Issue(keys, "true, with nothing to load", "checkpoint.initial_load_path, the Hugging Face folder")
    if checkpoint.initial_load_in_hf and not checkpoint.initial_load_model_only:
        keys = ("checkpoint.initial_load_in_hf", "checkpoint.initial_load_model_only")
        found = "true with initial_load_model_only = false"
        yield Issue(keys, found, "initial_load_model_only = true: Hugging Face folders hold weights only")


def _compile(config: JobConfig) -> Iterator[Issue]:
    compile_, ac = config.compile, config.activation_checkpoint
    if compile_.enable and compile_.components != ["model"]:
        found = f"{compile_.components}".replace("'", '"')
        yield Issue(("compile.components", "compile.enable"), found, '["model"]: the loss has a backward of its own')
    if compile_.enable and config.parallelism.tensor_parallel_degree > 1:
        found = f"true with tensor_parallel_degree = {config.parallelism.tensor_parallel_degree}"
        keys = ("compile.enable", "parallelism.tensor_parallel_degree")
        yield Issue(keys, found, "one of the two: torch cannot differentiate the compiled redistribution of a DTensor")
    if compile_.enable and config.model.name == "llama4_text":
        found = "true for a teacher, whose routing to experts has data-dependent shapes"
        yield Issue(("compile.enable", "model.name"), found, "false")
    if ac.mode == "memory_budget" and not compile_.enable:
        keys = ("activation_checkpoint.mode", "compile.enable")
        yield Issue(keys, '"memory_budget" without compilation', 'compile.enable = true, or "selective" or "full"')
    if ac.mode == "memory_budget" and not 0 <= ac.memory_budget <= 1:
        yield Issue(("activation_checkpoint.memory_budget",), str(ac.memory_budget), "a number from 0 to 1")
    option = ac.selective_ac_option
    if ac.mode == "selective" and option != "op" and not (option.isdigit() and int(option) > 0):
        keys = ("activation_checkpoint.selective_ac_option", "activation_checkpoint.mode")
        yield Issue(keys, f'"{option}"', '"op", or a positive number as a string: every nth layer')


def _loader(config: JobConfig) -> Iterator[Issue]:
    for section in ("training", "validation"):
        loader = getattr(config, section).dataloader
        key = f"{section}.dataloader"
        if loader.num_workers < 0:
            yield Issue((f"{key}.num_workers",), str(loader.num_workers), "zero or a positive number")
        for name in ("persistent_workers", "prefetch_factor"):
            if getattr(loader, name) and loader.num_workers == 0:
                keys = (f"{key}.{name}", f"{key}.num_workers")
                yield Issue(keys, f"{getattr(loader, name)} without workers", f"{key}.num_workers above 0")


_CHECKS: tuple[Callable[[JobConfig], Iterator[Issue]], ...] = (
    check_no_effect,
    check_distill,
    check_data,
    check_attention,
    check_teacher_layout,
    check_teacher_cache,
    check_needle,
    check_suite,
    _positive,
    _batch,
    _sequence,
    check_data_parallelism,
    _schedule,
    _optimizer,
    _checkpoint,
    _compile,
    check_validation,
    _loader,
    check_converters,
)

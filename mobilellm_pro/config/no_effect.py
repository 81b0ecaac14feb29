"""Keys of torchtitan's configuration that do nothing in this project, or that it cannot do, and what to use instead.

torchtitan would accept them in silence; a user who sets one believes that it works. Each entry is a key or a section. A
key at its default is not "set": it cannot mislead anybody.
"""

from collections.abc import Iterator
from typing import Any

from mobilellm_pro.config.config_error import Issue
from mobilellm_pro.config.job_config import JobConfig
from mobilellm_pro.config.typed_values import all_keys

_CORPORA = "the corpora as [[data.datasets]] tables"
_HELD_OUT = "nothing: the held-out part of [[data.datasets]] is used"
_TOKENIZER = "data.tokenizer (and teacher.path, checkpoint.initial_load_path for weights)"
_EXTENSION = "nothing: the configuration classes of this project are fixed"
_PIPELINE = "nothing: no pipeline parallelism; use FSDP, tensor or context parallelism"
_EXPERTS = "nothing: the student has no experts; the teacher's degree is teacher.parallelism.expert_parallel_degree"
_CONTEXT = "nothing: keys travel as far as the kind of layer looks; attention.context_layout says what a rank holds"
_FAULT_TOLERANCE = "nothing: a run restarts from its last checkpoint instead"
_LOW_PRECISION = "nothing: of torchtitan's converters there is that of float8 for linear layers"

NO_EFFECT: dict[str, str] = {
    "job.config_file": "the file as the first word of the command",
    "job.custom_config_module": _EXTENSION,
    "experimental.custom_args_module": _EXTENSION,
    "model.hf_assets_path": _TOKENIZER,
    "model.tokenizer_path": _TOKENIZER,
    "training.dataset": _CORPORA,
    "training.dataset_path": _CORPORA,
    "validation.dataset": _HELD_OUT,
    "validation.dataset_path": _HELD_OUT,
    "optimizer.early_step_in_backward": "false: it steps before gradients are accumulated and clipped",
    "parallelism.pipeline_parallel_degree": _PIPELINE,
    "parallelism.module_fqns_per_model_part": _PIPELINE,
    "parallelism.pipeline_parallel_first_stage_less_layers": _PIPELINE,
    "parallelism.pipeline_parallel_last_stage_less_layers": _PIPELINE,
    "parallelism.pipeline_parallel_layers_per_stage": _PIPELINE,
    "parallelism.pipeline_parallel_schedule": _PIPELINE,
    "parallelism.pipeline_parallel_schedule_csv": _PIPELINE,
    "parallelism.pipeline_parallel_microbatch_size": _PIPELINE,
    "parallelism.pipeline_parallel_expert_parallel_overlap": _PIPELINE,
    "parallelism.expert_parallel_degree": _EXPERTS,
    "parallelism.expert_tensor_parallel_degree": _EXPERTS,
    "parallelism.expert_parallel_comm_backend": _EXPERTS,
    "parallelism.context_parallel_load_balancer": _CONTEXT,
    "parallelism.context_parallel_rotate_method": _CONTEXT,
    "checkpoint.enable_ft_dataloader_checkpoints": _FAULT_TOLERANCE,
    "checkpoint.last_save_in_hf": "nothing: `mobilellm-pro convert` writes a complete Hugging Face folder",
    "checkpoint.initial_load_in_hf_quantized": "an unquantized checkpoint",
    "fault_tolerance": _FAULT_TOLERANCE,
    "quantize.linear.mx": _LOW_PRECISION,
    "quantize.grouped_mm": _LOW_PRECISION,
    "memory_estimation": "nothing: `mobilellm-pro validate` checks a job",
    "comm.mode": "default; `mobilellm-pro validate --world-size N` checks a job for N processes",
    "debug.moe_force_load_balance": "nothing: the teacher routes as it was trained",
}


def has_no_effect(key: str) -> bool:
    """Whether a dotted key, or a section that it is in, is listed here."""
    return _cure(key) is not None


def _cure(key: str) -> str | None:
    parts = key.split(".")
    sections = (".".join(parts[:count]) for count in range(1, len(parts) + 1))
    return next((NO_EFFECT[section] for section in sections if section in NO_EFFECT), None)


def check_no_effect(config: JobConfig) -> Iterator[Issue]:
    """One issue for every listed key that is not at its default."""
    default = JobConfig()
    for key, _ in all_keys(JobConfig):
        value = value_at(config, key)
        if (cure := _cure(key)) and value != value_at(default, key):
            yield Issue((key,), f"{value!r}, which has no effect here", cure)


def value_at(config: Any, key: str) -> Any:
    """The value of a dotted key."""
    for name in key.split("."):
        config = getattr(config, name)
    return config

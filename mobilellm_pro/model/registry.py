"""The models that a configuration can name: `mobilellm_pro`, the student, and `llama4_text`, a teacher to train."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import nn
from torchtitan.config import TORCH_DTYPE_MAP
from torchtitan.protocols.model import BaseModelArgs, ModelProtocol

from mobilellm_pro.config.job_config import JobConfig
from mobilellm_pro.model import student, teacher
from mobilellm_pro.model.parallelize import parallelize_student, parallelize_teacher
from mobilellm_pro.model.quantized_modules import StudentQuantization, quantize_modules


@dataclass(frozen=True)
class ModelFamily:
    """Class, flavors and layout of one model."""

    model_cls: type[ModelProtocol]
    flavors: Mapping[str, BaseModelArgs]
    parallelize: Callable[..., nn.Module]


FAMILIES = {
    "mobilellm_pro": ModelFamily(student.Student, student.FLAVORS, parallelize_student),
    "llama4_text": ModelFamily(teacher.Teacher, teacher.FLAVORS, parallelize_teacher),
}


def configured_args(config: JobConfig) -> BaseModelArgs:
    """Architecture that a configuration names, with the phase's settings applied, as a copy.

    Raises:
        ValueError: an unknown model or flavor, naming those that exist, or settings that do not fit it.
    """
    if config.model.name not in FAMILIES:
        raise ValueError(f"model.name = {config.model.name!r} is unknown; expected one of {', '.join(FAMILIES)}")
    flavors = FAMILIES[config.model.name].flavors
    if config.model.flavor not in flavors:
        raise ValueError(f"model.flavor = {config.model.flavor!r} is unknown; expected one of {', '.join(flavors)}")
    args = replace(flavors[config.model.flavor])
    args.update_from_config(config)
    return args


def model_on_meta(config: JobConfig) -> ModelProtocol:
    """The configured model without memory, for checks and plans."""
    args, quantization = configured_args(config), configured_quantization(config)
    with torch.device("meta"):
        model = FAMILIES[config.model.name].model_cls(args)
        if quantization is not None:
            quantize_modules(model, quantization)
    return model


def configured_quantization(config: JobConfig) -> StudentQuantization | None:
    """How a configuration quantizes its student while it trains; None: not."""
    chosen = config.quantization
    if chosen.scheme == "none":
        return None
    param_dtype = TORCH_DTYPE_MAP[config.training.mixed_precision_param]
    return StudentQuantization(chosen.scheme, chosen.learned_ranges, param_dtype, chosen.range_lr)

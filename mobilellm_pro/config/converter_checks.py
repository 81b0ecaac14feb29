"""Checks of `model.converters`: quantization-aware training, and products of linear layers in float8."""

import importlib.util
import json
from collections.abc import Iterator
from dataclasses import asdict

import torch

from mobilellm_pro.config.config_error import Issue, Problem
from mobilellm_pro.config.job_config import FLOAT8, QAT, JobConfig

_SECTION = "quantize.linear.float8"
_CAPABILITY = (8, 9)
"""Of the first GPUs that multiply float8: Ada and Hopper."""


def check_converters(config: JobConfig) -> Iterator[Issue]:
    """Which converters there are, and what they do not go with."""
    converters = config.model.converters
    for converter in converters:
        if converter not in (QAT, FLOAT8):
            yield Issue(("model.converters",), f'"{converter}"', f'"{QAT}", "{FLOAT8}" or nothing')
    if {QAT, FLOAT8} <= set(converters):
        yield Issue(("model.converters",), json.dumps(converters), "one of them: a weight has one low precision")
    yield from _qat(config)
    yield from _float8(config)


def _qat(config: JobConfig) -> Iterator[Issue]:
    keys, scheme = ("quantization.scheme", "model.converters"), config.quantization.scheme
    if (QAT in config.model.converters) != (scheme != "none"):
        found = f'"{scheme}" with model.converters = {json.dumps(config.model.converters)}'
        yield Issue(keys, found, f'a scheme and model.converters = ["{QAT}"], or neither')
    elif scheme != "none" and config.model.name != "mobilellm_pro":
        yield Issue(("quantization.scheme", "model.name"), f'"{scheme}" of a teacher', "a student")
    if not 0 < config.quantization.range_lr < 1:
        yield Issue(("quantization.range_lr",), str(config.quantization.range_lr), "a rate between 0 and 1")


def _float8(config: JobConfig) -> Iterator[Issue]:
    settings = config.quantize.linear.float8
    if FLOAT8 not in config.model.converters:
        for key, value in asdict(settings).items():
            if value != getattr(type(settings)(), key):
                keys = (f"{_SECTION}.{key}", "model.converters")
                yield Issue(keys, f"{value!r} without its converter", f'model.converters = ["{FLOAT8}"]')
        return
    if (degree := config.parallelism.tensor_parallel_degree) > 1:
        keys = ("model.converters", "parallelism.tensor_parallel_degree")
        yield Issue(keys, f'"{FLOAT8}" with tensor_parallel_degree = {degree}', "1, or no float8")
    if config.model.name != "mobilellm_pro":
        yield Issue(
            ("model.converters", "model.name"), f'"{FLOAT8}" of a teacher', "a student, or teacher.quantization"
        )
    training, shards = config.training, config.parallelism.context_parallel_degree
    if (tokens := training.local_batch_size * training.seq_len // shards) % 16:
        factors = ("training.seq_len", "training.local_batch_size", "parallelism.context_parallel_degree")
        yield Issue(factors, f"{tokens} tokens a rank with float8", "a multiple of 16, as its products need")
    if settings.emulate and config.compile.enable:
        yield Issue((f"{_SECTION}.emulate", "compile.enable"), "emulated and compiled", "one of them")
    if settings.emulate and settings.recipe_name:
        keys = (f"{_SECTION}.recipe_name", f"{_SECTION}.emulate")
        yield Issue(keys, f'"{settings.recipe_name}", which torchtitan does not emulate', "no recipe, or no emulation")
    for name in ("enable_fsdp_float8_all_gather", "precompute_float8_dynamic_scale_for_fsdp"):
        if getattr(settings, name):
            yield Issue((f"{_SECTION}.{name}",), "true", "false: weights are gathered as they are stored")


def check_converter_machine(config: JobConfig, device_type: str) -> Iterator[Problem]:
    """What float8 needs of the machine."""
    if FLOAT8 not in config.model.converters:
        return
    if importlib.util.find_spec("torchao") is None:
        cure = '`pip install "torchao>=0.18,<0.19"` or no converter'
        yield Problem("machine", "model.converters", f'"{FLOAT8}", without torchao', cure)
    able = device_type == "cuda" and torch.cuda.get_device_capability() >= _CAPABILITY
    if not able and not config.quantize.linear.float8.emulate:
        found = f'"{FLOAT8}" on a {device_type} machine{_capability_of(device_type)}'
        cure = f"a GPU of capability {_CAPABILITY[0]}.{_CAPABILITY[1]}, or {_SECTION}.emulate = true to try it slowly"
        yield Problem("machine", "model.converters", found, cure)


def _capability_of(device_type: str) -> str:
    return " of capability {}.{}".format(*torch.cuda.get_device_capability()) if device_type == "cuda" else ""

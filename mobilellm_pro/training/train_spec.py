"""Our models, data, optimizer and metrics as torchtitan's train specs: the one place where both sides meet."""

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torchtitan.components.lr_scheduler import build_lr_schedulers
from torchtitan.config import Optimizer as OptimizerConfig
from torchtitan.distributed import ParallelDims
from torchtitan.protocols.model_converter import _registry_model_converter_cls, register_model_converter
from torchtitan.protocols.train_spec import TrainSpec, register_train_spec

from mobilellm_pro.config.job_config import QAT
from mobilellm_pro.data.tokenizer import Tokenizer
from mobilellm_pro.model.hugging_face import PrefixAdapter
from mobilellm_pro.model.quantized_modules import StudentQuantization, is_range
from mobilellm_pro.model.registry import FAMILIES
from mobilellm_pro.training.loader import build_loader
from mobilellm_pro.training.metrics import build_metrics
from mobilellm_pro.training.qat_converter import QatConverter
from mobilellm_pro.training.step_guard import GuardedOptimizers
from mobilellm_pro.training.validation import HeldOutValidator


def register() -> None:
    """Makes our models and the converter known to torchtitan; copies of flavors: it writes into the one it trains."""
    if QAT not in _registry_model_converter_cls:
        register_model_converter(QatConverter, QAT)
    for name, family in FAMILIES.items():
        spec = TrainSpec(
            model_cls=family.model_cls,
            model_args={flavor: replace(args) for flavor, args in family.flavors.items()},
            parallelize_fn=family.parallelize,
            pipelining_fn=None,
            build_optimizers_fn=build_optimizers,
            build_lr_schedulers_fn=build_lr_schedulers,
            build_dataloader_fn=build_loader,
            build_tokenizer_fn=lambda job_config: Tokenizer.load(job_config.data.tokenizer),
            build_loss_fn=lambda job_config, **kwargs: None,  # the loss runs inside the student's forward
            build_validator_fn=HeldOutValidator,
            build_metrics_processor_fn=build_metrics,
            state_dict_adapter=PrefixAdapter,
        )
        register_train_spec(name, spec)


def build_optimizers(
    model_parts: list[nn.Module], optimizer_config: OptimizerConfig, parallel_dims: ParallelDims
) -> GuardedOptimizers:
    """torchtitan's container over AdamW (or Adam): weight decay on matrices only, learned ranges at their own rate."""
    settings: dict[str, Any] = {
        "lr": optimizer_config.lr,
        "betas": (optimizer_config.beta1, optimizer_config.beta2),
        "eps": optimizer_config.eps,
        "weight_decay": optimizer_config.weight_decay,
        "fused": optimizer_config.implementation == "fused",
        "foreach": optimizer_config.implementation == "foreach",
    }
    optimizers = {"AdamW": torch.optim.AdamW, "Adam": torch.optim.Adam}
    if optimizer_config.name not in optimizers:
        raise ValueError(f"optimizer.name = {optimizer_config.name!r}; expected one of {', '.join(optimizers)}")
    (model,) = model_parts  # there is no pipeline parallelism
    ranges = {id(parameter) for name, parameter in model.named_parameters() if is_range(name)}
    quantization = getattr(model, "quantization", None)
    range_lr = quantization.range_lr if isinstance(quantization, StudentQuantization) else 0.0
    make = partial(_with_groups, optimizers[optimizer_config.name], ranges, range_lr)
    return GuardedOptimizers(model_parts, make, settings)


def _with_groups(
    optimizer_cls: Any, ranges: set[int], range_lr: float, parameters: list[nn.Parameter], **settings: Any
) -> Any:
    weights = [p for p in parameters if id(p) not in ranges]
    undecayed = {"params": [p for p in weights if p.ndim < 2], "weight_decay": 0.0}
    groups = [{"params": [p for p in weights if p.ndim >= 2]}, undecayed]
    if ranges:
        learned = [p for p in parameters if id(p) in ranges]
        groups.append({"params": learned, "weight_decay": 0.0, "lr": range_lr})
    return optimizer_cls(groups, **settings)

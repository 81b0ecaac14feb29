"""Puts a model on a mesh: tensor, context and data parallelism, activation checkpointing, compilation.

torchtitan calls `parallelize_student` / `parallelize_teacher` on a model on the meta device; the teacher that only runs
forward has a layout of its own (`teacher_layout.py`). Order as in torchtitan: TP, CP, activation checkpointing,
compile, FSDP2.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torchtitan.config import TORCH_DTYPE_MAP
from torchtitan.distributed import ParallelDims
from torchtitan.distributed.activation_checkpoint import apply_ac
from torchtitan.distributed.tensor_parallel import maybe_enable_async_tp
from torchtitan.tools.utils import device_type

from mobilellm_pro.config.job_config import JobConfig
from mobilellm_pro.model.attention import Attend

SAVED_OPERATIONS = {
    torch.ops.aten.mm.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops._c10d_functional.reduce_scatter_tensor.default,
    torch._higher_order_ops.flex_attention,
    torch._higher_order_ops.inductor_compiled_code,
}
"""Results that selective checkpointing ("op") keeps: what costs more to compute again than to store."""


def parallelize_student(model: nn.Module, parallel_dims: ParallelDims, job_config: JobConfig) -> nn.Module:
    """TP × CP × FSDP2/HSDP for the student.

    The root FSDP unit holds the embedding and the last norm: the root stays gathered from the lookup at the start to
    the loss at the end, which runs inside its forward.
    """
    if parallel_dims.tp_enabled:
        _apply_tensor_parallel(model, parallel_dims.get_mesh("tp"))
        maybe_enable_async_tp(job_config, parallel_dims.get_mesh("tp"))
    return _parallelize(model, parallel_dims, job_config, own_units=())


def parallelize_teacher(model: nn.Module, parallel_dims: ParallelDims, job_config: JobConfig) -> nn.Module:
    """CP × FSDP2/HSDP for training a teacher; its untied embedding is a unit of its own."""
    if parallel_dims.tp_enabled:
        raise ValueError("parallelism.tensor_parallel_degree: a teacher trains with FSDP2 and context parallelism only")
    return _parallelize(model, parallel_dims, job_config, own_units=("embed_tokens",))


def _parallelize(
    model: nn.Module, parallel_dims: ParallelDims, job_config: JobConfig, own_units: tuple[str, ...]
) -> nn.Module:
    if parallel_dims.cp_enabled:
        _set_context_group(model, parallel_dims.get_mesh("cp"))
    compiled = job_config.compile.enable and "model" in job_config.compile.components
    if job_config.activation_checkpoint.mode != "none":
        apply_ac(
            model,
            job_config.activation_checkpoint,
            model_compile_enabled=compiled,
            op_sac_save_list=SAVED_OPERATIONS,
            base_folder=job_config.job.dump_folder,
        )
    if compiled:
        for layer in _layers(model).values():
            layer.compile(backend=job_config.compile.backend, fullgraph=True)
    if parallel_dims.fsdp_enabled:
        _apply_fsdp(model, parallel_dims, job_config, own_units)
    return model


def _apply_tensor_parallel(model: nn.Module, mesh: DeviceMesh) -> None:
    """Megatron's columns and rows with sequence-parallel norms; the embedding is split by vocabulary."""
    parallelize_module(
        model,
        mesh,
        {
            "embed_tokens": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
            "norm": SequenceParallel(),
        },
    )
    plan = {
        "input_layernorm": SequenceParallel(),
        "self_attn": PrepareModuleInput(
            input_layouts=(Shard(1), None, None, None), desired_input_layouts=(Replicate(), None, None, None)
        ),
        "self_attn.q_proj": ColwiseParallel(),
        "self_attn.k_proj": ColwiseParallel(),
        "self_attn.v_proj": ColwiseParallel(),
        "self_attn.o_proj": RowwiseParallel(output_layouts=Shard(1)),
        "post_attention_layernorm": SequenceParallel(),
        "mlp": PrepareModuleInput(input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),)),
        "mlp.gate_proj": ColwiseParallel(),
        "mlp.up_proj": ColwiseParallel(),
        "mlp.down_proj": RowwiseParallel(output_layouts=Shard(1)),
    }
    for layer in _layers(model).values():
        parallelize_module(layer, mesh, plan)


def _apply_fsdp(
    model: nn.Module, parallel_dims: ParallelDims, job_config: JobConfig, own_units: tuple[str, ...]
) -> None:
    names = ["dp_replicate", "fsdp"] if parallel_dims.dp_replicate_enabled else ["fsdp"]
    mesh = parallel_dims.get_mesh(names)
    settings: dict[str, Any] = {
        "mesh": mesh,
        "shard_placement_fn": expert_placement(mesh),
        "mp_policy": MixedPrecisionPolicy(
            param_dtype=TORCH_DTYPE_MAP[job_config.training.mixed_precision_param],
            reduce_dtype=TORCH_DTYPE_MAP[job_config.training.mixed_precision_reduce],
            # Hidden states have the parameters' type already; the teacher's fp32 angles must keep their own.
            cast_forward_inputs=False,
        ),
    }
    if job_config.training.enable_cpu_offload:
        settings["offload_policy"] = CPUOffloadPolicy()
    reshard = job_config.parallelism.fsdp_reshard_after_forward != "never"
    for unit in (*(model.get_submodule(name) for name in own_units), *_layers(model).values()):
        fully_shard(unit, **settings, reshard_after_forward=reshard)
    fully_shard(model, **settings, reshard_after_forward=False)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # The trainer divides by the global number of valid tokens itself.
            module.set_gradient_divide_factor(1.0)
    sum_on_gloo(model)


def expert_placement(mesh: DeviceMesh) -> Callable[[nn.Parameter], Shard | None]:
    """Splits stacked experts [E, in, out] along `in` where there are more ranks than experts.

    FSDP2 splits dim 0 and pads it to one slice a rank: 16 experts on 64 ranks would gather four times their bytes.
    """
    num_shards = mesh.size(-1)

    def placement(parameter: nn.Parameter) -> Shard | None:
        stacked = parameter.ndim == 3 and parameter.shape[0] < num_shards and parameter.shape[1] % num_shards == 0
        return Shard(1) if stacked else None

    return placement


def sum_on_gloo(model: nn.Module) -> None:
    """gloo has neither AVG nor PREMUL_SUM."""
    if device_type == "cpu":
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_force_sum_reduction_for_comms(True)


def _set_context_group(model: nn.Module, mesh: DeviceMesh) -> None:
    for layer in _layers(model).values():
        attend = layer.get_submodule("self_attn.attend")
        assert isinstance(attend, Attend)
        attend.context_group = mesh.get_group()


def _layers(model: nn.Module) -> nn.ModuleDict:
    layers = model.get_submodule("layers")
    assert isinstance(layers, nn.ModuleDict)
    return layers

"""The frozen teacher on its ranks: process groups, compilation layer by layer, FSDP2 units.

Tensor and expert parallelism are plain local tensors and explicit collectives (`teacher.py`, `experts.py`); FSDP2 then
shards what several ranks hold alike. The model is no part of a checkpoint, so nothing needs to know its whole tensors.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torchtitan.tools.utils import device_type

from mobilellm_pro.model.attention import Attend
from mobilellm_pro.model.experts import MoE
from mobilellm_pro.model.parallelize import expert_placement, sum_on_gloo
from mobilellm_pro.model.student import Student
from mobilellm_pro.model.teacher import Teacher, TeacherLayer
from mobilellm_pro.model.teacher_layout import Groups, TeacherLayout


@dataclass(frozen=True)
class TeacherGroups:
    """This rank's process groups; None where the rank would be alone.

    They are the teacher's own even where the student has groups of the same ranks: collectives of one group run one
    after another, and the teacher may run beside the student's backward pass.
    """

    tensor: dist.ProcessGroup | None
    expert: dist.ProcessGroup | None
    context: dist.ProcessGroup | None
    gather: dist.ProcessGroup | None
    spread: dist.ProcessGroup | None
    shard: dist.ProcessGroup | None
    expert_shard: dist.ProcessGroup | None


def make_groups(layout: TeacherLayout) -> TeacherGroups:
    """Makes the process groups; every rank of the job must call it."""
    return TeacherGroups(
        tensor=_own_group(layout.tensor_groups()),
        expert=_own_group(layout.expert_groups()),
        context=_own_group(layout.context_groups()),
        gather=_own_group(layout.gather_groups()),
        spread=_own_group(layout.spread_groups()),
        shard=_own_group(layout.shard_groups()),
        expert_shard=_own_group(layout.expert_shard_groups()) if layout.expert > 1 else None,
    )


def _own_group(groups: Groups) -> dist.ProcessGroup | None:
    if len(groups[0]) == 1:
        return None
    group, _ = dist.new_subgroups_by_enumeration(groups)
    assert group is not None
    return group


def connect(model: nn.Module, groups: TeacherGroups) -> None:
    """Tells the layers with whom they share rows, heads and experts."""
    for module in model.modules():
        if isinstance(module, TeacherLayer):
            module.tensor_group = groups.tensor
        elif isinstance(module, MoE):
            module.expert_group = groups.expert
        elif isinstance(module, Attend):
            module.context_group = groups.context


def compile_layers(model: Teacher | Student, backend: str = "inductor") -> None:
    """Compiles layer by layer, in place.

    Where experts are split over ranks, shapes depend on the data, and in float32 torch cannot trace the grouped
    product: of such a layer only the attention and the shared expert are compiled.
    """
    for layer in model.layers.values():
        if not isinstance(layer, TeacherLayer):
            layer.compile(backend=backend, fullgraph=True)
            continue
        feed_forward = layer.feed_forward
        traceable = layer.input_layernorm.weight.dtype == torch.bfloat16
        whole = not isinstance(feed_forward, MoE) or (traceable and feed_forward.expert_group is None)
        parts = [layer] if whole else [layer.self_attn, feed_forward.get_submodule("shared_expert")]
        for part in parts:
            part.compile(backend=backend, fullgraph=True)


def shard_frozen(model: nn.Module, groups: TeacherGroups, *, resident: bool) -> None:
    """Freezes a model on the meta device and shards it: every layer a unit, split experts one of their own.

    Every unit gathers the next one while it runs. The root unit (last norm and head) stays gathered after a forward
    pass, because the loss multiplies by the head afterwards; the caller reshards it.

    Args:
        model: the teacher, or a module with its head alone.
        groups: of this rank; without a shard group the model is left as it is.
        resident: nothing is released after use.
    """
    model.requires_grad_(False)
    if groups.shard is None:
        return
    mesh = DeviceMesh.from_group(groups.shard, device_type)
    if isinstance(model, Teacher):
        _shard_layers(model, groups, mesh, reshard=not resident)
    elif isinstance(model, Student):
        for layer in model.layers.values():
            fully_shard(layer, mesh=mesh, reshard_after_forward=not resident)
    fully_shard(model, mesh=mesh, reshard_after_forward=False)
    sum_on_gloo(model)


def _shard_layers(model: Teacher, groups: TeacherGroups, mesh: DeviceMesh, *, reshard: bool) -> None:
    units = [fully_shard(model.embed_tokens, mesh=mesh, reshard_after_forward=reshard)]
    placement = expert_placement(mesh)
    for layer in model.layers.values():
        assert isinstance(layer, TeacherLayer)
        own_unit, apart = [], set()
        if groups.expert is not None and isinstance(layer.feed_forward, MoE):
            # Only some ranks of the mesh have the same experts.
            experts = layer.feed_forward.experts
            apart = set(experts.parameters())
            if groups.expert_shard is not None:
                own_unit.append(_shard_experts(experts, groups.expert_shard, reshard=reshard))
        units.append(
            fully_shard(
                layer, mesh=mesh, reshard_after_forward=reshard, shard_placement_fn=placement, ignored_params=apart
            )
        )
        units += own_unit
    for unit, following in zip(units, units[1:]):
        unit.set_modules_to_forward_prefetch([following])


def _shard_experts(experts: nn.Module, group: dist.ProcessGroup, *, reshard: bool) -> FSDPModule:
    mesh = DeviceMesh.from_group(group, device_type)
    return fully_shard(experts, mesh=mesh, reshard_after_forward=reshard, shard_placement_fn=expert_placement(mesh))


def forget_forward(model: nn.Module) -> None:
    """Drops FSDP2's record of a forward pass, which only a backward pass would drop: it would grow with every batch."""
    for module in model.modules():
        group = module._get_fsdp_state()._fsdp_param_group if isinstance(module, FSDPModule) else None
        if group is not None:
            group._post_forward_indices.clear()
            group.comm_ctx.post_forward_order.clear()

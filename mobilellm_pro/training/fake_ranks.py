"""What one of many ranks holds, found by building the models as a job does, on meta tensors without the other ranks.

torch's fake backend answers every collective at once and moves nothing, so that one process can be rank 0 of a job of a
thousand. The models are put on their meshes by the code that trains them; only sizes are then read from them. Rank 0
holds the most: FSDP2 rounds the first slices up.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_common import FSDPMeshInfo
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from torchtitan.distributed import ParallelDims

from mobilellm_pro.config.job_config import JobConfig
from mobilellm_pro.model.parallelize import parallelize_student
from mobilellm_pro.model.registry import model_on_meta
from mobilellm_pro.model.teacher import Teacher, TeacherArgs
from mobilellm_pro.model.teacher_layout import TeacherLayout, teacher_layout
from mobilellm_pro.model.teacher_sharding import make_groups, shard_frozen
from mobilellm_pro.training.frozen_teacher import TeacherHead


@dataclass(frozen=True)
class Unit:
    """Parameters that are gathered together: an FSDP2 unit, or a model that no rank shares."""

    name: str
    """Module name; "" is the root. With ".ignored" it is what FSDP2 leaves whole of that module."""

    local_numel: int
    """Elements that the rank keeps."""

    gathered_numel: int
    """Elements in the collective's buffer, FSDP2's padding included."""

    copied_numel: int
    """Those of them that are not split along dim 0: they take one copy more on their way from the buffer."""

    num_tensors: int
    shard_degree: int
    """Ranks that hold the unit together."""


@dataclass(frozen=True)
class ModelShards:
    """The units of a model as one rank sees them, the root last."""

    units: tuple[Unit, ...]
    num_parameters: int
    """Of the whole model."""

    @property
    def local_numel(self) -> int:
        """Elements that the rank keeps."""
        return sum(unit.local_numel for unit in self.units)

    @property
    def num_tensors(self) -> int:
        """Parameters of which the rank keeps a part."""
        return sum(unit.num_tensors for unit in self.units)

    @property
    def root(self) -> Unit:
        """The unit that stays gathered from the first layer to the loss."""
        return self.units[-1]

    def largest(self, part: str) -> list[Unit]:
        """The units under one `part` ("layers", "embed_tokens") that are gathered for it together and are largest.

        What is not gathered is not among them.
        """
        groups: dict[str, list[Unit]] = {}
        for unit in self.units:
            words = unit.name.replace("_checkpoint_wrapped_module.", "").split(".")
            if words[0] == part and unit.shard_degree > 1:
                groups.setdefault(".".join(words[:2]), []).append(unit)
        return max(groups.values(), key=lambda units: sum(unit.gathered_numel for unit in units), default=[])


@contextmanager
def fake_ranks(config: JobConfig, world_size: int) -> Iterator[ParallelDims]:
    """Meshes of a job of `world_size` ranks, of which this process is rank 0; no other process exists.

    Degrees must have been checked (`check_world_size`). No other process group may be in use.
    """
    assert not dist.is_initialized(), "fake ranks need a process without a process group"
    parallelism = config.parallelism
    dist.init_process_group("fake", rank=0, world_size=world_size, store=FakeStore())
    try:
        dims = ParallelDims(
            dp_replicate=parallelism.data_parallel_replicate_degree,
            dp_shard=parallelism.data_parallel_shard_degree,
            cp=parallelism.context_parallel_degree,
            tp=parallelism.tensor_parallel_degree,
            pp=1,
            ep=1,
            etp=1,
            world_size=world_size,
        )
        dims.build_mesh()
        yield dims
    finally:
        dist.destroy_process_group()


def student_shards(config: JobConfig, dims: ParallelDims) -> ModelShards:
    """The configured student, on the meshes of `fake_ranks`."""
    model = model_on_meta(config)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    parallelize_student(model, dims, config)
    return ModelShards(tuple(_units(model)), num_parameters)


def frozen_teacher_layout(config: JobConfig, world_size: int) -> TeacherLayout:
    """[teacher.parallelism] on so many ranks."""
    student = config.parallelism
    context, tensor = student.context_parallel_degree, student.tensor_parallel_degree
    return teacher_layout(config.teacher.parallelism, world_size=world_size, context=context, tensor=tensor)


def teacher_shards(config: JobConfig, args: TeacherArgs, world_size: int) -> ModelShards:
    """The frozen teacher of this architecture, laid out by [teacher.parallelism] over the ranks of `fake_ranks`.

    Where hidden states come from a cache, it is the head alone, as in such a run.
    """
    layout = frozen_teacher_layout(config, world_size)
    with torch.device("meta"):
        num_parameters = sum(parameter.numel() for parameter in Teacher(args).parameters())
        model = TeacherHead(args) if config.teacher.cache == "read" else Teacher(args, layout.split)
    shard_frozen(model, make_groups(layout), resident=config.teacher.parallelism.resident)
    return ModelShards(tuple(_units(model)), num_parameters)


def _units(model: nn.Module) -> Iterator[Unit]:
    """Innermost first; a parameter belongs to the nearest FSDP2 unit above it."""
    taken: set[nn.Parameter] = set()
    modules = [(name, module) for name, module in model.named_modules() if isinstance(module, FSDPModule) or not name]
    for name, module in reversed(modules):
        own = [parameter for parameter in module.parameters() if parameter not in taken]
        taken.update(own)
        degree = _shard_degree(module)
        # FSDP2 leaves what it was told to ignore as it is: experts that no other rank has.
        in_shards = {parameter: degree > 1 and isinstance(parameter, DTensor) for parameter in own}
        sharded = [parameter for parameter, shared in in_shards.items() if shared]
        alone = [parameter for parameter, shared in in_shards.items() if not shared]
        if alone and sharded:
            yield _unit(f"{name}.ignored", alone, 1)
        yield _unit(name, sharded or alone, degree if sharded else 1)


def _unit(name: str, parameters: list[nn.Parameter], degree: int) -> Unit:
    local = sum(_local_numel(parameter) for parameter in parameters)
    copied = sum(_local_numel(parameter) for parameter in parameters if degree > 1 and _split_dim(parameter) != 0)
    return Unit(name, local, local * degree, copied * degree, len(parameters), degree)


def _shard_degree(module: nn.Module) -> int:
    if not isinstance(module, FSDPModule):
        return 1
    group = module._get_fsdp_state()._fsdp_param_group
    if group is None:
        return 1
    assert isinstance(group.mesh_info, FSDPMeshInfo)
    return group.mesh_info.shard_mesh_size


def _local_numel(parameter: nn.Parameter) -> int:
    return parameter.to_local().numel() if isinstance(parameter, DTensor) else parameter.numel()


def _split_dim(parameter: nn.Parameter) -> int:
    """Dim that FSDP2 splits: its axis is the mesh's last but tensor parallelism, whose dims are never 1 of 3."""
    if not isinstance(parameter, DTensor) or parameter.ndim < 3:
        return 0
    return next((placement.dim for placement in parameter.placements if isinstance(placement, Shard)), 0)

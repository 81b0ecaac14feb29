"""Where the frozen teacher lies: groups of ranks, and the part of every tensor that a rank holds.

The student's ranks are a grid (data, context, tensor), the last fastest. The teacher has the same ranks and, but for
the context axis, its own use of them: a tensor group takes the student's tensor axis first and goes on over data ranks
where it is larger; expert groups lie over the data ranks above it; weights that several ranks then hold alike are
sharded over these.

All of it is arithmetic on ranks, without a process group: a plan for a thousand ranks needs one process.
`teacher_sharding.py` makes it real.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from mobilellm_pro.config.job_config import TeacherParallelism
from mobilellm_pro.model.teacher import Split, TeacherArgs
from mobilellm_pro.model.tensor_files import Slices

Groups = list[list[int]]
"""Global ranks, group by group; every rank is in exactly one, and a group's order is the order of its parts."""


@dataclass(frozen=True)
class TeacherLayout:
    """Degrees of both models on one set of ranks, and the groups that follow.

    The degrees fit each other and the ranks: `config.teacher_checks` has seen to that before a job starts.
    """

    data: int
    """The student's data-parallel ranks, replicas and shards."""

    context: int
    """Ranks that share one row, of both models."""

    student_tensor: int
    """Ranks that hold the same rows for the student."""

    tensor: int
    """Parts of a layer of the teacher."""

    expert: int
    """Parts of the experts."""

    shard: int
    """Ranks that share one copy of the weights which they have in common (FSDP2)."""

    @property
    def world_size(self) -> int:
        """All ranks."""
        return self.data * self.context * self.student_tensor

    @property
    def split(self) -> Split:
        """What the teacher's modules need to know."""
        return Split(self.tensor, self.expert)

    @property
    def expert_shard(self) -> int:
        """Ranks that share one copy of one part of the experts: the shard degree without what the parts take of it."""
        return max(1, self.shard // self.expert)

    def tensor_groups(self) -> Groups:
        """Ranks that hold the parts of one layer and run the same tokens."""
        return self._groups("data in tensor", "tensor")

    def expert_groups(self) -> Groups:
        """Ranks that hold the parts of the experts, each with tokens of its own."""
        return self._groups("expert")

    def context_groups(self) -> Groups:
        """Ranks that hold the parts of the same rows."""
        return self._groups("context")

    def gather_groups(self) -> Groups:
        """Ranks of one tensor group whose students have different rows: together they run all of these."""
        return self._groups("data in tensor")

    def spread_groups(self) -> Groups:
        """Ranks of different tensor groups whose students have the same rows: each runs some of these."""
        return self._groups("spread")

    def shard_groups(self) -> Groups:
        """Ranks that shard everything but split experts."""
        return self._cut(self._groups("data", "expert", "context", "spread"), self.shard)

    def expert_shard_groups(self) -> Groups:
        """Ranks that shard the experts which they have in common."""
        return self._cut(self._groups("data", "context", "spread"), self.expert_shard)

    def _groups(self, *axes: str) -> Groups:
        """Ranks that differ along these axes only."""
        in_tensor = max(1, self.tensor // self.student_tensor)
        sizes = {
            "data": self.data // (in_tensor * self.expert),
            "expert": self.expert,
            "data in tensor": in_tensor,
            "context": self.context,
            "spread": max(1, self.student_tensor // self.tensor),
            "tensor": min(self.tensor, self.student_tensor),
        }
        assert math.prod(sizes.values()) == self.world_size, f"degrees that do not fit: {self}"
        grid = torch.arange(self.world_size).view(*sizes.values())
        chosen = [index for index, axis in enumerate(sizes) if axis in axes]
        others = [index for index in range(grid.ndim) if index not in chosen]
        size = math.prod(sizes[axis] for axis in axes)
        return grid.permute(*others, *chosen).reshape(-1, size).tolist()

    def _cut(self, groups: Groups, size: int) -> Groups:
        """Groups of `size` neighbours: the others of a larger group are replicas."""
        return [group[i : i + size] for group in groups for i in range(0, len(group), size)]


def teacher_layout(parallelism: TeacherParallelism, *, world_size: int, context: int, tensor: int) -> TeacherLayout:
    """The layout that [teacher.parallelism] asks for.

    Args:
        parallelism: the teacher's degrees; a shard degree of -1 becomes all ranks that hold the same weights.
        world_size: number of ranks.
        context: the context-parallel degree, shared with the student.
        tensor: the student's tensor-parallel degree.
    """
    own = parallelism.tensor_parallel_degree
    shard = parallelism.data_parallel_shard_degree
    return TeacherLayout(
        data=world_size // (context * tensor),
        context=context,
        student_tensor=tensor,
        tensor=own,
        expert=parallelism.expert_parallel_degree,
        shard=world_size // own if shard == -1 else shard,
    )


def degree_problems(args: TeacherArgs, parallelism: TeacherParallelism, dtype: str, source: str) -> Iterator[str]:
    """Degrees that do not divide what they split.

    Args:
        args: architecture of the whole teacher.
        parallelism: its degrees, which are positive.
        dtype: `teacher.dtype`.
        source: where the architecture comes from, for the messages.
    """
    degree = parallelism.tensor_parallel_degree
    kinds = {args.is_moe(i) for i in range(args.num_hidden_layers)}
    widths = [key for key, moe in (("intermediate_size", True), ("intermediate_size_mlp", False)) if moe in kinds]
    for key in ("num_attention_heads", "num_key_value_heads", *widths):
        if getattr(args, key) % degree:
            yield (
                f"teacher.parallelism.tensor_parallel_degree = {degree} does not divide {key} = {getattr(args, key)} "
                f"of {source}"
            )
    unit = 8 if dtype == "bfloat16" else 4
    if True in kinds and args.intermediate_size % degree == 0 and args.intermediate_size // degree % unit:
        yield (
            f"teacher.parallelism.tensor_parallel_degree = {degree} leaves {args.intermediate_size // degree} columns "
            f"of an expert of {source}; grouped products need a multiple of {unit} (16 bytes)"
        )
    degree = parallelism.expert_parallel_degree
    num_experts = args.num_local_experts if True in kinds else 1
    if num_experts % degree:
        yield (
            f"teacher.parallelism.expert_parallel_degree = {degree} does not divide the {num_experts} experts "
            f"of {source}"
        )


def teacher_slices(args: TeacherArgs, layout: TeacherLayout, rank: int) -> dict[str, Slices]:
    """Parameter -> dim -> half-open ranges of the full tensor that this rank's parameter consists of, in order.

    Parameters that are not listed, and dims that are not, are whole.
    """
    tensor = _position(layout.tensor_groups(), rank), layout.tensor
    expert = _position(layout.expert_groups(), rank), layout.expert
    found: dict[str, Slices] = {}
    for i in range(args.num_hidden_layers):
        heads = _part(args.num_attention_heads * args.head_dim, *tensor)
        keys = _part(args.num_key_value_heads * args.head_dim, *tensor)
        attention = f"layers.{i}.self_attn"
        found |= {f"{attention}.q_proj.weight": {0: (heads,)}, f"{attention}.o_proj.weight": {1: (heads,)}}
        found |= {f"{attention}.{name}.weight": {0: (keys,)} for name in ("k_proj", "v_proj")}
        feed_forward, width = f"layers.{i}.feed_forward", args.intermediate_size_mlp
        if args.is_moe(i):
            width = args.intermediate_size
            experts, columns = _part(args.num_local_experts, *expert), _part(width, *tensor)
            both = columns, (columns[0] + width, columns[1] + width)  # gate and up lie side by side
            found[f"{feed_forward}.experts.gate_up_proj"] = {0: (experts,), 2: both}
            found[f"{feed_forward}.experts.down_proj"] = {0: (experts,), 1: (columns,)}
            feed_forward += ".shared_expert"
        columns = _part(width, *tensor)
        found |= {f"{feed_forward}.{name}.weight": {0: (columns,)} for name in ("gate_proj", "up_proj")}
        found[f"{feed_forward}.down_proj.weight"] = {1: (columns,)}
    return found


def _part(size: int, index: int, count: int) -> tuple[int, int]:
    return index * size // count, (index + 1) * size // count


def _position(groups: Groups, rank: int) -> int:
    return next(group.index(rank) for group in groups if rank in group)

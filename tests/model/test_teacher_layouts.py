"""Groups of ranks and parts of tensors: every rank once, every element as often as it should be."""

from dataclasses import replace
from itertools import product

import pytest
import torch

from mobilellm_pro.config.job_config import TeacherParallelism
from mobilellm_pro.model.teacher import FLAVORS, Split, Teacher
from mobilellm_pro.model.teacher_layout import TeacherLayout, teacher_layout, teacher_slices
from tests.model.test_teacher import ARGS
from tests.ranks import run_ranks

MIXED = replace(ARGS, interleave_moe_layer_step=2)

# data, context, the student's tensor, the teacher's tensor, expert, shard
LAYOUTS = {
    "alone": TeacherLayout(1, 1, 1, 1, 1, 1),
    "student_tensor": TeacherLayout(2, 1, 4, 2, 2, 4),
    "equal_tensor": TeacherLayout(4, 2, 2, 2, 2, 8),
    "teacher_tensor": TeacherLayout(8, 2, 2, 4, 2, 4),
    "experts_only": TeacherLayout(8, 2, 1, 1, 4, 2),
    "replicas": TeacherLayout(8, 1, 1, 1, 1, 2),
    "everything": TeacherLayout(16, 2, 4, 8, 4, 16),
}
KINDS = ("tensor", "expert", "context", "gather", "spread", "shard", "expert_shard")


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_every_rank_is_in_one_group_of_each_kind(layout: TeacherLayout) -> None:
    sizes = {
        "tensor": layout.tensor,
        "expert": layout.expert,
        "context": layout.context,
        "gather": max(1, layout.tensor // layout.student_tensor),
        "spread": max(1, layout.student_tensor // layout.tensor),
        "shard": layout.shard,
        "expert_shard": max(1, layout.shard // layout.expert),
    }
    for kind in KINDS:
        groups = getattr(layout, f"{kind}_groups")()
        assert sorted(rank for group in groups for rank in group) == list(range(layout.world_size)), kind
        assert {len(group) for group in groups} == {sizes[kind]}, kind


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_groups_share_what_they_should(layout: TeacherLayout) -> None:
    """A student rank is (data, context, tensor); ranks with equal data and context have equal rows."""

    def rows(rank: int) -> tuple[int, int]:
        return divmod(rank // layout.student_tensor, layout.context)

    def place(rank: int) -> tuple[int, int]:
        found = []
        for groups in (layout.tensor_groups(), layout.expert_groups()):
            found.append(next(group.index(rank) for group in groups if rank in group))
        return found[0], found[1]

    for group in layout.tensor_groups() + layout.expert_groups():
        assert len({rows(rank)[1] for rank in group}) == 1, "one context index: parts of rows never mix"
    for group in layout.gather_groups():
        assert len({rows(rank) for rank in group}) == len(group)
        assert len({place(rank)[0] for rank in group}) == len(group)
    for group in layout.spread_groups():
        assert len({rows(rank) for rank in group}) == 1
        assert len({place(rank) for rank in group}) == 1
    for group in layout.context_groups():
        assert [rows(rank)[1] for rank in group] == list(range(layout.context))
        assert len({rows(rank)[0] for rank in group}) == 1 and len({place(rank) for rank in group}) == 1
    for group in layout.shard_groups():
        assert len({place(rank)[0] for rank in group}) == 1
    for group in layout.expert_shard_groups():
        assert len({place(rank) for rank in group}) == 1


def test_tensor_groups_are_neighbours() -> None:
    """The fastest links of a machine are between consecutive ranks."""
    assert LAYOUTS["everything"].tensor_groups()[0] == [0, 1, 2, 3, 8, 9, 10, 11]
    assert LAYOUTS["equal_tensor"].tensor_groups()[:2] == [[0, 1], [2, 3]]
    assert LAYOUTS["replicas"].shard_groups() == [[0, 1], [2, 3], [4, 5], [6, 7]]


def test_a_shard_degree_of_minus_one_takes_all_ranks_with_the_same_weights() -> None:
    layout = teacher_layout(TeacherParallelism(-1, 2, 4), world_size=32, context=2, tensor=1)
    assert (layout.data, layout.shard, layout.expert_shard) == (16, 16, 4)


@pytest.mark.parametrize(("tensor", "expert"), [(1, 1), (2, 1), (1, 4), (2, 2)])
def test_slices_of_all_ranks_make_the_whole_model(tensor: int, expert: int) -> None:
    """Every element is on one rank of a tensor and expert group; what is not sliced is on all."""
    layout = TeacherLayout(tensor * expert, 1, 1, tensor, expert, 1)
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in Teacher(MIXED).named_parameters()}
        parts = {name: p.shape for name, p in Teacher(MIXED, Split(tensor, expert)).named_parameters()}
    counts = {name: torch.zeros(shape, dtype=torch.int32) for name, shape in shapes.items()}
    for rank in range(layout.world_size):
        slices = teacher_slices(MIXED, layout, rank)
        assert slices.keys() <= shapes.keys()
        for name, count in counts.items():
            ranges = [slices.get(name, {}).get(dim, ((0, size),)) for dim, size in enumerate(shapes[name])]
            assert parts[name] == tuple(sum(stop - start for start, stop in dim) for dim in ranges), name
            for box in product(*ranges):
                count[tuple(slice(*side) for side in box)] += 1
    for name, count in counts.items():
        copies = expert if "experts." not in name else 1
        whole = "norm" in name or "router" in name or name in ("embed_tokens.weight", "lm_head.weight")
        assert (count == (tensor * expert if whole else copies)).all(), name


# layout, and the ranks that hold one copy of all experts together
SHARES = [
    (TeacherLayout(64, 1, 1, 1, 1, 64), 64),
    (TeacherLayout(64, 1, 1, 8, 1, 8), 64),
    (TeacherLayout(64, 1, 1, 1, 16, 64), 64),
    (TeacherLayout(64, 1, 1, 2, 16, 8), 32),
    (TeacherLayout(64, 2, 1, 1, 16, 8), 16),
]


def local_elements() -> list[tuple[int, int]]:
    """Elements of the experts and of all else on rank 0 of pretended jobs."""
    import torch.distributed as dist
    from torch.distributed.tensor import DTensor

    from mobilellm_pro.model.teacher_sharding import make_groups, shard_frozen

    found = []
    for layout, _ in SHARES:
        dist.init_process_group("fake", rank=0, world_size=layout.world_size)
        with torch.device("meta"):
            teacher = Teacher(replace(FLAVORS["scout"], num_hidden_layers=2), layout.split)
        shard_frozen(teacher, make_groups(layout), resident=False)
        counts = [0, 0]
        for name, parameter in teacher.named_parameters():
            local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
            counts[".experts." not in name] += local.numel()
        found.append((counts[0], counts[1]))
        dist.destroy_process_group()
    return found


def test_a_rank_holds_its_share() -> None:
    """Scout's experts over tensor, expert and shard ranks; the rest over tensor and shard ranks, but for its ends."""
    with torch.device("meta"):
        whole = Teacher(replace(FLAVORS["scout"], num_hidden_layers=2))
    experts = sum(p.numel() for name, p in whole.named_parameters() if ".experts." in name)
    ends = 2 * whole.lm_head.weight.numel()
    layers = sum(p.numel() for p in whole.parameters()) - experts - ends
    (found,) = run_ranks(local_elements, 1)
    for (layout, expert_ranks), (own_experts, others) in zip(SHARES, found, strict=True):
        assert own_experts * expert_ranks == experts, layout
        assert others == pytest.approx(layers / (layout.tensor * layout.shard) + ends / layout.shard, rel=2e-2), layout

"""Both models on a row that several ranks hold: outputs and every gradient equal one rank's."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate
from torchtitan.distributed import ParallelDims

from mobilellm_pro.config import load
from mobilellm_pro.model.attention_mask import DocumentMask, PackedRows, Positions
from mobilellm_pro.model.parallelize import parallelize_student, parallelize_teacher
from mobilellm_pro.model.row_shard import own_shard
from mobilellm_pro.model.student import FLAVORS as STUDENTS
from mobilellm_pro.model.student import Student
from mobilellm_pro.model.teacher import FLAVORS as TEACHERS
from mobilellm_pro.model.teacher import Teacher
from tests.ranks import run_ranks

CONFIG = Path(__file__).parents[2] / "train_configs/debug/1_language.toml"
LENGTH = 64
SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "head_dim": 8, "initializer_range": 0.1}
MODELS: dict[str, Any] = {
    # Of 4 ranks each has 16 tokens: a window within a shard, and one over more than one.
    "student, window 7": replace(STUDENTS["debug"], **SIZES, sliding_window=7),
    "student, window 20": replace(STUDENTS["debug"], **SIZES, sliding_window=20),
    # RoPE in chunks of 24, three of four layers; one expert, so that no token is near another choice.
    "teacher": replace(TEACHERS["debug"], **SIZES, num_local_experts=1, attention_chunk_size=24, floor_scale=16),
}


KINDS: list[tuple[str, Positions, DocumentMask]] = [
    ("contiguous", "continue", "block_causal"),
    ("contiguous", "reset", "block_causal"),
    ("head_tail", "reset", "block_causal"),
    ("head_tail", "continue", "causal"),
]
"""Layout of the row, positions, mask."""


@dataclass(frozen=True)
class Case:
    """A model on a layout."""

    model: str
    context: int
    tensor: int = 1
    layout: str = "contiguous"
    positions: Positions = "continue"
    documents: DocumentMask = "block_causal"


def build(case: Case) -> Student | Teacher:
    """With weights that depend on the model alone."""
    args = MODELS[case.model]
    torch.manual_seed(0)
    model = Student(args) if case.model.startswith("student") else Teacher(args)
    model.init_weights()
    return model


def rows() -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, documents that cross all borders between ranks, and an upstream gradient."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, SIZES["vocab_size"], (2, LENGTH), generator=generator)
    document_ids = torch.tensor([[0] * 10 + [1] * 27 + [2] * 27, [0] * LENGTH])
    return tokens, document_ids, torch.randn(2, LENGTH, SIZES["hidden_size"], generator=generator)


def run(model: Any, tokens: Tensor, packed: PackedRows, documents: DocumentMask, upstream: Tensor) -> Tensor:
    """Forward and backward; the last hidden states."""

    def head(hidden: Tensor, weight: Tensor) -> Tensor:
        if isinstance(hidden, DTensor):
            hidden = hidden.redistribute(placements=[Replicate()]).to_local(grad_placements=[Replicate()])
        (hidden * upstream).sum().backward()
        return hidden.detach()

    return model(tokens, packed.positions, packed.masks(model.spans(), documents), head=head)


def differences(cases: list[Case]) -> list[tuple[float, float]]:
    """One rank: the largest differences of outputs and, over its largest number, of a gradient, case by case."""
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    return [_difference(case) for case in cases]


def _difference(case: Case) -> tuple[float, float]:
    tokens, document_ids, upstream = rows()
    whole = build(case)
    expected = run(whole, tokens, PackedRows(document_ids, case.positions), case.documents, upstream)
    dims = ParallelDims(1, 1, case.context, case.tensor, pp=1, ep=1, etp=1, world_size=dist.get_world_size())
    degrees = [f"--parallelism.context_parallel_degree={case.context}", "--training.mixed_precision_param=float32"]
    config = load(CONFIG, [*degrees, f"--parallelism.tensor_parallel_degree={case.tensor}"])
    model = build(case)
    (parallelize_student if isinstance(model, Student) else parallelize_teacher)(model, dims, config)
    shard = own_shard(LENGTH, dims, case.layout)
    packed = PackedRows(document_ids, case.positions, shard)
    hidden = run(model, shard.take(tokens), packed, case.documents, shard.take(upstream))
    gradients = 0.0
    for (name, ours), (_, truth) in zip(model.named_parameters(), whole.named_parameters(), strict=True):
        if truth.grad is None:
            assert name == "lm_head.weight"
            continue
        assert isinstance(ours.grad, DTensor), name
        error = (ours.grad.full_tensor() - truth.grad).abs().max() / truth.grad.abs().max()
        gradients = max(gradients, error.item())
    return (hidden - shard.take(expected)).abs().max().item(), gradients


@pytest.mark.parametrize(("context", "tensor"), [(2, 1), (4, 1), (1, 2), (2, 2), (4, 2)])
def test_models_on_shards_equal_one_rank(context: int, tensor: int) -> None:
    cases = [
        Case(model, context, tensor, *how)
        for model in MODELS
        for how in KINDS
        if tensor == 1 or model != "teacher"  # a teacher that trains has no tensor parallelism
    ]
    for rank in run_ranks(differences, context * tensor, cases):
        for case, (output, gradient) in zip(cases, rank, strict=True):
            assert output < 1e-5 and gradient < 1e-5, (case, output, gradient)

"""The loss in chunks of tokens, with gradients made in the forward pass: four matrix products and nothing twice.

A chunk's logits are computed, reduced to a few numbers a token, overwritten by their own gradient, multiplied into the
gradients of the hidden states and of the head, and forgotten. A backward pass that recomputed logits would pay the
teacher's product, the most expensive of the four, once more; here backward only multiplies by the upstream gradient.

Shape suffixes: T tokens, C tokens of a chunk, V vocabulary slice of this rank, D student width.
"""

import math
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from mobilellm_pro.losses.chunk_logits import ChunkLogits
from mobilellm_pro.losses.full_teacher_rows import Chunk, Factors
from mobilellm_pro.losses.head_gradient import HeadGradient
from mobilellm_pro.losses.problem import Problem

# Bytes for the logits of a chunk, student and teacher together. On CPU the products run at full speed from 256 bf16
# tokens, and everything else that exists at the same time takes another 50 MiB; a GPU wants about 1,024 tokens.
LOGIT_BYTES = {"cpu": 198 * 2**20, "cuda": 800 * 2**20}
# Fast kernels want a multiple of this many tokens.
CHUNK_MULTIPLE = 16


class Statistics(Protocol):
    """A few numbers for each token of a chunk; see `FullTeacherStatistics`."""

    def weighted_sums(self, kl_weights_C: Tensor, ce_weights_C: Tensor, temperature: float) -> Tensor: ...

    def merged_over(self, group: dist.ProcessGroup) -> "Statistics": ...


class Sweep(Protocol):
    """The element-wise work on a chunk; see `full_teacher_rows.sweep_rows`."""

    def __call__(self, chunk: Chunk, factors: Factors | None, merged: Any = None) -> Statistics: ...


def chunked_distillation(problem: Problem, sweep: Sweep) -> tuple[Tensor, Tensor]:
    """Loss (scalar, differentiable) and [kl, ce, teacher_ce, teacher_entropy], as `linear_distillation` defines them.

    Works for any `sweep`: full teacher or top k, plain tensors or kernels.
    """
    wanted = [torch.is_grad_enabled() and x.requires_grad for x in (problem.student_hidden, problem.student_head)]
    return _ChunkedDistillation.apply(problem.student_hidden, problem.student_head, problem, sweep, *wanted)


class _ChunkedDistillation(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, _h: Tensor, _w: Tensor, problem: Problem, sweep: Sweep, hidden_wanted: bool, head_wanted: bool
    ) -> tuple[Tensor, Tensor]:
        sums, *gradients = _loss_and_gradients(problem, sweep, hidden_wanted, head_wanted)
        ctx.save_for_backward(*gradients)
        loss = problem.kl_weight * sums[0] + problem.ce_weight * sums[1]
        ctx.mark_non_differentiable(sums)
        return loss, sums

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        # The stored gradients may be scaled in place, without a second copy, only if this graph is not used again.
        keep = torch._C._autograd._get_current_graph_task_keep_graph()
        scaled = [None if g is None else g * upstream if keep else g.mul_(upstream) for g in ctx.saved_tensors]
        return *scaled, None, None, None, None


def _loss_and_gradients(
    problem: Problem, sweep: Sweep, hidden_wanted: bool, head_wanted: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """[kl, ce, teacher_ce, teacher_entropy] and the gradients of the loss (None where not wanted)."""
    hidden_TD, head_VD = problem.student_hidden, problem.student_head
    # Tokens of weight 0 are left out before any product, at the price of one wait for a GPU to count the others.
    used_T = problem.kl_weights.nonzero().squeeze(1)
    chunk_tokens = chunk_size(problem, len(used_T))
    chunks = used_T.split(chunk_tokens) if len(used_T) else ()
    student = ChunkLogits(head_VD, chunk_tokens, problem.fp32_logits)
    teacher = None
    if problem.teacher_head is not None:
        teacher = ChunkLogits(problem.teacher_head, chunk_tokens, problem.fp32_logits)
    grad_hidden_TD = torch.zeros_like(hidden_TD) if hidden_wanted else None
    head_gradient = HeadGradient(head_VD, len(chunks)) if head_wanted else None
    sums = hidden_TD.new_zeros(4, dtype=problem.sum_dtype)
    for rows_C in chunks:
        hidden_CD = hidden_TD.index_select(0, rows_C)
        student.compute(hidden_CD)
        if teacher is not None and problem.teacher_hidden is not None:
            teacher.compute(problem.teacher_hidden.index_select(0, rows_C))
        chunk = _chunk(problem, rows_C, student, teacher)
        factors = _factors(problem, rows_C) if hidden_wanted or head_wanted else None
        if problem.group is None:
            statistics = sweep(chunk, factors)
        else:
            statistics = sweep(chunk, None).merged_over(problem.group)
            if factors is not None:
                sweep(chunk, factors, statistics)
        sums += statistics.weighted_sums(problem.kl_weights[rows_C], problem.ce_weights[rows_C], problem.temperature)
        if grad_hidden_TD is not None:
            grad_hidden_TD.index_copy_(0, rows_C, student.gradient_CV @ head_VD)
        if head_gradient is not None:
            head_gradient.add(student.gradient_CV, hidden_CD)
    if grad_hidden_TD is not None and problem.group is not None:
        dist.all_reduce(grad_hidden_TD, group=problem.group)
    return _known(problem, sums), grad_hidden_TD, None if head_gradient is None else head_gradient.result()


def _chunk(problem: Problem, rows_C: Tensor, student: ChunkLogits, teacher: ChunkLogits | None) -> Chunk:
    labels_C = None if problem.labels is None else problem.labels[rows_C] - problem.vocab_start
    top_k = None
    if problem.teacher_ids is not None and problem.teacher_log_probs is not None:
        top_k = problem.teacher_ids[rows_C] - problem.vocab_start, problem.teacher_log_probs[rows_C]
    return Chunk(student, teacher, labels_C, problem.temperature, top_k)


def _known(problem: Problem, sums: Tensor) -> Tensor:
    """[kl, ce, teacher_ce, teacher_entropy], 0 where their inputs are not there."""
    teacher, labels = problem.has_teacher, problem.labels is not None
    known = teacher, labels, labels and problem.teacher_head is not None, teacher
    return torch.stack(
        [number if there else torch.zeros_like(number) for number, there in zip(sums, known, strict=True)]
    )


def _factors(problem: Problem, rows_C: Tensor) -> Factors:
    kl = problem.kl_weight * problem.temperature * problem.kl_weights[rows_C] if problem.kl_weight else None
    return Factors(kl, problem.ce_weight * problem.ce_weights[rows_C] if problem.ce_weight else None)


def chunk_size(problem: Problem, num_tokens: int) -> int:
    """Tokens of a chunk: as given, or equal chunks that fit the budget of bytes."""
    if problem.chunk_tokens is not None:
        return min(problem.chunk_tokens, max(1, num_tokens))
    heads = [h for h in (problem.student_head, problem.teacher_head) if h is not None]
    # All ranks of a split vocabulary must agree, or their collectives would not pair up.
    per_token = sum(problem.largest_slice * ChunkLogits.bytes_per_logit(h, problem.fp32_logits) for h in heads)
    most = max(1, LOGIT_BYTES.get(problem.student_head.device.type, LOGIT_BYTES["cuda"]) // per_token)
    num_chunks = max(1, math.ceil(num_tokens / most))
    size = max(1, math.ceil(num_tokens / num_chunks))
    rounded = math.ceil(size / CHUNK_MULTIPLE) * CHUNK_MULTIPLE
    return rounded if num_chunks > 1 and rounded <= most else size

"""The distillation loss of the project: one definition, one path, a name for each use.

    loss = sum_t w_t (kl_weight T^2 KL(softmax(z'_t / T) || softmax(z_t / T)) + ce_weight (-log softmax(z_t)[label_t]))
    z = hidden head^T  (student),   z' = teacher_hidden teacher_head^T

At 202,048 logits a token the loss, not the transformer, decides the memory of a step. The heads are therefore inputs:
logits exist only for a chunk of tokens at a time, and their gradients are made while they exist (`token_chunks.py`).
Every metric that falls out of the same logits comes along, since it costs nothing next to the matrix products.

Try it:  python -m pytest tests/losses -q

Shape suffixes: T tokens, V vocabulary slice of this rank, D student width, E teacher width.
"""

from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mobilellm_pro.losses import full_teacher_rows, top_k_rows
from mobilellm_pro.losses.full_logits import full_logits_distillation
from mobilellm_pro.losses.problem import Problem, checked_problem
from mobilellm_pro.losses.token_chunks import Sweep, chunked_distillation

IMPLEMENTATIONS = ("auto", "torch", "chunked", "triton")


class DistillationLoss(NamedTuple):
    """Sums over tokens, in nats, token weights applied; only `loss` carries a gradient.

    loss: kl_weight * kl + ce_weight * ce, scalar.
    kl: T^2 KL(teacher || student); 0 without a teacher.
    ce: cross entropy of the student on the labels; 0 without labels.
    teacher_ce: cross entropy of the teacher on the labels; 0 without labels or teacher.
    teacher_entropy: entropy of softmax(z' / T); 0 without a teacher.
    """

    loss: Tensor
    kl: Tensor
    ce: Tensor
    teacher_ce: Tensor
    teacher_entropy: Tensor


def linear_distillation(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor | None = None,
    teacher_head: Tensor | None = None,
    labels: Tensor | None = None,
    *,
    token_weights: Tensor | None = None,
    kl_weight: float = 1.0,
    ce_weight: float = 0.0,
    temperature: float = 1.0,
    chunk_tokens: int | None = None,
    vocab_group: Any = None,
    fp32_logits: bool = False,
    impl: str = "auto",
) -> DistillationLoss:
    """Full-vocabulary forward KL to a teacher plus cross entropy, both from one pass over the student's logits.

    Args:
        student_hidden: [..., D], bf16, fp32 or fp64; leading dimensions are flattened to T.
        student_head: [V, D], same dtype. With `vocab_group` it holds the rows of this rank.
        teacher_hidden, teacher_head: [..., E] and [V, E]; both or neither. They never receive a gradient.
        labels: [...] int64 ids in the whole vocabulary; -100 contributes no cross entropy, and nothing at all when
            `token_weights` is not given.
        token_weights: [...] non-negative weight of each token in every term. Tokens of weight 0 cost no work, and
            whatever stands in their hidden states is not looked at.
        kl_weight, ce_weight: factors of the two terms. A term of weight 0 is still reported when its inputs are there.
        temperature: T of the KL term, which is scaled by T^2 once. Cross entropy is always at temperature 1.
        chunk_tokens: tokens whose logits exist at once; None takes as many as a fixed budget of bytes allows.
        vocab_group: process group (or one-dimensional DeviceMesh) over whose ranks both heads are split by rows, in
            rank order, uneven slices allowed. All other tensors are the same on all ranks; each returns the full
            gradient of the hidden states and the gradient of its own rows.
        fp32_logits: accurate mode for bf16 inputs: logits good to fp32 (about 2^-17 on CPU) instead of bf16, where a
            student close to its teacher would lose a tenth of its gradient to rounding. Costs up to 0.7 times the four
            products on CPU, memory traffic elsewhere; no effect on fp32 and fp64.
        impl: "torch" (all logits at once, plain autograd: the reference), "chunked", "triton" (chunked, with CUDA
            kernels between the products), or "auto", which takes "triton" on CUDA where it is installed.

    Raises:
        ValueError: a shape, dtype, device or value does not fit; the message names what was expected.

    The same call under `torch.no_grad` computes the values without any gradient product. Gradients are those of the
    sum; divide by the number of tokens, over all ranks, outside.
    """
    problem = checked_problem(
        student_hidden,
        student_head,
        teacher_hidden,
        teacher_head,
        labels,
        token_weights=token_weights,
        kl_weight=kl_weight,
        ce_weight=ce_weight,
        temperature=temperature,
        chunk_tokens=chunk_tokens,
        vocab_group=vocab_group,
        fp32_logits=fp32_logits,
    )
    return _result(*_computed(impl, problem))


def linear_forward_kl(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    *,
    token_weights: Tensor | None = None,
    temperature: float = 1.0,
    chunk_tokens: int | None = None,
    vocab_group: Any = None,
    fp32_logits: bool = False,
    impl: str = "auto",
) -> Tensor:
    """sum_t w_t T^2 KL(softmax(z'_t / T) || softmax(z_t / T)), a scalar in nats. Arguments as `linear_distillation`."""
    return linear_distillation(
        student_hidden,
        student_head,
        teacher_hidden,
        teacher_head,
        token_weights=token_weights,
        temperature=temperature,
        chunk_tokens=chunk_tokens,
        vocab_group=vocab_group,
        fp32_logits=fp32_logits,
        impl=impl,
    ).loss


def linear_cross_entropy(
    hidden: Tensor,
    head: Tensor,
    labels: Tensor,
    *,
    token_weights: Tensor | None = None,
    chunk_tokens: int | None = None,
    vocab_group: Any = None,
    fp32_logits: bool = False,
    impl: str = "auto",
) -> Tensor:
    """sum_t w_t (-log softmax(hidden_t head^T)[label_t]), a scalar in nats. Arguments as `linear_distillation`."""
    return linear_distillation(
        hidden,
        head,
        labels=labels,
        token_weights=token_weights,
        kl_weight=0.0,
        ce_weight=1.0,
        chunk_tokens=chunk_tokens,
        vocab_group=vocab_group,
        fp32_logits=fp32_logits,
        impl=impl,
    ).loss


def linear_top_k_distillation(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_ids: Tensor,
    teacher_log_probs: Tensor,
    labels: Tensor | None = None,
    *,
    token_weights: Tensor | None = None,
    kl_weight: float = 1.0,
    ce_weight: float = 0.0,
    temperature: float = 1.0,
    chunk_tokens: int | None = None,
    vocab_group: Any = None,
    fp32_logits: bool = False,
    impl: str = "auto",
) -> DistillationLoss:
    """`linear_distillation` from a teacher's stored top k instead of its hidden states; all other ids are one outcome.

    Args:
        teacher_ids: [..., K] int64, different ids of the whole vocabulary; a negative id marks an unused place.
        teacher_log_probs: [..., K] log softmax(z' / T) at those ids, at the temperature of this call.
        impl: "auto" and "chunked" are the same, on every device; "torch" is the reference.
        Others as `linear_distillation`.

    The KL is taken over K + 1 outcomes: never above the full KL, short of it by p_tail KL(p in the tail || q in the
    tail), and equal to it for K = V. `teacher_entropy` is over the same outcomes; `teacher_ce` is not known and 0.

    Raises:
        ValueError: as `linear_distillation`.
    """
    problem = checked_problem(
        student_hidden,
        student_head,
        None,
        None,
        labels,
        token_weights=token_weights,
        kl_weight=kl_weight,
        ce_weight=ce_weight,
        temperature=temperature,
        chunk_tokens=chunk_tokens,
        vocab_group=vocab_group,
        fp32_logits=fp32_logits,
        teacher_ids=teacher_ids,
        teacher_log_probs=teacher_log_probs,
    )
    if impl == "triton":
        raise ValueError('impl: expected "auto", "chunked" or "torch" for a top-k teacher, got "triton"')
    return _result(*_computed(impl, problem))


def _result(loss: Tensor, metrics: Tensor) -> DistillationLoss:
    return DistillationLoss(loss, *metrics.detach().unbind())


def _computed(impl: str, problem: Problem) -> tuple[Tensor, Tensor]:
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl: expected one of {', '.join(IMPLEMENTATIONS)}, got {impl!r}")
    if impl == "torch":
        if problem.group is not None:
            raise ValueError('impl: "torch" is the one-rank reference; with vocab_group use "auto" or "chunked"')
        return full_logits_distillation(problem)
    if impl == "auto":
        usable = problem.student_head.is_cuda and problem.student_head.dtype != torch.float64
        impl = "triton" if usable and find_spec("triton") is not None else "chunked"
    if problem.teacher_ids is not None:
        return chunked_distillation(problem, top_k_rows.sweep_rows)
    return chunked_distillation(problem, _triton_sweep(problem) if impl == "triton" else full_teacher_rows.sweep_rows)


def _triton_sweep(problem: Problem) -> Sweep:
    if find_spec("triton") is None:
        raise ValueError('impl: "triton" expected the triton package, which is not installed')
    # Imported here, since a machine without a GPU has no need of the package.
    from mobilellm_pro.losses import triton_rows

    head_VD = problem.student_head
    if head_VD.dtype == torch.float64 or not (head_VD.is_cuda or triton_rows.interpreted()):
        raise ValueError(
            f'impl: "triton" expected bfloat16 or float32 on cuda, got {head_VD.dtype} on {head_VD.device}'
        )
    return triton_rows.sweep_rows

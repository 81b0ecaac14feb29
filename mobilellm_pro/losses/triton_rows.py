"""The element-wise work on a chunk of logits as two Triton kernels: one read for statistics, one for the gradient.

On a GPU everything between the products is memory traffic. The first kernel walks each row once with running maxima;
the second reads it once more and writes the gradient over it. That is all: nothing of the chunk's size is allocated.
Arithmetic is fp32 whatever the logits are.

Shape suffixes: C tokens of a chunk, V vocabulary slice of this rank.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mobilellm_pro.losses.full_teacher_rows import Chunk, Factors, FullTeacherStatistics

STATISTICS_BLOCK = 4096
GRADIENT_BLOCK = 2048
NUM_WARPS = 8


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter (TRITON_INTERPRET=1), on any device and slowly."""
    return bool(triton.knobs.runtime.interpret)


def sweep_rows(
    chunk: Chunk, factors: Factors | None, merged: FullTeacherStatistics | None = None
) -> FullTeacherStatistics:
    """As `full_teacher_rows.sweep_rows`; with `merged` given, only the gradient is computed and `merged` returned."""
    if merged is None:
        merged = _statistics(chunk)
    if factors is not None:
        _write_gradient(chunk, factors, merged)
    return merged


def _statistics(chunk: Chunk) -> FullTeacherStatistics:
    student_CV, teacher_CV, labels_C = _operands(chunk)
    num_tokens, vocabulary = student_CV.shape
    out_KC = student_CV.new_zeros(8, num_tokens, dtype=torch.float32)
    _statistics_kernel[(num_tokens,)](
        student_CV,
        teacher_CV,
        labels_C,
        out_KC,
        num_tokens,
        vocabulary,
        student_CV.stride(0),
        1 / chunk.temperature,
        HAS_TEACHER=chunk.teacher is not None,
        HAS_LABELS=chunk.labels is not None,
        SEPARATE=chunk.labels is not None and chunk.temperature != 1,
        BLOCK=min(STATISTICS_BLOCK, triton.next_power_of_2(vocabulary)),
        num_warps=NUM_WARPS,
    )
    return FullTeacherStatistics(*out_KC.unbind())


def _write_gradient(chunk: Chunk, factors: Factors, whole: FullTeacherStatistics) -> None:
    student_CV, teacher_CV, labels_C = _operands(chunk)
    num_tokens, vocabulary = student_CV.shape
    gradient_CV = chunk.student.gradient_CV
    block = min(GRADIENT_BLOCK, triton.next_power_of_2(vocabulary))
    _gradient_kernel[(num_tokens, triton.cdiv(vocabulary, block))](
        gradient_CV,
        student_CV,
        teacher_CV,
        labels_C,
        whole.log_sum if factors.kl is None else factors.kl,
        whole.log_sum if factors.ce is None else factors.ce,
        whole.log_sum.contiguous(),
        whole.log_sum_1.contiguous(),
        whole.teacher_log_sum.contiguous(),
        vocabulary,
        student_CV.stride(0),
        gradient_CV.stride(0),
        1 / chunk.temperature,
        HAS_KL=factors.kl is not None and chunk.teacher is not None,
        HAS_CE=factors.ce is not None and chunk.labels is not None,
        BLOCK=block,
        num_warps=NUM_WARPS,
    )


def _operands(chunk: Chunk) -> tuple[Tensor, Tensor, Tensor]:
    """Student's logits, teacher's, labels; what is absent is replaced by something of the right kind, never read."""
    student_CV = chunk.student.values_CV
    teacher_CV = student_CV if chunk.teacher is None else chunk.teacher.values_CV
    labels_C = chunk.labels
    if labels_C is None:
        labels_C = torch.full((student_CV.shape[0],), -1, dtype=torch.int64, device=student_CV.device)
    return student_CV, teacher_CV, labels_C


@triton.jit
def _scaled_sum(top: Any, total: Any, values: Any) -> Any:
    """Running maximum and sum of exponentials after a block; and what multiplies sums of the old maximum."""
    new_top = tl.maximum(top, tl.max(values, 0))
    rescale = tl.exp(top - new_top)
    return new_top, total * rescale + tl.sum(tl.exp(values - new_top), 0), rescale


@triton.jit
def _statistics_kernel(
    student_ptr: Any,
    teacher_ptr: Any,
    labels_ptr: Any,
    out_ptr: Any,
    num_tokens: Any,
    vocabulary: Any,
    stride: Any,
    inverse_temperature: Any,
    HAS_TEACHER: tl.constexpr,
    HAS_LABELS: tl.constexpr,
    SEPARATE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    token = tl.program_id(0)
    row = token.to(tl.int64) * stride
    # A finite start instead of -inf: the first rescaling must not be the exponential of inf - inf.
    z_top, z_top_1, y_top, y_top_1 = -3.0e38, -3.0e38, -3.0e38, -3.0e38
    z_sum, z_sum_1, y_sum, y_sum_1, difference, mean = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
    for begin in range(0, vocabulary, BLOCK):
        column = begin + tl.arange(0, BLOCK)
        inside = column < vocabulary
        z_1 = tl.load(student_ptr + row + column, mask=inside, other=0.0).to(tl.float32)
        z = tl.where(inside, z_1 * inverse_temperature, -float("inf"))
        z_top, z_sum, _ = _scaled_sum(z_top, z_sum, z)
        if SEPARATE:
            z_top_1, z_sum_1, _ = _scaled_sum(z_top_1, z_sum_1, tl.where(inside, z_1, -float("inf")))
        if HAS_TEACHER:
            y_1 = tl.load(teacher_ptr + row + column, mask=inside, other=0.0).to(tl.float32)
            y = tl.where(inside, y_1 * inverse_temperature, -float("inf"))
            y_top, y_sum, rescale = _scaled_sum(y_top, y_sum, y)
            share = tl.exp(y - y_top)
            difference = difference * rescale + tl.sum(share * (y_1 - z_1), 0)
            mean = mean * rescale + tl.sum(share * y_1, 0)
            if SEPARATE:
                y_top_1, y_sum_1, _ = _scaled_sum(y_top_1, y_sum_1, tl.where(inside, y_1, -float("inf")))
    out = out_ptr + token
    tl.store(out, z_top + tl.log(z_sum))
    if HAS_LABELS:
        label = tl.load(labels_ptr + token)
        present = (label >= 0) & (label < vocabulary)
        tl.store(out + num_tokens, z_top_1 + tl.log(z_sum_1) if SEPARATE else z_top + tl.log(z_sum))
        tl.store(out + 2 * num_tokens, tl.load(student_ptr + row + label, mask=present, other=0.0).to(tl.float32))
    if HAS_TEACHER:
        tl.store(out + 3 * num_tokens, y_top + tl.log(y_sum))
        tl.store(out + 6 * num_tokens, difference / y_sum * inverse_temperature)
        tl.store(out + 7 * num_tokens, mean / y_sum * inverse_temperature)
        if HAS_LABELS:
            tl.store(out + 4 * num_tokens, y_top_1 + tl.log(y_sum_1) if SEPARATE else y_top + tl.log(y_sum))
            tl.store(out + 5 * num_tokens, tl.load(teacher_ptr + row + label, mask=present, other=0.0).to(tl.float32))


@triton.jit
def _gradient_kernel(
    gradient_ptr: Any,
    student_ptr: Any,
    teacher_ptr: Any,
    labels_ptr: Any,
    kl_ptr: Any,
    ce_ptr: Any,
    log_sum_ptr: Any,
    log_sum_1_ptr: Any,
    teacher_log_sum_ptr: Any,
    vocabulary: Any,
    stride: Any,
    gradient_stride: Any,
    inverse_temperature: Any,
    HAS_KL: tl.constexpr,
    HAS_CE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    token = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < vocabulary
    row = token.to(tl.int64) * stride
    z = tl.load(student_ptr + row + column, mask=inside, other=0.0).to(tl.float32)
    gradient = tl.zeros([BLOCK], dtype=tl.float32)
    if HAS_KL:
        y = tl.load(teacher_ptr + row + column, mask=inside, other=0.0).to(tl.float32)
        q = tl.exp(z * inverse_temperature - tl.load(log_sum_ptr + token))
        p = tl.exp(y * inverse_temperature - tl.load(teacher_log_sum_ptr + token))
        gradient += (q - p) * tl.load(kl_ptr + token)
    if HAS_CE:
        q_1 = tl.exp(z - tl.load(log_sum_1_ptr + token))
        hit = (column == tl.load(labels_ptr + token)).to(tl.float32)
        gradient += (q_1 - hit) * tl.load(ce_ptr + token)
    out = gradient_ptr + token.to(tl.int64) * gradient_stride + column
    tl.store(out, gradient.to(gradient_ptr.dtype.element_ty), mask=inside)

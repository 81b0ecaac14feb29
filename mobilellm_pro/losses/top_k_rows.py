"""Element-wise work on a chunk whose teacher is known only by its k likeliest tokens and the mass of all others.

Each token's distributions are compared over k + 1 outcomes: the k tokens, and "any other". With p the teacher's
probabilities, q the student's and K the set of ids:

    KL_k = sum_{v in K} p_v log(p_v / q_v) + p_tail log(p_tail / q_tail),   p_tail = 1 - sum_K p,  q_tail = 1 - sum_K q

Merging outcomes can only lose divergence: KL_k = KL - p_tail KL(p given tail || q given tail), so it never exceeds the
full KL, is equal to it for k = V, and leaves the student free to spread the tail's mass as it likes.

Shape suffixes: C tokens of a chunk, N tokens of a tile, K ids of a token, V vocabulary slice of this rank.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from mobilellm_pro.losses.full_teacher_rows import (
    Chunk,
    Factors,
    TileSoftmax,
    gathered,
    inside_slice,
    label_logit,
    tile_height,
)


class TopKStatistics(NamedTuple):
    """For each token [C], in nats. The first five are over the vocabulary seen so far, the others the teacher's own.

    log_sum: log sum_v exp(z / T); log_sum_1: at temperature 1; tail_log_sum: over the ids outside K (-inf if none).
    label_logit: z[label]; cross: sum_K p z / T, over the ids of K that were seen.
    mass: sum_K p; negative_entropy: sum_K p log p.
    """

    log_sum: Tensor
    log_sum_1: Tensor
    tail_log_sum: Tensor
    label_logit: Tensor
    cross: Tensor
    mass: Tensor
    negative_entropy: Tensor

    @property
    def tail(self) -> Tensor:
        """p_tail; 0 when no id is outside K, whatever rounding left of the sum."""
        return torch.where(self.tail_log_sum.isneginf(), 0, (1 - self.mass).clamp_min(0))

    def weighted_sums(self, kl_weights_C: Tensor, ce_weights_C: Tensor, temperature: float) -> Tensor:
        """[kl, ce, 0, entropy over the k + 1 outcomes] summed over the chunk."""
        tail_C = self.tail
        negative_entropy_C = self.negative_entropy + torch.xlogy(tail_C, tail_C)
        tail_logit_C = torch.where(tail_C > 0, self.tail_log_sum, 0)
        kl_C = negative_entropy_C - self.cross - tail_C * tail_logit_C + (self.mass + tail_C) * self.log_sum
        ce = (self.log_sum_1 - self.label_logit) @ ce_weights_C
        kl = temperature**2 * (kl_C @ kl_weights_C)
        return torch.stack([kl, ce, torch.zeros_like(ce), -(negative_entropy_C @ kl_weights_C)])

    def merged_over(self, group: dist.ProcessGroup) -> "TopKStatistics":
        """Statistics of the whole vocabulary from those of the slices: one all-gather of five numbers a token."""
        log_sum, log_sum_1, tail_log_sum, label_logit_RC, cross_RC = gathered(torch.stack(self[:5]), group).unbind(1)
        return TopKStatistics(
            log_sum=log_sum.logsumexp(0),
            log_sum_1=log_sum_1.logsumexp(0),
            tail_log_sum=tail_log_sum.logsumexp(0),
            label_logit=label_logit_RC.sum(0),
            cross=cross_RC.sum(0),
            mass=self.mass,
            negative_entropy=self.negative_entropy,
        )


def sweep_rows(chunk: Chunk, factors: Factors | None, merged: TopKStatistics | None = None) -> TopKStatistics:
    """As `full_teacher_rows.sweep_rows`, for a chunk with `top_k`."""
    head_VD, num_tokens = chunk.student.head_VD, chunk.student.num_tokens
    dtype = torch.promote_types(head_VD.dtype, torch.float32)
    local = TopKStatistics(*head_VD.new_zeros(7, num_tokens, dtype=dtype).unbind())
    tile_tokens = tile_height(head_VD)
    for begin in range(0, num_tokens, tile_tokens):
        rows = slice(begin, begin + tile_tokens)
        here = TopKStatistics(*(column[rows] for column in local))
        whole = here if merged is None else TopKStatistics(*(column[rows] for column in merged))
        _sweep_tile(chunk, rows, here, whole, factors)
    return local


def _sweep_tile(
    chunk: Chunk, rows: slice, here: TopKStatistics, whole: TopKStatistics, factors: Factors | None
) -> None:
    assert chunk.top_k is not None
    ids_NK, log_p_NK = (x[rows] for x in chunk.top_k)
    vocabulary = chunk.student.head_VD.shape[0]
    z_NV = chunk.student.tile(rows, here.log_sum.new_empty(len(ids_NK), vocabulary))
    q = q_1 = TileSoftmax.of(z_NV, chunk.temperature)
    here.log_sum.copy_(q.log_sum)
    if chunk.labels is not None:
        q_1 = q if chunk.temperature == 1 else TileSoftmax.of(z_NV, 1.0)
        here.log_sum_1.copy_(q_1.log_sum)
        here.label_logit.copy_(label_logit(z_NV, chunk.labels[rows]))
    p_NK = log_p_NK.exp()
    here.mass.copy_(p_NK.sum(1))
    here.negative_entropy.copy_(torch.where(p_NK > 0, p_NK * log_p_NK, 0).sum(1))
    inside_NK, index_NK = inside_slice(ids_NK, vocabulary)
    z_NV = z_NV / chunk.temperature
    here.cross.copy_((p_NK * torch.where(inside_NK, z_NV.gather(1, index_NK), 0)).sum(1))
    # Adding, not writing: ids of other slices point at column 0, which must keep its value.
    minus_infinity = z_NV.new_tensor(-torch.inf)
    tail_NV = z_NV.scatter_add_(1, index_NK, torch.where(inside_NK, minus_infinity, 0))
    here.tail_log_sum.copy_(tail_NV.logsumexp(1))
    if factors is None:
        return
    gradient_NV = torch.zeros_like(q.shares)
    if factors.ce is not None and chunk.labels is not None:
        present_N, label_N = inside_slice(chunk.labels[rows], vocabulary)
        q_1.scaled(factors.ce[rows], whole.log_sum_1, gradient_NV)  # not in place: both terms may scale one softmax
        gradient_NV.scatter_add_(1, label_N[:, None], -(factors.ce[rows] * present_N)[:, None])
    if factors.kl is not None:
        kl_N = factors.kl[rows]
        gradient_NV.add_(q.scaled(kl_N * (whole.mass + whole.tail), whole.log_sum))
        finite_N = torch.where(whole.tail_log_sum.isneginf(), 0, whole.tail_log_sum)
        gradient_NV.sub_(tail_NV.sub_(finite_N[:, None]).exp_().mul_((kl_N * whole.tail)[:, None]))
        gradient_NV.scatter_add_(1, index_NK, -(kl_N[:, None] * p_NK * inside_NK))
    chunk.student.gradient_CV[rows] = gradient_NV

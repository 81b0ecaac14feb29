"""Element-wise work on a chunk of logits whose teacher knows the whole vocabulary: a few numbers and the gradient.

Each row is read once for its statistics and, while it is still in the cache, overwritten by its gradient. With a split
vocabulary the statistics of all ranks are merged in between, so there the rows are swept twice.

Shape suffixes: C tokens of a chunk, N tokens of a tile, V vocabulary slice of this rank, R ranks.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from mobilellm_pro.losses.chunk_logits import ChunkLogits
from mobilellm_pro.losses.problem import all_gather

# fp32 logits of a tile: few enough for a CPU's last-level cache, enough to fill a GPU.
TILE_BYTES = {"cpu": 5 * 2**20, "cuda": 64 * 2**20}


class Factors(NamedTuple):
    """What multiplies each token's gradient [C]: kl_weight T w and ce_weight w; None where the term has weight 0."""

    kl: Tensor | None
    ce: Tensor | None


class Chunk(NamedTuple):
    """Logits of a chunk; labels [C] are ids within the slice (anything outside is on another rank, or absent).

    top_k: (ids within the slice [C, K], log probabilities [C, K]) instead of a teacher's logits, or None.
    """

    student: ChunkLogits
    teacher: ChunkLogits | None
    labels: Tensor | None
    temperature: float
    top_k: tuple[Tensor, Tensor] | None = None


class FullTeacherStatistics(NamedTuple):
    """For each token [C], over the vocabulary seen so far, in nats; everything about the teacher is 0 without one.

    log_sum, teacher_log_sum: log sum_v exp(z / T).
    log_sum_1, teacher_log_sum_1: the same at temperature 1, which cross entropy uses (0 without labels).
    difference: sum_v p (z' - z) / T, and teacher_mean: sum_v p z' / T, where p = softmax(z' / T).
    label_logit, teacher_label_logit: z[label], 0 where the label is absent or lies on another rank.
    """

    log_sum: Tensor
    log_sum_1: Tensor
    label_logit: Tensor
    teacher_log_sum: Tensor
    teacher_log_sum_1: Tensor
    teacher_label_logit: Tensor
    difference: Tensor
    teacher_mean: Tensor

    def weighted_sums(self, kl_weights_C: Tensor, ce_weights_C: Tensor, temperature: float) -> Tensor:
        """[kl, ce, teacher_ce, teacher_entropy] summed over the chunk; meaningless where there was no such input."""
        kl_C = temperature**2 * (self.difference - self.teacher_log_sum + self.log_sum)
        ce_C, teacher_ce_C = self.log_sum_1 - self.label_logit, self.teacher_log_sum_1 - self.teacher_label_logit
        entropy_C = self.teacher_log_sum - self.teacher_mean
        return torch.stack(
            [kl_C @ kl_weights_C, ce_C @ ce_weights_C, teacher_ce_C @ ce_weights_C, entropy_C @ kl_weights_C]
        )

    def merged_over(self, group: dist.ProcessGroup) -> "FullTeacherStatistics":
        """Statistics of the whole vocabulary from those of the slices: one all-gather of eight numbers a token."""
        slices = FullTeacherStatistics(*gathered(torch.stack(self), group).unbind(1))
        teacher_log_sum = slices.teacher_log_sum.logsumexp(0)
        share_RC = (slices.teacher_log_sum - teacher_log_sum).exp()
        return FullTeacherStatistics(
            log_sum=slices.log_sum.logsumexp(0),
            log_sum_1=slices.log_sum_1.logsumexp(0),
            label_logit=slices.label_logit.sum(0),
            teacher_log_sum=teacher_log_sum,
            teacher_log_sum_1=slices.teacher_log_sum_1.logsumexp(0),
            teacher_label_logit=slices.teacher_label_logit.sum(0),
            difference=(share_RC * slices.difference).sum(0),
            teacher_mean=(share_RC * slices.teacher_mean).sum(0),
        )


def gathered(local_KC: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[R, K, C] from [K, C] of each rank, in one collective."""
    all_RKC = local_KC.new_empty(dist.get_world_size(group), *local_KC.shape)
    all_gather(all_RKC.flatten(0, 1), local_KC, group=group)
    return all_RKC


def sweep_rows(
    chunk: Chunk, factors: Factors | None, merged: FullTeacherStatistics | None = None
) -> FullTeacherStatistics:
    """Statistics of this slice; with `factors`, the gradient too, over the vocabulary that `merged` describes.

    The gradient of a row is kl (softmax(z/T) - softmax(z'/T)) + ce (softmax(z) - onehot(label)); it overwrites the
    student's logits. `merged` None means that this slice is the whole vocabulary.
    """
    head_VD, num_tokens = chunk.student.head_VD, chunk.student.num_tokens
    dtype = torch.promote_types(head_VD.dtype, torch.float32)
    local = FullTeacherStatistics(*head_VD.new_zeros(8, num_tokens, dtype=dtype).unbind())
    tile_tokens = min(num_tokens, tile_height(head_VD))
    # One piece of memory for all tiles: what is returned to the system after each of them costs more than it holds.
    scratch_5NV = head_VD.new_empty(5, tile_tokens, head_VD.shape[0], dtype=dtype)
    for begin in range(0, num_tokens, tile_tokens):
        rows = slice(begin, min(begin + tile_tokens, num_tokens))
        here = FullTeacherStatistics(*(column[rows] for column in local))
        whole = here if merged is None else FullTeacherStatistics(*(column[rows] for column in merged))
        _sweep_tile(chunk, rows, here, whole, factors, scratch_5NV[:, : rows.stop - begin])
    return local


def _sweep_tile(
    chunk: Chunk,
    rows: slice,
    here: FullTeacherStatistics,
    whole: FullTeacherStatistics,
    factors: Factors | None,
    scratch_5NV: Tensor,
) -> None:
    z_NV, y_NV, q_NV, p_NV, work_NV = scratch_5NV
    temperature = chunk.temperature
    z_NV = chunk.student.tile(rows, z_NV)
    labels = None if chunk.labels is None else chunk.labels[rows]
    q = q_1 = TileSoftmax.of(z_NV, temperature, q_NV)
    here.log_sum.copy_(q.log_sum)
    if labels is not None:
        q_1 = q if temperature == 1 else TileSoftmax.of(z_NV, 1.0)
        here.log_sum_1.copy_(q_1.log_sum)
        here.label_logit.copy_(label_logit(z_NV, labels))
    p = None
    if chunk.teacher is not None:
        y_NV = chunk.teacher.tile(rows, y_NV)
        p = TileSoftmax.of(y_NV, temperature, p_NV)
        here.teacher_log_sum.copy_(p.log_sum)
        here.teacher_mean.copy_(p.sum_of(y_NV, work_NV) / temperature)
        here.difference.copy_(p.sum_of(torch.sub(y_NV, z_NV, out=work_NV), work_NV) / temperature)
        if labels is not None:
            p_1 = p if temperature == 1 else TileSoftmax.of(y_NV, 1.0)
            here.teacher_log_sum_1.copy_(p_1.log_sum)
            here.teacher_label_logit.copy_(label_logit(y_NV, labels))
    if factors is not None:
        tile_factors = Factors(*(None if f is None else f[rows] for f in factors))
        gradient_NV = chunk.student.gradient_CV[rows]
        # Terms are added up in the dtype of the sweep, where the gradient has it right in its own place.
        out_NV = gradient_NV if gradient_NV.dtype == q.shares.dtype else q.shares
        _write_gradient(out_NV, q, q_1, p, labels, whole, tile_factors)
        if out_NV is not gradient_NV:
            gradient_NV.copy_(out_NV)


class TileSoftmax(NamedTuple):
    """shares [N, V]: softmax over this slice up to a factor; total [N]: their sum; log_sum [N]: log sum exp(z / T)."""

    shares: Tensor
    total: Tensor
    log_sum: Tensor

    @classmethod
    def of(cls, z_NV: Tensor, temperature: float, out_NV: Tensor | None = None) -> "TileSoftmax":
        """Of logits [N, V], which stay as they are; shares are written to `out_NV` where it is given."""
        # torch.softmax is by far the fastest way to an exponential here, but adds 202,048 terms one by one and is off
        # by 7e-6; torch.sum adds in pairs. A share's largest value is 1 / (the sum that softmax used).
        if temperature != 1:
            z_NV = z_NV / temperature
        shares_NV = torch.softmax(z_NV, 1, out=out_NV)
        total_N = shares_NV.sum(1)
        return cls(shares_NV, total_N, z_NV.amax(1) - shares_NV.amax(1).log() + total_N.log())

    def sum_of(self, values_NV: Tensor, work_NV: Tensor) -> Tensor:
        """[N] sum_v probability times value, by way of `work_NV`, which may be the values themselves."""
        return torch.mul(self.shares, values_NV, out=work_NV).sum(1) / self.total

    def scaled(self, factor_N: Tensor, whole_log_sum_N: Tensor, out_NV: Tensor | None = None) -> Tensor:
        """factor times the probabilities over the whole vocabulary, in `out_NV` or in the place of the shares."""
        scale_N = factor_N * (self.log_sum - whole_log_sum_N).exp() / self.total
        return torch.mul(self.shares, scale_N[:, None], out=self.shares if out_NV is None else out_NV)


def _write_gradient(
    out_NV: Tensor,
    q: TileSoftmax,
    q_1: TileSoftmax,
    p: TileSoftmax | None,
    labels: Tensor | None,
    whole: FullTeacherStatistics,
    factors: Factors,
) -> None:
    kl_N, ce_N = factors
    if kl_N is not None:
        both = ce_N is not None and q_1 is q
        q.scaled(kl_N + ce_N if both else kl_N, whole.log_sum, out_NV)  # type: ignore[operator]
        if p is not None:
            # Not fused with the scaling above: equal logits give exactly 0 only if both sides are rounded alike.
            out_NV.sub_(p.scaled(kl_N, whole.teacher_log_sum))
        if ce_N is not None and not both:
            out_NV.add_(q_1.scaled(ce_N, whole.log_sum_1))
    elif ce_N is not None:
        q_1.scaled(ce_N, whole.log_sum_1, out_NV)
    else:
        out_NV.zero_()
    if ce_N is not None and labels is not None:
        inside, index = inside_slice(labels, out_NV.shape[1])
        out_NV.scatter_add_(1, index[:, None], -(ce_N * inside)[:, None])


def tile_height(head_VD: Tensor) -> int:
    """Tokens of a tile; at least one."""
    return max(1, TILE_BYTES.get(head_VD.device.type, TILE_BYTES["cuda"]) // (4 * head_VD.shape[0]))


def inside_slice(ids: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Whether each id lies in this slice, and an index that is safe to gather with."""
    return (ids >= 0) & (ids < size), ids.clamp(0, size - 1)


def label_logit(z_NV: Tensor, labels_N: Tensor) -> Tensor:
    """z[label] of each token, 0 where the label is not in this slice."""
    inside, index = inside_slice(labels_N, z_NV.shape[1])
    return torch.where(inside, z_NV.gather(1, index[:, None]).squeeze(1), 0)

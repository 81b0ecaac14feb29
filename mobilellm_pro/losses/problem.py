"""The arguments of a distillation loss, checked once and brought to one form for every implementation.

A wrong shape that broadcasts, or a label outside the vocabulary, would train a model on nonsense without a word, so
everything a caller can get wrong is refused here by name, before any product is computed.

Shape suffixes: T tokens, V vocabulary slice of this rank, D student width, E teacher width.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

IGNORED_LABEL = -100
# The newer name; torch 2.11 has the older one only.
all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
DTYPES = (torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Problem:
    """What every implementation computes: flat tensors, weights of both terms a token, and how to split the work.

    student_hidden [T, D], student_head [V, D]; teacher_hidden [T, E] and teacher_head [V, E], or teacher_ids and
    teacher_log_probs [T, K] (in `sum_dtype`, -inf in unused places), or no teacher.
    labels [T], -100 where there is none, or None. kl_weights, ce_weights [T] in `sum_dtype`: the token weight of each
    term (not yet multiplied by kl_weight and ce_weight). group: process group of the vocabulary, or None; vocab_start:
    first id of this rank's slice; largest_slice: rows of the largest, by which all ranks choose the same chunks.
    """

    student_hidden: Tensor
    student_head: Tensor
    teacher_hidden: Tensor | None
    teacher_head: Tensor | None
    labels: Tensor | None
    kl_weights: Tensor
    ce_weights: Tensor
    kl_weight: float
    ce_weight: float
    temperature: float
    chunk_tokens: int | None
    fp32_logits: bool
    group: dist.ProcessGroup | None
    vocab_start: int
    largest_slice: int
    teacher_ids: Tensor | None = None
    teacher_log_probs: Tensor | None = None

    @property
    def has_teacher(self) -> bool:
        return self.teacher_head is not None or self.teacher_ids is not None

    @property
    def sum_dtype(self) -> torch.dtype:
        return torch.promote_types(self.student_hidden.dtype, torch.float32)


def checked_problem(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor | None,
    teacher_head: Tensor | None,
    labels: Tensor | None,
    *,
    token_weights: Tensor | None,
    kl_weight: float,
    ce_weight: float,
    temperature: float,
    chunk_tokens: int | None,
    vocab_group: Any,
    fp32_logits: bool,
    teacher_ids: Tensor | None = None,
    teacher_log_probs: Tensor | None = None,
) -> Problem:
    """Check and flatten the arguments of `linear_distillation`; ValueError names what was expected."""
    _check_numbers(kl_weight, ce_weight, temperature, chunk_tokens)
    _check_pair("student_hidden", student_hidden, "student_head", student_head)
    _check_teacher(teacher_hidden, teacher_head, student_hidden, student_head)
    if teacher_head is None and teacher_ids is None and kl_weight != 0:
        raise ValueError(f"kl_weight: expected 0 without a teacher, got {kl_weight}")
    if labels is None and ce_weight != 0:
        raise ValueError(f"ce_weight: expected 0 without labels, got {ce_weight}")
    group = _process_group(vocab_group)
    start, total, largest = _vocab_range(student_head, group)
    if labels is not None:
        _check_labels(labels, student_hidden.shape[:-1], student_hidden.device, total)
    if teacher_ids is not None and teacher_log_probs is not None:
        _check_top_k(teacher_ids, teacher_log_probs, student_hidden, total)
        dtype = torch.promote_types(student_hidden.dtype, torch.float32)
        teacher_ids = teacher_ids.reshape(-1, teacher_ids.shape[-1])
        teacher_log_probs = teacher_log_probs.detach().reshape(teacher_ids.shape).to(dtype)
        teacher_log_probs = teacher_log_probs.masked_fill(teacher_ids < 0, -torch.inf)
    flat_labels = None if labels is None else labels.reshape(-1)
    kl_weights, ce_weights = _weights(student_hidden, flat_labels, token_weights)
    return Problem(
        student_hidden=student_hidden.reshape(-1, student_hidden.shape[-1]),
        student_head=student_head,
        teacher_hidden=None
        if teacher_hidden is None
        else teacher_hidden.detach().reshape(-1, teacher_hidden.shape[-1]),
        teacher_head=None if teacher_head is None else teacher_head.detach(),
        labels=flat_labels,
        kl_weights=kl_weights,
        ce_weights=ce_weights,
        kl_weight=float(kl_weight),
        ce_weight=float(ce_weight),
        temperature=float(temperature),
        chunk_tokens=chunk_tokens,
        fp32_logits=fp32_logits,
        group=group,
        vocab_start=start,
        largest_slice=largest,
        teacher_ids=teacher_ids,
        teacher_log_probs=teacher_log_probs,
    )


def _check_numbers(kl_weight: float, ce_weight: float, temperature: float, chunk_tokens: int | None) -> None:
    for name, value in (("kl_weight", kl_weight), ("ce_weight", ce_weight)):
        if not math.isfinite(value) or value < 0:
            raise ValueError(f"{name}: expected a finite number of at least 0, got {value}")
    if not math.isfinite(temperature) or temperature <= 0:
        raise ValueError(f"temperature: expected a finite number above 0, got {temperature}")
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ValueError(f"chunk_tokens: expected at least 1, or None, got {chunk_tokens}")


def _check_pair(hidden_name: str, hidden: Tensor, head_name: str, head: Tensor) -> None:
    if hidden.ndim < 1 or head.ndim != 2 or head.shape[0] == 0 or hidden.shape[-1] != head.shape[1]:
        raise ValueError(
            f"{hidden_name}, {head_name}: expected [..., width] and [vocabulary, width], "
            f"got {list(hidden.shape)} and {list(head.shape)}"
        )
    if hidden.dtype not in DTYPES:
        raise ValueError(f"{hidden_name}: expected bfloat16, float32 or float64, got {hidden.dtype}")
    _check_same(f"{head_name} dtype", head.dtype, hidden.dtype)
    _check_same(f"{head_name} device", head.device, hidden.device)


def _check_teacher(hidden: Tensor | None, head: Tensor | None, student_hidden: Tensor, student_head: Tensor) -> None:
    if (hidden is None) != (head is None):
        raise ValueError("teacher_hidden, teacher_head: expected both or neither")
    if hidden is None or head is None:
        return
    _check_pair("teacher_hidden", hidden, "teacher_head", head)
    _check_same("teacher_hidden leading dimensions", tuple(hidden.shape[:-1]), tuple(student_hidden.shape[:-1]))
    _check_same("teacher_head rows (vocabulary)", head.shape[0], student_head.shape[0])
    _check_same("teacher_hidden device", hidden.device, student_hidden.device)


def _check_same(name: str, got: Any, expected: Any) -> None:
    if got != expected:
        raise ValueError(f"{name}: expected {expected}, got {got}")


def _check_labels(labels: Tensor, leading: torch.Size, device: torch.device, vocabulary: int) -> None:
    _check_same("labels shape", tuple(labels.shape), tuple(leading))
    _check_same("labels dtype", labels.dtype, torch.int64)
    _check_same("labels device", labels.device, device)
    # On an accelerator the same check would stall the queue; there the gather's own bounds assertion catches it.
    if device.type == "cpu" and labels.numel():
        bad = labels[(labels != IGNORED_LABEL) & ((labels < 0) | (labels >= vocabulary))]
        if bad.numel():
            raise ValueError(f"labels: expected {IGNORED_LABEL} or an id in [0, {vocabulary}), got {bad[0].item()}")


def _check_top_k(ids: Tensor, log_probs: Tensor, student_hidden: Tensor, vocabulary: int) -> None:
    _check_same("teacher_ids leading dimensions", tuple(ids.shape[:-1]), tuple(student_hidden.shape[:-1]))
    _check_same("teacher_ids dtype", ids.dtype, torch.int64)
    _check_same("teacher_ids device", ids.device, student_hidden.device)
    _check_same("teacher_log_probs shape", tuple(log_probs.shape), tuple(ids.shape))
    _check_same("teacher_log_probs device", log_probs.device, student_hidden.device)
    if not log_probs.is_floating_point():
        raise ValueError(f"teacher_log_probs: expected floating point, got {log_probs.dtype}")
    if ids.device.type == "cpu" and ids.numel() and int(ids.max()) >= vocabulary:
        raise ValueError(f"teacher_ids: expected ids in [0, {vocabulary}), or -1 for unused, got {int(ids.max())}")


def _weights(student_hidden: Tensor, flat_labels: Tensor | None, token_weights: Tensor | None) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(student_hidden.dtype, torch.float32)
    leading = student_hidden.shape[:-1]
    present = None if flat_labels is None else flat_labels != IGNORED_LABEL
    if token_weights is not None:
        _check_same("token_weights shape", tuple(token_weights.shape), tuple(leading))
        _check_same("token_weights device", token_weights.device, student_hidden.device)
        kl_weights = token_weights.detach().reshape(-1).to(dtype)
    elif present is not None:
        kl_weights = present.to(dtype)
    else:
        kl_weights = torch.ones(leading.numel(), dtype=dtype, device=student_hidden.device)
    return kl_weights, kl_weights if present is None else kl_weights * present


def _process_group(vocab_group: Any) -> dist.ProcessGroup | None:
    if isinstance(vocab_group, DeviceMesh):
        if vocab_group.ndim != 1:
            raise ValueError(f"vocab_group: expected a one-dimensional DeviceMesh, got {vocab_group.ndim} dimensions")
        vocab_group = vocab_group.get_group()
    if vocab_group is None:
        return None
    if not isinstance(vocab_group, dist.ProcessGroup):
        raise ValueError(f"vocab_group: expected a ProcessGroup or DeviceMesh, got {type(vocab_group).__name__}")
    return None if dist.get_world_size(vocab_group) == 1 else vocab_group


def _vocab_range(head: Tensor, group: dist.ProcessGroup | None) -> tuple[int, int, int]:
    """First id of this rank's rows, the size of the whole vocabulary, and that of the largest slice."""
    if group is None:
        return 0, head.shape[0], head.shape[0]
    sizes = torch.empty(dist.get_world_size(group), dtype=torch.int64, device=head.device)
    all_gather(sizes, torch.tensor([head.shape[0]], device=head.device), group=group)
    rows = sizes.tolist()
    return sum(rows[: dist.get_rank(group)]), sum(rows), max(rows)

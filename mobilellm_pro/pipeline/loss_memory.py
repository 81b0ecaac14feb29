"""Memory of the loss while it runs, by its own rule for the size of a chunk of tokens."""

from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from mobilellm_pro.config import JobConfig
from mobilellm_pro.losses.chunk_logits import BLOCK_ROWS, ChunkLogits
from mobilellm_pro.losses.full_teacher_rows import tile_height
from mobilellm_pro.losses.problem import Problem
from mobilellm_pro.losses.token_chunks import chunk_size
from mobilellm_pro.model.student import StudentArgs
from mobilellm_pro.pipeline.step_shape import StepShape


@dataclass(frozen=True)
class LossWorkspace:
    """Bytes of the loss while it runs."""

    chunk_tokens: int
    logits: int
    """Of a chunk, both models', with what one pass over them needs."""

    head_gradient: int
    """The student head's gradient, and its fp32 sum where there is one."""

    hidden: int
    """The student's hidden states with their gradient, and copies of a chunk's hidden states."""

    kept: int
    """What backward starts from: the gradients of hidden states and head."""

    @property
    def total(self) -> int:
        """All of it at once."""
        return self.logits + self.head_gradient + self.hidden


def loss_workspace(
    config: JobConfig, args: StudentArgs, teacher_width: int | None, shape: StepShape, teacher_bytes: int
) -> LossWorkspace:
    """Of `losses.linear_distillation`, by its own rule for the size of a chunk.

    Args:
        teacher_width: E, or None without a teacher.
        teacher_bytes: of an element of the teacher's hidden states.

    Raises:
        ValueError: distill.impl = "torch", the reference, which is not planned.
    """
    if config.distill.impl == "torch":
        raise ValueError('distill.impl = "torch" is the reference for tests and cannot be planned; take "auto"')
    vocabulary, element, on_cpu = args.vocab_size // shape.tensor, shape.compute_bytes, shape.device == "cpu"
    heads = [_weightless(vocabulary, args.hidden_size, element, shape.device)]
    if teacher_width is not None:
        heads.append(_weightless(vocabulary, teacher_width, teacher_bytes, shape.device))
    chunk = chunk_size(_problem(heads, config, vocabulary), shape.tokens)
    accurate = config.distill.fp32_logits
    per_logit = sum(ChunkLogits.bytes_per_logit(head, accurate) for head in heads)
    logits = chunk * vocabulary * per_logit
    tile = block = 0
    if on_cpu or config.distill.impl == "chunked":
        tile = 5 * 4 * vocabulary * min(chunk, tile_height(heads[0]))
    if on_cpu and element == 4:
        block = 2 * 4 * BLOCK_ROWS * chunk
    logits += max(tile, block)
    head_numel = vocabulary * args.hidden_size
    summed = 4 * head_numel if element == 2 and chunk < shape.tokens else 0
    # On a CPU the fp32 sum is freed block by block while it is converted.
    head_gradient = max(summed, element * head_numel) if on_cpu else summed + element * head_numel
    gradient = shape.tokens * args.hidden_size * element
    copies = chunk * (args.hidden_size * element + (teacher_width or 0) * teacher_bytes)
    return LossWorkspace(chunk, logits, head_gradient, 2 * gradient + copies, gradient + element * head_numel)


def _weightless(rows: int, columns: int, element_bytes: int, device: str) -> torch.Tensor:
    """A head without memory: the loss' rules ask for its shape, type and device."""
    dtype = torch.bfloat16 if element_bytes == 2 else torch.float32
    with FakeTensorMode():
        return torch.empty(rows, columns, dtype=dtype, device=device)


def _problem(heads: list[torch.Tensor], config: JobConfig, vocabulary: int) -> Problem:
    """What `chunk_size` looks at; nothing is computed with it."""
    none = torch.empty(0)
    return Problem(
        student_hidden=none,
        student_head=heads[0],
        teacher_hidden=None,
        teacher_head=heads[1] if len(heads) > 1 else None,
        labels=None,
        kl_weights=none,
        ce_weights=none,
        kl_weight=1.0,
        ce_weight=0.0,
        temperature=1.0,
        chunk_tokens=config.distill.chunk_tokens,
        fp32_logits=config.distill.fp32_logits,
        group=None,
        vocab_start=0,
        largest_slice=vocabulary,
    )

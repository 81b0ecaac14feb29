"""What one rank does in one step, as plain numbers: the common input of the memory, work and time of a plan.

Context-parallel ranks hold consecutive parts of a row. Under a causal mask the last part sees the most keys, and the
others wait for it, so the rank that a plan describes is the one with the last part.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from mobilellm_pro.config import JobConfig
from mobilellm_pro.model.attention import Span
from mobilellm_pro.training.loader import step_rows

BYTES = {"float32": 4, "bfloat16": 2, "float8": 1}


@dataclass(frozen=True)
class StepShape:
    """Sizes of one rank's step."""

    world_size: int
    rows: int
    """Rows of a micro-batch; a context-parallel rank has its part of each, a tensor-parallel rank all of it."""

    row_tokens: int
    micro_batches: int
    replicate: int
    """Replicas of the student (HSDP)."""

    shard: int
    """Ranks that share the student's parameters, context-parallel ones included (FSDP2); 1 without."""

    context: int
    tensor: int
    parameter_bytes: int
    """Of an element as the optimizer holds it."""

    compute_bytes: int
    """Of an element in the products."""

    residual_bytes: int
    """Of an element of the residual stream; fp32 under autocast, which a job of one rank uses."""

    reduce_bytes: int
    """Of an element of a gradient while it is summed over ranks."""

    checkpointing: str
    """ "none", "full", "op", or every how many layers one is checkpointed."""

    device: Literal["cuda", "cpu"] = "cuda"
    """A CPU has dense masks and other kernels: it is here so that the model can be compared with what runs there."""

    document_tokens: int | None = None
    """Length of the documents of a row, for the keys that a query sees; None: a row is one document."""

    @property
    def part_tokens(self) -> int:
        """Tokens of a row on this rank."""
        return self.row_tokens // self.context

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch on this rank."""
        return self.rows * self.part_tokens

    @property
    def step_rows(self) -> int:
        """Rows of a step on all ranks."""
        return self.rows * self.micro_batches * self.world_size // (self.context * self.tensor)

    @property
    def step_tokens(self) -> int:
        """Tokens of a step on all ranks."""
        return self.step_rows * self.row_tokens

    def mean_keys(self, span: Span, mask: str, positions: str = "continue", *, everywhere: bool = False) -> float:
        """Keys that a query of the last part of a row sees on average; `everywhere`: a query of the whole row.

        Args:
            span: how far back the kind of layer looks.
            mask: "block_causal" or "causal", as [attention] has it.
            positions: "continue" or "reset": chunks are cut by position.
            everywhere: average over the row instead of the part of the busiest rank.

        On a CPU every query multiplies with all keys and masks afterwards.
        """
        if self.device == "cpu":
            return float(self.row_tokens)
        document = self.document_tokens if mask == "block_causal" and self.document_tokens else self.row_tokens
        query = np.arange(0 if everywhere else self.row_tokens - self.part_tokens, self.row_tokens)
        own = query % document
        keys = own + 1
        if span.window is not None:
            keys = np.minimum(keys, span.window)
        if span.chunk is not None:
            position = query if positions == "continue" else own
            keys = np.minimum(keys, position % span.chunk + 1)
        return float(keys.mean())


def step_shape(
    config: JobConfig, world_size: int, *, document_tokens: int | None = None, device: Literal["cuda", "cpu"] = "cuda"
) -> StepShape:
    """The step of a configuration on `world_size` ranks whose degrees have been checked."""
    training, parallelism = config.training, config.parallelism
    context, tensor = parallelism.context_parallel_degree, parallelism.tensor_parallel_degree
    data = world_size // (context * tensor)
    shard = data * context // parallelism.data_parallel_replicate_degree
    unit = training.local_batch_size * data
    compute, parameter = BYTES[training.mixed_precision_param], BYTES[training.dtype]
    if shard == 1 and tensor > 1:  # neither FSDP2 nor autocast: products are in the parameters' own type
        compute = parameter
    checkpointing = config.activation_checkpoint.mode
    if checkpointing == "selective":
        checkpointing = config.activation_checkpoint.selective_ac_option
    return StepShape(
        world_size=world_size,
        rows=training.local_batch_size,
        row_tokens=training.seq_len,
        micro_batches=step_rows(config, data) // unit,
        replicate=parallelism.data_parallel_replicate_degree,
        shard=shard,
        context=context,
        tensor=tensor,
        parameter_bytes=parameter,
        compute_bytes=compute,
        residual_bytes=compute if shard > 1 else parameter,
        reduce_bytes=BYTES[training.mixed_precision_reduce],
        checkpointing=checkpointing,
        device=device,
        document_tokens=document_tokens,
    )

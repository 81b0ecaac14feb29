"""What one rank does in one step, as plain numbers: the common input of the memory, work and time of a plan.

Where context-parallel ranks hold consecutive parts of a row, the last part sees the most keys under a causal mask, and
the others wait for it, so the rank that a plan describes is the one with the last part.
"""

from dataclasses import dataclass
from typing import Literal

import torch

from mobilellm_pro.config import JobConfig
from mobilellm_pro.model.attention_mask import DENSE_ELEMENTS, AttentionMask, DocumentMask, PackedRows, Positions
from mobilellm_pro.model.row_shard import RowShard, Span, key_exchange
from mobilellm_pro.model.tiled_attention import tiles
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
    """A CPU has other masks and kernels: it is here so that the model can be compared with what runs there."""

    document_tokens: int | None = None
    """Length of the documents of a row, for the keys that a query sees; None: a row is one document."""

    positions: Positions = "continue"
    head_tail: bool = False
    """Two pieces of a row on a context-parallel rank (`attention.context_layout`)."""

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

    def mean_keys(self, span: Span, documents: DocumentMask, *, everywhere: bool = False) -> float:
        """Keys that a query of this rank meets on average, by the masks that a step makes.

        On an accelerator those that it sees; on a CPU those of its row or tile, most of which are masked afterwards.

        Args:
            span: how far back the kind of layer looks.
            documents: whether a query sees its own document only.
            everywhere: of a query of the whole row, instead of the busiest rank's.
        """
        mask = self._mask(span, documents, everywhere)
        num_queries = mask.first.shape[1]
        if self.device == "cuda":
            return (mask.end - mask.first).double().mean().item()
        if mask.dense is not None:
            return float(mask.num_keys)
        met = [(t.queries.stop - t.queries.start) * (t.keys.stop - t.keys.start) for t in tiles(mask.first, mask.end)]
        return sum(met) / num_queries

    def num_keys(self, span: Span) -> int:
        """Keys of a row that come together on this rank for one kind of layer."""
        exchange = key_exchange(self.row_shard, span, aligned=self.positions == "continue")
        return self.part_tokens if exchange is None else len(exchange.indices())

    def masks_densely(self, num_keys: int) -> bool:
        """Whether a layer's mask is a table of queries and keys: in short rows on a CPU."""
        return self.device == "cpu" and self.part_tokens * num_keys <= DENSE_ELEMENTS

    def exchanged_keys(self, span: Span) -> tuple[int, int]:
        """(received, sent) keys of a row on this rank for one kind of layer."""
        exchange = key_exchange(self.row_shard, span, aligned=self.positions == "continue")
        return (0, 0) if exchange is None else (sum(exchange.received), sum(exchange.sent_tokens))

    @property
    def row_shard(self) -> RowShard:
        """The busiest context-parallel rank's part of a row."""
        return RowShard(self.row_tokens, self.context, self.context - 1, self.head_tail)

    def _mask(self, span: Span, documents: DocumentMask, everywhere: bool) -> AttentionMask:
        index = torch.arange(self.row_tokens).unsqueeze(0)
        ids = torch.zeros_like(index) if self.document_tokens is None else index // self.document_tokens
        rows = PackedRows(ids, self.positions, None if everywhere else self.row_shard)
        return rows.masks({"": span}, documents)[""]


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
        positions=config.attention.positions,
        head_tail=config.attention.context_layout == "head_tail",
    )

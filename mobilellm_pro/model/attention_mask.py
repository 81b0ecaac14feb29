"""What a query sees in a packed row, without a table of queries × keys where rows are long.

A packed row holds several documents. What a query sees is one rule, `causal AND same document AND (window | chunk |
all)`, and under it the keys of a query follow one another: two numbers a query say everything, and neither ever goes
down along a row. From them come, in one pass each,

- FlexAttention's block mask on an accelerator: whole, partly visible and skipped blocks of 128 × 128. Blocks that a
  block of queries touches follow one another too, and so do those that it sees in full, so all four tables are counted
  off, not searched for;
- on a CPU a dense mask for short rows, or the tiles of `tiled_attention.py` for long ones.

The masks of a batch are made once, for all layers of a kind and for both models.

Shapes: B rows, S tokens of a row on this rank, K keys that its queries may see, N tokens of the whole row.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from mobilellm_pro.model.row_shard import KeyExchange, RowShard, Span, key_exchange

BLOCK = 128
"""Queries and keys of a block of FlexAttention's masks."""

DENSE_ELEMENTS = 2**19
"""Largest queries × keys of a row that a CPU masks as a whole; beyond, tiles do less work and take less memory."""

DocumentMask = Literal["block_causal", "causal"]
Positions = Literal["continue", "reset"]


@dataclass(frozen=True, eq=False)
class AttentionMask:
    """What this rank's queries see in one kind of layer."""

    first: Tensor
    """[B, S] place among the K keys of the first that a query sees; int32."""

    end: Tensor
    """[B, S] the place after the last."""

    num_keys: int
    """K."""

    exchange: KeyExchange | None = None
    """How the keys come together, if they lie on several ranks."""

    blocks: BlockMask | None = None
    """The same for FlexAttention, on an accelerator."""

    dense: Tensor | None = None
    """[B, 1, S, K], True = visible; on a CPU, for short rows."""


class PackedRows:
    """The geometry of a batch of packed rows, of which this rank holds a part.

    Attributes:
        document_ids: [B, N], ascending along a row.
        positions: [B, S] of this rank's tokens.
        shard: what of the rows lies on this rank.
    """

    def __init__(self, document_ids: Tensor, positions: Positions = "continue", shard: RowShard | None = None) -> None:
        """
        Args:
            document_ids: [B, N] document of every token of the whole rows.
            positions: "continue" over document borders, or "reset" to 0 in every document.
            shard: default the whole row.
        """
        self.document_ids = document_ids
        self.shard = RowShard(document_ids.shape[1]) if shard is None else shard
        self.numbering: Positions = positions
        self._masks: dict[tuple[Span, DocumentMask], AttentionMask] = {}
        index = torch.arange(document_ids.shape[1], device=document_ids.device).expand_as(document_ids)
        whole = index if positions == "continue" else index - self._starts
        self.positions = self.shard.take(whole)

    @cached_property
    def _starts(self) -> Tensor:
        """[B, N] first token of every token's document."""
        index = torch.arange(self.document_ids.shape[1], device=self.document_ids.device)
        begins = torch.ones_like(self.document_ids, dtype=torch.bool)
        begins[:, 1:] = self.document_ids[:, 1:] != self.document_ids[:, :-1]
        return torch.where(begins, index, 0).cummax(dim=1).values

    def masks(self, spans: Mapping[str, Span], documents: DocumentMask = "block_causal") -> dict[str, AttentionMask]:
        """Kind of layer -> its mask; equal ones are made once.

        Args:
            spans: kind of layer -> how far back it looks.
            documents: whether queries see their own document only, or the whole row before them.
        """
        for span in spans.values():
            if (span, documents) not in self._masks:
                self._masks[span, documents] = self._mask(span, documents)
        return {kind: self._masks[span, documents] for kind, span in spans.items()}

    def _mask(self, span: Span, documents: DocumentMask) -> AttentionMask:
        device = self.document_ids.device
        exchange = key_exchange(self.shard, span, aligned=self.numbering == "continue")
        queries = self.shard.indices(device)
        keys = queries if exchange is None else exchange.indices(device)
        first = self._first_visible(span, documents, queries)
        # Places among the keys; what a query sees is there without a gap.
        first = torch.searchsorted(keys, first.contiguous(), out_int32=True)
        end = torch.searchsorted(keys, queries, out_int32=True).expand_as(first) + 1
        num_keys = len(keys)
        if device.type != "cpu":
            return AttentionMask(first, end, num_keys, exchange, blocks=block_mask(first, end, num_keys))
        dense = dense_mask(first, end, 0, num_keys) if len(queries) * num_keys <= DENSE_ELEMENTS else None
        return AttentionMask(first, end, num_keys, exchange, dense=dense)

    def _first_visible(self, span: Span, documents: DocumentMask, queries: Tensor) -> Tensor:
        """[B, S] place in the row of the first token that a query sees."""
        first = torch.zeros_like(self.positions)
        if span.window is not None:
            first = torch.maximum(first, queries - (span.window - 1))
        if span.chunk is not None:
            first = torch.maximum(first, queries - self.positions % span.chunk)
        if documents == "block_causal":
            first = torch.maximum(first, self.shard.take(self._starts))
        return first


def dense_mask(first: Tensor, end: Tensor, first_key: int, num_keys: int) -> Tensor:
    """[B, S], [B, S] -> [B, 1, S, num_keys]: whether a query sees the keys from `first_key` on, True = visible."""
    key = torch.arange(first_key, first_key + num_keys, dtype=first.dtype, device=first.device)
    return ((key >= first.unsqueeze(-1)) & (key < end.unsqueeze(-1))).unsqueeze(1)


def block_mask(first: Tensor, end: Tensor, num_keys: int) -> BlockMask:
    """FlexAttention's mask from the keys that queries see; its size is queries × keys / 128².

    Args:
        first: [B, S] first key that a query sees; never goes down along a row.
        end: [B, S] the one after the last; likewise.
        num_keys: K.
    """
    num_queries = first.shape[1]
    num_query_blocks, num_key_blocks = -(-num_queries // BLOCK), -(-num_keys // BLOCK)
    touched = _per_block(first, "least") // BLOCK, -(-_per_block(end, "most") // BLOCK)
    full = -(-_per_block(first, "most") // BLOCK), _per_block(end, "least") // BLOCK
    if num_queries % BLOCK:  # a block of queries that is cut short sees nothing in full
        full[0][:, -1] = num_key_blocks
    partial, whole = _tables(*touched, *full, num_key_blocks)
    seen_by, seen_whole_by = _transposed(*touched, num_key_blocks), _transposed(*full, num_key_blocks)
    partial_queries, whole_queries = _tables(*seen_by, *seen_whole_by, num_query_blocks)
    return BlockMask(
        (num_queries, num_keys),
        *partial,
        *whole,
        *partial_queries,
        *whole_queries,
        BLOCK_SIZE=(BLOCK, BLOCK),
        mask_mod=_rule(first, end),
    )


def _rule(first: Tensor, end: Tensor) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    def visible(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key >= first[row, query]) & (key < end[row, query])

    return visible


def _per_block(values: Tensor, which: Literal["least", "most"]) -> Tensor:
    """[B, S] -> [B, blocks]: of numbers that never go down, those of a block's first or last query."""
    num_queries = values.shape[1]
    begins = torch.arange(0, num_queries, BLOCK, device=values.device)
    return values[:, begins if which == "least" else (begins + BLOCK - 1).clamp(max=num_queries - 1)].long()


def _tables(
    begin: Tensor, end: Tensor, full_begin: Tensor, full_end: Tensor, width: int
) -> list[tuple[Tensor, Tensor]]:
    """For each block: (number, numbers) of the blocks that it touches but does not see in full, and of the full ones.

    Args:
        begin, end: [B, blocks] those that it touches.
        full_begin, full_end: [B, blocks] those in full, between these; none where the end is not behind the begin.
        width: of the tables.
    """
    num_full = (full_end - full_begin).clamp(min=0)
    full_begin = torch.where(num_full > 0, full_begin, end)  # then everything touched is before the full ones
    num_before = full_begin - begin
    place = torch.arange(width, device=begin.device)
    after = place - num_before.unsqueeze(-1)
    partial = torch.where(after < 0, begin.unsqueeze(-1) + place, (full_begin + num_full).unsqueeze(-1) + after)
    whole = full_begin.unsqueeze(-1) + place
    counts = end - begin - num_full, num_full
    return [
        (count.int().unsqueeze(1), table.clamp(max=width - 1).int().unsqueeze(1))
        for count, table in zip(counts, (partial, whole), strict=True)
    ]


def _transposed(begin: Tensor, end: Tensor, num_columns: int) -> tuple[Tensor, Tensor]:
    """[B, rows], [B, rows] -> [B, columns] twice: the rows whose stretch of columns contains each column.

    Neither begins nor ends go down, so these rows follow one another.
    """
    column = torch.arange(num_columns, device=begin.device).expand(begin.shape[0], -1).contiguous()
    first = torch.searchsorted(end.contiguous(), column, right=True)
    return first, torch.searchsorted(begin.contiguous(), column, right=True)

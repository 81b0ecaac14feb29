"""Attention of both models: which keys a query may see, and the product itself.

A packed row holds several documents. What a query sees is one rule, `causal AND same document AND (window | chunk |
all)`, written once as a FlexAttention mask function. On an accelerator it becomes a `BlockMask` for FlexAttention; on a
CPU, where FlexAttention has no backward, the same function becomes a dense mask for SDPA. A layer takes either.

Shapes: B rows, S tokens of a row (on this rank), K keys, H query heads, G key/value heads, W head width.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from torchtitan.models.attention import FlexAttentionWrapper, create_attention_mask

AttentionMask = BlockMask | Tensor
"""BlockMask for FlexAttention, or a boolean tensor [B, 1, S, K] (True = visible) for SDPA."""


@dataclass(frozen=True)
class Span:
    """How far back one kind of layer looks, in tokens; the default sees everything before it."""

    window: int | None = None
    """The last `window` tokens, the query's own included."""

    chunk: int | None = None
    """Tokens with the same `position // chunk`."""


def visibility(
    span: Span, positions: Tensor, document_ids: Tensor | None = None, query_start: int = 0
) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """Rule of one kind of layer as a FlexAttention mask function.

    Args:
        span: how far back the layer looks.
        positions: [B, K] position of every key's token; only a chunk needs it.
        document_ids: [B, K] document of every token; None lets documents of a row see each other ("causal").
        query_start: index in the row of this rank's first query.
    """

    def visible(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        query = query + query_start
        keep = query >= key
        if span.window is not None:
            keep = keep & (query - key < span.window)
        if span.chunk is not None:
            keep = keep & (positions[row, query] // span.chunk == positions[row, key] // span.chunk)
        if document_ids is not None:
            keep = keep & (document_ids[row, query] == document_ids[row, key])
        return keep

    return visible


def build_masks(
    spans: Mapping[str, Span],
    positions: Tensor,
    document_ids: Tensor | None = None,
    *,
    query_start: int = 0,
    num_queries: int | None = None,
) -> dict[str, AttentionMask]:
    """Masks of one batch, one per kind of layer, shared by all layers of that kind.

    Args:
        spans: kind of layer -> how far back it looks.
        positions: [B, K] over the whole row, also under context parallelism.
        document_ids: [B, K], or None for the plain causal mask.
        query_start: index in the row of this rank's first query.
        num_queries: queries on this rank; default all K.

    Returns:
        kind -> BlockMask on an accelerator, boolean [B, 1, num_queries, K] on a CPU.
    """
    num_rows, num_keys = positions.shape
    num_queries = num_keys if num_queries is None else num_queries
    masks: dict[str, AttentionMask] = {}
    for kind, span in spans.items():
        rule = visibility(span, positions, document_ids, query_start)
        if positions.device.type == "cpu":
            masks[kind] = _dense_mask(rule, num_rows, num_queries, num_keys)
        else:
            masks[kind] = create_attention_mask(rule, num_rows, None, num_queries, num_keys)
    return masks


def _dense_mask(rule: Callable[..., Tensor], num_rows: int, num_queries: int, num_keys: int) -> Tensor:
    row = torch.arange(num_rows).view(-1, 1, 1)
    query = torch.arange(num_queries).view(1, -1, 1)
    key = torch.arange(num_keys).view(1, 1, -1)
    return rule(row, torch.tensor(0), query, key).expand(num_rows, num_queries, num_keys).unsqueeze(1)


def document_positions(document_ids: Tensor) -> Tensor:
    """Position of every token inside its own document, [B, S], from 0 at the document's first token in the row."""
    index = torch.arange(document_ids.shape[1], device=document_ids.device).expand_as(document_ids)
    starts = torch.ones_like(document_ids, dtype=torch.bool)
    starts[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    return index - torch.where(starts, index, 0).cummax(dim=1).values


class Attend(nn.Module):
    """softmax(q kᵀ / sqrt(W)) v under a mask, with grouped key/value heads.

    With `context_group` set, every rank holds a contiguous part of the row: keys and values are gathered over the group
    and the queries stay where they are, so the mask must be the one of this rank's queries against all keys.
    """

    def __init__(self) -> None:
        super().__init__()
        self.context_group: dist.ProcessGroup | None = None
        self.flex = FlexAttentionWrapper()

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: AttentionMask) -> Tensor:
        """[B, H, S, W], [B, G, S, W], [B, G, S, W] -> [B, H, S, W]."""
        if self.context_group is not None:
            key, value = gather_sequence(torch.stack((key, value)), self.context_group).unbind(0)
        grouped = query.shape[1] != key.shape[1]
        if isinstance(mask, BlockMask):
            return self.flex(query, key, value, block_mask=mask, enable_gqa=grouped)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=grouped)


# The newer names; torch 2.11 has the older ones only.
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


def gather_sequence(local: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[..., S, W] on every rank -> [..., S · ranks, W]; the backward pass sums the gradients and scatters them."""
    return _GatherSequence.apply(local, group)


class _GatherSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        num_ranks = dist.get_world_size(group)
        gathered = local.new_empty(num_ranks * local.shape[0], *local.shape[1:])
        _all_gather(gathered, local.contiguous(), group=group)
        return gathered.unflatten(0, (num_ranks, -1)).movedim(0, -3).flatten(-3, -2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        parts = grad.unflatten(-2, (dist.get_world_size(ctx.group), -1)).movedim(-3, 0)
        local = parts.new_empty(parts.shape[1:])
        _reduce_scatter(local, parts.flatten(0, 1).contiguous(), group=ctx.group)
        return local, None

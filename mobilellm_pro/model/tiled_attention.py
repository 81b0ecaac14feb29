"""Attention tile by tile, where FlexAttention does not run: on a CPU, and over a KV cache.

A tile is a block of consecutive queries of a row and the keys that any of them sees. It is masked on its own, so a
local layer's cost grows with its window and a packed row's with its documents, and no mask of queries × keys is ever
made. Where a document begins, as much of it as sees its own beginning is one tile without any mask: the kernel's
causal mode takes about half the time. For the backward pass a row keeps queries, keys, values, result and one number a
query and head; masks are made again.

It is one operator to torch.compile, to checkpointing and to autograd: which tiles there are depends on the documents.

Shapes: B rows, H query heads, G key/value heads, S queries, K keys, W head width.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mobilellm_pro.model.attention_mask import dense_mask

SMALLEST_TILE, LARGEST_TILE = 128, 256
"""Queries of a tile with a mask: about as many as each sees keys, within these bounds."""

TILE_ELEMENTS = 2**25
"""Queries × keys of a tile with a mask at most: 128 MiB in fp32, which is what SDPA makes of it."""

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class Tile(NamedTuple):
    """Consecutive queries of some rows, and the keys that any of them sees."""

    rows: slice
    queries: slice
    keys: slice
    is_causal: bool
    """As many keys as queries, of which each sees those up to its own: no mask is needed."""

    def mask(self, first: Tensor, end: Tensor) -> Tensor:
        """[B or 1, S] twice -> [B of the tile, 1, queries, keys], True = visible."""
        num_keys = self.keys.stop - self.keys.start
        return dense_mask(first[self.rows, self.queries], end[self.rows, self.queries], self.keys.start, num_keys)


def tiles(first: Tensor, end: Tensor) -> list[Tile]:
    """Cuts attention into tiles; rows that see alike go together.

    Args:
        first: [B, S] or, for all rows, [1, S], on the CPU: first key that a query sees; never goes down along a row.
        end: likewise: the key after the last.
    """
    seen = int((end - first).double().mean())
    block = max(1, min(max(seen, SMALLEST_TILE), LARGEST_TILE, TILE_ELEMENTS // int(end.max())))
    rows = [slice(None)] if len(first) == 1 else [slice(row, row + 1) for row in range(len(first))]
    found = []
    for row, oldest, newest in zip(rows, first, end, strict=True):
        cuts = list(_cuts(oldest, newest, block))
        # Neither number goes down along a row: the first query of a tile has its oldest key, the last its newest.
        low = oldest[[begin for begin, _, _ in cuts]].tolist()
        high = newest[[last - 1 for _, last, _ in cuts]].tolist()
        for (begin, last, is_causal), from_key, to_key in zip(cuts, low, high, strict=True):
            found.append(Tile(row, slice(begin, last), slice(from_key, to_key), is_causal))
    return found


def _cuts(first: Tensor, end: Tensor, block: int) -> Iterator[tuple[int, int, bool]]:
    """First query, the one after the last, and whether a causal square: of each tile of a row [S]."""
    place = torch.arange(len(first))
    # A square begins with a query that sees itself alone, and goes on while the others see from there to themselves.
    begin = torch.where(end - first == 1, place, 0).cummax(0).values
    square = (first == first[begin]) & (end - first == place - begin + 1)
    is_corner = square & (begin == place)
    edges = is_corner | square.diff(prepend=square[:1])
    bounds = [0, *edges[1:].nonzero().flatten().add(1).tolist(), len(first)]
    rest = 0
    for (low, high), corner in zip(pairwise(bounds), is_corner[bounds[:-1]].tolist(), strict=True):
        if corner and high - low >= SMALLEST_TILE:
            yield from ((cut, min(cut + block, low), False) for cut in range(rest, low, block))
            yield low, high, True
            rest = high
    yield from ((cut, min(cut + block, len(first)), False) for cut in range(rest, len(first), block))


def attend_in_tiles(query: Tensor, key: Tensor, value: Tensor, first: Tensor, end: Tensor) -> Tensor:
    """`tiled_attention` without gradients, on any device; `first` and `end` are on the CPU."""
    out, grouped = torch.empty_like(query), query.shape[1] != key.shape[1]
    cut = tiles(first, end)
    first, end = first.to(query.device), end.to(query.device)  # masks are made where they are used
    for tile in cut:
        rows, queries, keys, _ = tile
        out[rows, :, queries] = F.scaled_dot_product_attention(
            query[rows, :, queries],
            key[rows, :, keys],
            value[rows, :, keys],
            attn_mask=None if tile.is_causal else tile.mask(first, end),
            is_causal=tile.is_causal,
            enable_gqa=grouped,
        )
    return out


def tiled_attention(query: Tensor, key: Tensor, value: Tensor, first: Tensor, end: Tensor) -> Tensor:
    """softmax(q kᵀ / sqrt(W)) v on a CPU, where query s of a row sees the keys from first[s] to end[s] - 1.

    Args:
        query: [B, H, S, W].
        key: [B, G, K, W].
        value: [B, G, K, W].
        first: [B, S], int32; never goes down along a row.
        end: [B, S], likewise; behind `first`.

    Returns:
        [B, H, S, W].
    """
    out: Tensor = _attention(query, key, value, first, end)[0]
    return out


@torch.library.custom_op("mobilellm_pro::tiled_attention", mutates_args=())
def _attention(query: Tensor, key: Tensor, value: Tensor, first: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
    """Also gives the logarithm of every query's sum of exponentials, [B, H, S]."""
    out, log_sum = torch.empty_like(query), _log_sum_like(query)
    for tile in tiles(first, end):
        rows, queries, keys, is_causal = tile
        arguments = _arguments(query[rows, :, queries], key[rows, :, keys], value[rows, :, keys])
        mask = None if is_causal else _additive(tile.mask(first, end), query.dtype)
        results = _flash(*arguments, is_causal=is_causal, attn_mask=mask)
        out[rows, :, queries], log_sum[rows, :, queries] = results
    return out, log_sum


@_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, first: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(query), _log_sum_like(query)


def _log_sum_like(query: Tensor) -> Tensor:
    return query.new_empty(query.shape[:3], dtype=torch.promote_types(query.dtype, torch.float32))


@torch.library.custom_op("mobilellm_pro::tiled_attention_backward", mutates_args=())
def _attention_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    first: Tensor,
    end: Tensor,
    out: Tensor,
    log_sum: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_query = torch.empty_like(query)
    # A key is seen from many tiles: what each adds is not rounded to bf16 before the sum, nor is the sum.
    exact = log_sum.dtype
    grad_key, grad_value = (torch.zeros_like(tensor, dtype=exact) for tensor in (key, value))
    for tile in tiles(first, end):
        rows, queries, keys, is_causal = tile
        upstream, *results = (tensor[rows, :, queries].to(exact) for tensor in (grad, out, log_sum))
        parts = (query[rows, :, queries], key[rows, :, keys], value[rows, :, keys])
        arguments = _arguments(*(part.to(exact) for part in parts))
        mask = None if is_causal else _additive(tile.mask(first, end), exact)
        parts = _flash_backward(upstream, *arguments, *results, 0.0, is_causal, attn_mask=mask)
        grad_query[rows, :, queries] = parts[0]
        for total, part in zip((grad_key, grad_value), parts[1:], strict=True):
            total[rows, :, keys] += part.unflatten(1, (key.shape[1], -1)).sum(2)
    return grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype)


@_attention_backward.register_fake
def _(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*inputs, *output)


def _differentiate(ctx: Any, grad: Tensor, unused: Tensor) -> tuple[Any, ...]:
    return *_attention_backward(grad, *ctx.saved_tensors), None, None


_attention.register_autograd(_differentiate, setup_context=_keep)


def _arguments(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The kernel knows no grouped heads: keys and values of a tile are repeated."""
    times = query.shape[1] // key.shape[1]
    return query, key.repeat_interleave(times, dim=1), value.repeat_interleave(times, dim=1)


def _additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(visible.shape, dtype=dtype).masked_fill_(~visible, -torch.inf)

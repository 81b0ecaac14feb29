"""Attention of new tokens to a cache, without ever holding new tokens × all tokens.

Queries go through in blocks. A block of a local layer meets the keys of its own windows only: the cost grows with the
window and not with the number of keys. A block of a global layer is so small that its mask and, in kernels that hold
them, its scores stay within a fixed size; FlashAttention needs neither and gets all queries at once.

Shapes: B rows, H query heads, G key/value heads, S new tokens, K keys, W head width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

BLOCK_SCORES = 2**25
"""Queries × keys of a block and head: 32 MiB of mask; 128 MiB a head of fp32 scores in kernels that hold them."""


def attend_to_cache(query: Tensor, key: Tensor, value: Tensor, window: int | None) -> Tensor:
    """softmax(q kᵀ / sqrt(W)) v of the last S of K consecutive tokens, causal.

    Args:
        query: [B, H, S, W].
        key: [B, G, K, W], K >= S; in any order if S = 1, which sees them all.
        value: [B, G, K, W].
        window: tokens that a query sees, its own included; None for all.

    Returns:
        [B, H, S, W].
    """
    num_new, num_keys = query.shape[2], key.shape[2]
    grouped = query.shape[1] != key.shape[1]
    if num_new == 1:
        return F.scaled_dot_product_attention(query, key, value, enable_gqa=grouped)
    if window is None and query.is_cuda and query.dtype in (torch.bfloat16, torch.float16):
        causal = causal_lower_right(num_new, num_keys)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=causal, enable_gqa=grouped)
    block = max(1, BLOCK_SCORES // num_keys) if window is None else window
    blocks = []
    for first in range(0, num_new, block):
        last = min(first + block, num_new)
        # Places among the keys: of the block's first and last query, and of the oldest key that the first one sees.
        begin, end = num_keys - num_new + first, num_keys - num_new + last
        oldest = 0 if window is None else max(0, begin - window + 1)
        mask = _visible(begin, end, oldest, window, query.device)
        keys, values = key[:, :, oldest:end], value[:, :, oldest:end]
        part = query[:, :, first:last]
        blocks.append(F.scaled_dot_product_attention(part, keys, values, attn_mask=mask, enable_gqa=grouped))
    return torch.cat(blocks, dim=2)


def _visible(begin: int, end: int, oldest: int, window: int | None, device: torch.device) -> Tensor:
    """Boolean [1, 1, end - begin, end - oldest]: queries begin, ..., end - 1 and keys oldest, ..., end - 1."""
    back = torch.arange(begin, end, device=device).view(-1, 1) - torch.arange(oldest, end, device=device)
    visible = back >= 0 if window is None else (back >= 0) & (back < window)
    return visible.view(1, 1, *visible.shape)

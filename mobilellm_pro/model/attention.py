"""The attention product of both models, under whatever mask and over however many ranks.

Shapes: B rows, S tokens of a row on this rank, K keys that they may see, H query heads, G key/value heads, W head
width.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right
from torchtitan.models.attention import FlexAttentionWrapper

from mobilellm_pro.model.attention_mask import AttentionMask
from mobilellm_pro.model.key_exchange import exchange_keys
from mobilellm_pro.model.tiled_attention import attend_in_tiles, tiled_attention

FLEX_KERNELS = 64
"""Of one process at most. All layers share torch's limit of 8, beyond which it computes queries × keys with a warning;
kinds of layers, both models, training, validation and their row lengths each need a kernel."""


class Attend(nn.Module):
    """softmax(q kᵀ / sqrt(W)) v under a mask, with grouped key/value heads.

    Under context parallelism `context_group` is set and every rank holds a part of the row: queries stay where they
    are, and keys and values travel as far as the mask says.
    """

    def __init__(self) -> None:
        super().__init__()
        self.context_group: dist.ProcessGroup | None = None
        self.flex = FlexAttentionWrapper()
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, FLEX_KERNELS)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: AttentionMask) -> Tensor:
        """[B, H, S, W], [B, G, S, W], [B, G, S, W] -> [B, H, S, W]."""
        if mask.exchange is not None:
            assert self.context_group is not None, "the mask is of a part of the row, and there is no context group"
            key, value = exchange_keys(key, value, mask.exchange, self.context_group)
        grouped = query.shape[1] != key.shape[1]
        if mask.blocks is not None:
            return self.flex(query, key, value, block_mask=mask.blocks, enable_gqa=grouped)
        if mask.dense is not None:
            return F.scaled_dot_product_attention(query, key, value, attn_mask=mask.dense, enable_gqa=grouped)
        return tiled_attention(query, key, value, mask.first, mask.end)


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
        causal = causal_lower_right(num_new, num_keys)  # FlashAttention, which needs no mask
        return F.scaled_dot_product_attention(query, key, value, attn_mask=causal, enable_gqa=grouped)
    end = torch.arange(num_keys - num_new + 1, num_keys + 1, dtype=torch.int32).unsqueeze(0)
    first = torch.zeros_like(end) if window is None else (end - window).clamp(min=0)
    return attend_in_tiles(query, key, value, first, end)

"""The operators of an exported decoder: ExecuTorch's while a program is traced, plain torch otherwise.

The two do the same by different code, so that running an exported program beside the eager decoder compares
ExecuTorch's kernels with torch's, and a decoder in eager mode needs no ExecuTorch.

Shapes: S new tokens, D width, V vocabulary, H query heads, G key/value heads, W head width, C slots.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from mobilellm_pro.quantization.weight_quantizer import dequantize

Stored = tuple[Tensor, Tensor, Tensor]
"""Keys and values as bytes [2, C, G, W], and what a step and the smallest number are, fp32 [2, C, G, 1] each."""


def lookup(packed: Tensor, scales: Tensor, tokens: Tensor) -> Tensor:
    """Rows of an int4 table: uint8 [V, D / 2], bfloat16 [V, D / group] and ids [1, S] -> fp32 [1, S, D]."""
    if torch.compiler.is_exporting():
        return torch.ops.quantized_decomposed.embedding_4bit.dtype(
            packed, scales, None, -8, 7, tokens, dtype=torch.float32
        )
    nibbles = packed[tokens[0]]
    integers = torch.stack((nibbles >> 4, nibbles & 0xF), dim=-1).flatten(-2).to(torch.int8) - 8
    return dequantize(integers, scales[tokens[0]]).unsqueeze(0)


def write_from(slots: Stored, new: Stored, start: int) -> None:
    """Puts S new tokens into slots start, start + 1, ..."""
    for whole, part in zip(slots, new, strict=True):
        if torch.compiler.is_exporting():
            torch.ops.llama.update_cache(part, whole, start)
        else:
            whole[:, start : start + part.shape[1]] = part


def write_at(slots: Stored, new: Stored, indices: Tensor) -> None:
    """Puts S new tokens into slots `indices` [2, S], all different."""
    for whole, part in zip(slots, new, strict=True):
        if torch.compiler.is_exporting():
            torch.ops.llama.update_cache_with_indices(part, whole, 0, indices)
        else:
            whole[:, indices[0]] = part


def attend_from(query: Tensor, keys: Tensor, values: Tensor, start: int) -> Tensor:
    """Query j sees slots 0 ... start + j: [1, S, H, W] and twice [1, C, G, W] -> [1, S, H, W]."""
    if torch.compiler.is_exporting():
        return torch.ops.llama.custom_sdpa(query, keys, values, start, None, 0.0, True)
    end = start + query.shape[1]
    seen = torch.arange(end) <= torch.arange(start, end).unsqueeze(1)
    return _attend(query, keys[:, :end], values[:, :end], seen)


def attend_under(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """The same under a mask [S, C] of 0 and -inf."""
    if torch.compiler.is_exporting():
        return torch.ops.llama.custom_sdpa(query, keys, values, 0, mask, 0.0, False)
    return _attend(query, keys, values, mask == 0)


def _attend(query: Tensor, keys: Tensor, values: Tensor, seen: Tensor) -> Tensor:
    query, keys, values = (x.transpose(1, 2) for x in (query, keys, values))
    return F.scaled_dot_product_attention(query, keys, values, attn_mask=seen, enable_gqa=True).transpose(1, 2)

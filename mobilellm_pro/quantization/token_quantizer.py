"""Asymmetric activations with the range of the moment: s = (max - min) / 255, round((x - min) / s) (paper, Eq. 3).

A token is the last dimension of a tensor: a row of a linear layer's input, or one head's key or value. Arithmetic is in
fp64, so that the integers do not depend on the type's rounding; s and min are fp32.

The integer kernels of XNNPACK, to which the CPU scheme is exported, stretch the range to hold zero and round its zero
point to an integer: `zero_point = "integer"`. Results differ by a step at most where zero lies in the range, and more
where it does not.
"""

from typing import Literal

import torch
from torch import Tensor

from mobilellm_pro.quantization.weight_quantizer import StraightThrough

ZeroPoint = Literal["exact", "integer"]
"""`exact`: 0 stands for the smallest number, as in the paper; `integer`: an integer stands for 0.0."""


def quantize_tokens(x: Tensor, bits: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    """[..., W] -> uint8 [..., W], and s and min, fp32 [..., 1]. A token of equal numbers has s = 0."""
    low, high = x.amin(-1, keepdim=True).double(), x.amax(-1, keepdim=True).double()
    scale = ((high - low) / (2**bits - 1)).float()
    # A token of equal numbers has no range: any divisor gives 0, which stands for min.
    steps = (x.double() - low) / torch.where(scale > 0, scale, 1.0).double()
    return steps.round().clamp(0, 2**bits - 1).to(torch.uint8), scale, low.float()


def dequantize_tokens(payload: Tensor, scale: Tensor, low: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """What `quantize_tokens` gave -> [..., W], off by half a step s at most."""
    return (payload.double() * scale.double() + low.double()).to(dtype)


def fake_quantize_tokens(x: Tensor, bits: int = 8, zero_point: ZeroPoint = "exact") -> Tensor:
    """Quantized and dequantized, in its own type: [..., W] -> [..., W]; the gradient passes straight through."""
    with torch.no_grad():
        if zero_point == "exact":
            there_and_back = dequantize_tokens(*quantize_tokens(x, bits), x.dtype)
        else:
            there_and_back = _with_integer_zero(x, bits)
    return StraightThrough.apply(x, there_and_back)


def _with_integer_zero(x: Tensor, bits: int) -> Tensor:
    """As XNNPACK's dynamically quantized kernels: fp32, the range holds 0, which an integer stands for exactly."""
    steps = 2**bits - 1
    low, high = x.float().amin(-1, keepdim=True).clamp(max=0), x.float().amax(-1, keepdim=True).clamp(min=0)
    scale = (high - low) / steps
    scale = torch.where(scale > 0, scale, 1.0)
    lowest, highest = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    # The end of the range on which an integer zero leaves the smaller error decides where it lies.
    from_low = (lowest + low / scale) + (highest + high / scale) > 0
    zero = torch.where(from_low, lowest - low / scale, highest - high / scale)
    zero = zero.round().clamp(lowest, highest)
    integers = ((x.float() / scale).round() + zero).clamp(lowest, highest)
    return ((integers - zero) * scale).to(x.dtype)

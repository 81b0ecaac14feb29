"""Symmetric weights: s = max(-min, max) / 7.5 and clip(round(w / s), -8, 7) (paper, Eq. 4, at four bits).

Scales are bfloat16, as they are stored and as XNNPACK reads them, and they are rounded before anything is divided by
them: the integer that is trained with is the one that ships. A quotient that lies at a tie of rounding decides about an
integer, so it is taken in a type in which it cannot be rounded onto a tie: a bfloat16 scale has 8 bits, and the
quotient of 8 and 8 bits keeps its side in fp32, that of 24 and 8 bits in fp64.

Shapes: R rows (output channels), C columns, G groups of a row.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from mobilellm_pro.quantization.scheme import WeightScheme

SCALE_DTYPE = torch.bfloat16
_BLOCK_WEIGHTS = {"cpu": 2**18, "cuda": 2**25}
"""Quantized at a time: quotients in fp64 of a whole embedding would be gigabytes; these stay in a CPU's cache."""


def choose_scales(weight: Tensor, scheme: WeightScheme, name: str = "a weight") -> Tensor:
    """Scales that follow from the weights: [R, C] -> [R, G], bfloat16; 0 for a group of zeros.

    Raises:
        ValueError: rows that do not divide into groups; `name` says of what.
    """
    groups = _in_groups(weight, scheme.group_of(weight.shape[-1], name))
    # The sum of the absolute bounds is odd, so half of it lies between them: 7.5 for -8 ... 7.
    largest = groups.abs().amax(-1)
    return (largest.double() / ((scheme.highest - scheme.lowest) / 2)).to(SCALE_DTYPE)


def refuse_non_finite(name: str, tensor: Tensor) -> None:
    """
    Raises:
        ValueError: a NaN or an infinite number in it; says how many and where the first is.
    """
    bad = (~tensor.isfinite()).nonzero()
    if len(bad):
        raise ValueError(
            f"{name}: {len(bad):,} of {tensor.numel():,} numbers are NaN or infinite, the first at {bad[0].tolist()}; "
            "there is no range for them: take an earlier checkpoint, and see [guard] for how it came to this"
        )


def quantize(weight: Tensor, scales: Tensor, scheme: WeightScheme) -> Tensor:
    """Integers of the weights under scales [R, G]: [R, C] -> [R, C], int8; 0 where the scale is 0."""
    group = weight.shape[-1] // scales.shape[-1]
    return _integers(_in_groups(weight, group), scales, scheme).to(torch.int8).flatten(-2)


def dequantize(integers: Tensor, scales: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Integer times scale: [R, C] and [R, G] -> [R, C]; exact in fp32, rounded once in a shorter type."""
    groups = _in_groups(integers, integers.shape[-1] // scales.shape[-1]).float()
    return (groups * scales.float().unsqueeze(-1)).flatten(-2).to(dtype)


def fake_quantize(weight: Tensor, scheme: WeightScheme, name: str = "a weight") -> Tensor:
    """Quantized and dequantized under its own scales, in its own type; its gradient passes straight through.

    The largest weight of a group moves the range itself, so nothing counts as clipped.

    Raises:
        ValueError: as `choose_scales`.
    """
    scheme.group_of(weight.shape[-1], name)
    with torch.no_grad():
        result = _joined([_there_and_back(w, choose_scales(w, scheme), scheme) for (w,) in _blocks(weight)])
    return StraightThrough.apply(weight, result)


def fake_quantize_learned(weight: Tensor, scales: Tensor, scheme: WeightScheme) -> Tensor:
    """The same under given scales [R, G], which have a gradient too: round(w/s) - w/s in the range, its bound outside.

    This is the gradient of s * clip(round(w / s)) with the rounding taken for the identity (learned step size
    quantization); a clipped weight has none.
    """
    return _LearnedRange.apply(weight, scales, scheme)


def stored_scales(scales: Tensor) -> Tensor:
    """Learned scales as they are used and shipped: bfloat16, and at least the smallest positive normal number."""
    return scales.clamp(min=torch.finfo(SCALE_DTYPE).tiny).to(SCALE_DTYPE)


def _blocks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Some rows of all of them at a time."""
    first = tensors[0]
    rows = max(1, _BLOCK_WEIGHTS.get(first.device.type, 2**25) // max(1, first.shape[-1]))
    if isinstance(first, DTensor) or first.shape[0] <= rows:
        return iter([tensors])
    return zip(*(tensor.split(rows) for tensor in tensors), strict=True)


def _joined(blocks: Sequence[Tensor]) -> Tensor:
    return blocks[0] if len(blocks) == 1 else torch.cat(list(blocks))


def _there_and_back(weight: Tensor, scales: Tensor, scheme: WeightScheme) -> Tensor:
    """[R, C] and [R, G] -> [R, C]: what `quantize` and `dequantize` give, in one go."""
    groups = _in_groups(weight, weight.shape[-1] // scales.shape[-1])
    integers = _integers(groups, scales, scheme)
    return integers.to(torch.float32).mul_(scales.float().unsqueeze(-1)).flatten(-2).to(weight.dtype)


def _in_groups(x: Tensor, group: int) -> Tensor:
    """[R, C] -> [R, G, group]."""
    return x.unflatten(-1, (-1, group))


def _ratio(groups: Tensor, scales: Tensor) -> Tensor:
    """w / s in a type that keeps it off ties: [R, G, group]; 0 where s is 0."""
    exact = torch.float32 if groups.dtype in (torch.bfloat16, torch.float16) else torch.float64
    divisor = scales.to(exact).unsqueeze(-1)
    return groups.to(exact) / torch.where(divisor > 0, divisor, torch.inf)


def _integers(groups: Tensor, scales: Tensor, scheme: WeightScheme) -> Tensor:
    return _ratio(groups, scales).round_().clamp_(scheme.lowest, scheme.highest)


class StraightThrough(torch.autograd.Function):
    """Gives the second tensor and hands its gradient to the first."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, result: Tensor) -> Tensor:
        """[...] and [...] -> [...]."""
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """[...] -> [...]."""
        return gradients[0], None


class _LearnedRange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, scales: Tensor, scheme: WeightScheme) -> Tensor:
        ctx.scheme = scheme
        ctx.save_for_backward(weight, scales)
        return _joined([_there_and_back(w, s, scheme) for w, s in _blocks(weight, stored_scales(scales))])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        weight, scales = ctx.saved_tensors
        blocks = _blocks(weight, stored_scales(scales), gradients[0])
        of_weight, of_scales = zip(*(_slopes(w, s, g, ctx.scheme) for w, s, g in blocks), strict=True)
        return _joined(of_weight), _joined(of_scales).to(scales.dtype), None


def _slopes(weight: Tensor, scales: Tensor, gradient: Tensor, scheme: WeightScheme) -> tuple[Tensor, Tensor]:
    """Gradients of weights [R, C] and scales [R, G]; in fp32, since nothing of a gradient is stored."""
    group = weight.shape[-1] // scales.shape[-1]
    gradient = _in_groups(gradient, group)
    ratio = _in_groups(weight, group).float() / scales.float().unsqueeze(-1)
    rounded = ratio.round()
    bounded = rounded.clamp(scheme.lowest, scheme.highest)
    inside = rounded == bounded
    slope = torch.where(inside, bounded - ratio, bounded)
    return (gradient * inside).flatten(-2), (gradient.float() * slope).sum(-1)

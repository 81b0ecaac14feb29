"""A weight as it ships: integers and their scales."""

from typing import NamedTuple

import torch
from torch import Tensor

from mobilellm_pro.quantization import weight_quantizer
from mobilellm_pro.quantization.scheme import WeightScheme


class QuantizedWeight(NamedTuple):
    """Integers [R, C] (int8, within the scheme's bits) and scales [R, G] (bfloat16)."""

    integers: Tensor
    scales: Tensor

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """What training multiplied by, [R, C]."""
        return weight_quantizer.dequantize(self.integers, self.scales, dtype)


def quantize_weight(
    name: str, weight: Tensor, scheme: WeightScheme, learned_scales: Tensor | None = None
) -> QuantizedWeight:
    """Rounds a weight [R, C] to integers: under the ranges that were learned [R, G], or those of the weight itself.

    Raises:
        ValueError: NaN or infinite weights or ranges, or rows that do not divide into groups; the weight is named.
    """
    weight_quantizer.refuse_non_finite(name, weight)
    if learned_scales is None:
        scales = weight_quantizer.choose_scales(weight, scheme, name)
    else:
        weight_quantizer.refuse_non_finite(f"the ranges of {name}", learned_scales)
        scales = weight_quantizer.stored_scales(learned_scales)
    return QuantizedWeight(weight_quantizer.quantize(weight, scales, scheme), scales)

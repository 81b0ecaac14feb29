"""Two four-bit integers in a byte: the even column in the low half, the odd one in the high half.

This is the order of torchao's and of most loaders' `packed` tensors; files say so in their metadata.
"""

import torch
from torch import Tensor


def pack(integers: Tensor) -> Tensor:
    """[R, C] of int8 in -8 ... 7 -> [R, C / 2] of uint8.

    Raises:
        ValueError: an odd number of columns, or a number that has no four bits.
    """
    if integers.shape[-1] % 2:
        raise ValueError(f"rows of {integers.shape[-1]} integers cannot be packed in pairs")
    if integers.numel() and not (-8 <= int(integers.min()) and int(integers.max()) <= 7):
        raise ValueError(f"integers from {int(integers.min())} to {int(integers.max())}; four bits hold -8 to 7")
    nibbles = integers.to(torch.uint8) & 0xF  # two's complement
    return nibbles[..., 0::2] | (nibbles[..., 1::2] << 4)


def unpack(packed: Tensor) -> Tensor:
    """[R, C / 2] of uint8 -> [R, C] of int8."""
    nibbles = torch.stack((packed & 0xF, packed >> 4), dim=-1).flatten(-2).to(torch.int8)
    return torch.where(nibbles > 7, nibbles - 16, nibbles)

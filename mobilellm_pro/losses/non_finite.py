"""Find which input made a loss NaN or infinite.

A NaN spreads: one bad value in a hidden state is a NaN in every parameter one step later. Whoever trains looks at the
loss alone, and searches the inputs only once it is not finite: each of them is read whole.

Shape suffixes: none; tensors of any shape.
"""

import torch
from torch import Tensor


def non_finite_reports(**tensors: Tensor | None) -> list[str]:
    """`non_finite_report` of every tensor that has one, in the order given; empty when all values are finite.

    Args:
        tensors: what went into a loss, by the name to report; None and integer tensors are skipped.
    """
    return [report for name, tensor in tensors.items() if (report := non_finite_report(name, tensor))]


def non_finite_report(name: str, tensor: Tensor | None) -> str | None:
    """`name [shape]: how many NaN, how many infinite, where the first`, or None when all values are finite."""
    if tensor is None or not tensor.is_floating_point():
        return None
    bad = ~tensor.detach().isfinite()
    count = int(bad.sum())
    if count == 0:
        return None
    num_nan = int(tensor.detach().isnan().sum())
    first = [int(i) for i in torch.unravel_index(bad.flatten().to(torch.uint8).argmax(), tensor.shape)]
    return f"{name} {list(tensor.shape)}: {num_nan} NaN, {count - num_nan} infinite, first at {first}"

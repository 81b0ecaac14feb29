"""Find which input made a loss NaN or infinite, and stop with its name.

A NaN spreads: one bad value in a hidden state is a NaN in every parameter one step later. The loss itself tells that
something is wrong, at the price of one scalar; only then are the inputs searched.

Shape suffixes: none; tensors of any shape.
"""

import torch
from torch import Tensor


def raise_if_not_finite(loss: Tensor, *, step: int, rank: int, **tensors: Tensor | None) -> None:
    """Do nothing for a finite loss; otherwise name the step, the rank and each bad tensor among `tensors`.

    Args:
        loss: scalar; reading it waits for the device once.
        step, rank: as the message should give them.
        tensors: what went into the loss, by the name to report; None and integer tensors are skipped.

    Raises:
        FloatingPointError: the loss is NaN or infinite.
    """
    value = loss.item()
    if value - value == 0:
        return
    found = [report for name, tensor in tensors.items() if (report := non_finite_report(name, tensor))]
    cause = (
        "; ".join(found) or f"{', '.join(tensors) or 'no tensor'}: finite here, so look at other ranks or at overflow"
    )
    raise FloatingPointError(f"loss is {value} at step {step} on rank {rank}: {cause}")


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

"""The merge itself, M = sum_b w_b theta_b, and which weights a parameter gets."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
_EMBEDDING = "embed_tokens"


def weighted_average(tensors: Iterable[Tensor], weights: Sequence[float]) -> Tensor:
    """sum_b w_b theta_b of one parameter, in float32, or float64 where the tensors are.

    The tensors may come from a generator: one is needed at a time, beside the sum.

    Args:
        tensors: theta_b, all of one shape, on one device.
        weights: w_b.

    Returns:
        their shape; a new tensor.

    Raises:
        ValueError: no tensors, another number of weights, or another shape.
    """
    total: Tensor | None = None
    coming = iter(tensors)
    for weight in weights:
        tensor = next(coming, None)
        if tensor is None:
            raise ValueError(f"fewer tensors than the {len(weights)} weights")
        if total is None:
            total = torch.zeros_like(tensor, dtype=torch.promote_types(tensor.dtype, torch.float32))
        if tensor.shape != total.shape:
            raise ValueError(f"a tensor of shape {list(tensor.shape)}, expected {list(total.shape)} as the first")
        total.addcmul_(tensor, torch.tensor(weight, dtype=total.dtype, device=total.device))
        del tensor  # before the next one comes
    if next(coming, None) is not None:
        raise ValueError(f"more tensors than the {len(weights)} weights")
    if total is None:
        raise ValueError("expected at least one tensor to average")
    return total


@dataclass(frozen=True)
class LayerGroups:
    """Parameters that share their weights: the embedding, and runs of layers; or all of them.

    Args:
        first_layers: of each run of layers, ascending from 0; empty: one group of everything.
    """

    first_layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        first = self.first_layers
        if first and (first[0] != 0 or list(first) != sorted(set(first))):
            raise ValueError(f"{list(first)}: expected first layers in ascending order, beginning with 0")

    @property
    def names(self) -> list[str]:
        """Of the groups, in order; what is neither embedding nor layer belongs to the last."""
        if not self.first_layers:
            return ["all"]
        ends = [str(layer - 1) for layer in self.first_layers[1:]] + ["end"]
        return ["embedding", *(f"layers {first} to {end}" for first, end in zip(self.first_layers, ends))]

    def of(self, parameter: str) -> int:
        """Number of the group that a parameter belongs to, by its name."""
        if not self.first_layers or _EMBEDDING in parameter:
            return 0
        found = _LAYER.search(parameter)
        if found is None:
            return len(self.first_layers)
        return int(np.searchsorted(self.first_layers, int(found.group(1)), side="right"))

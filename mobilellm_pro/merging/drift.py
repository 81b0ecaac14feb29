"""How far branches are from their parent and from each other: what an average of weights can bear.

Averages work where branches stayed in one basin. Two signs that one did not: it moved far from the parent relative to
the parent's length, or the score rises on the line between it and the others (a barrier; Frankle et al. 2020).
"""

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

BLOCK_ELEMENTS = 2**16
"""Differences are taken so many at a time: half a megabyte in float64 stays in a core's cache."""

Read = Callable[[str], Tensor]
"""Name of a parameter -> the tensor."""


def relative_distances(names: Iterable[str], parent: Read, branches: Sequence[Read]) -> list[float]:
    """|theta_b - theta_parent| / |theta_parent| of each branch, summed in float64 over all parameters.

    Two tensors are in memory at a time.

    Args:
        names: of the parameters.
        parent, branches: give a parameter's tensor.
    """
    length, distances = 0.0, [0.0] * len(branches)
    for name in names:
        origin = parent(name).flatten()
        length += _squares(origin, None)
        for number, read in enumerate(branches):
            distances[number] += _squares(origin, read(name).flatten())
    return [math.sqrt(distance / length) if length else math.inf for distance in distances]


def _squares(origin: Tensor, other: Tensor | None) -> float:
    """Sum of squares of a tensor, or of its difference from another."""
    total = 0.0
    for begin in range(0, origin.numel(), BLOCK_ELEMENTS):
        block = origin[begin : begin + BLOCK_ELEMENTS].double()
        if other is not None:
            block = other[begin : begin + BLOCK_ELEMENTS].double() - block
        total += float(torch.dot(block, block))
    return total


def barrier(ends: tuple[float, float], shares: Sequence[float], scores: Sequence[float]) -> float:
    """The most that scores on a line between two models lie above the straight line between the ends' scores.

    Args:
        ends: scores of both.
        shares: of the second one at each point, between 0 and 1.
        scores: there; lower is better.

    Returns:
        below 0 where the score is better everywhere on the line than on the straight one.
    """
    return max(score - (1 - share) * ends[0] - share * ends[1] for share, score in zip(shares, scores, strict=True))

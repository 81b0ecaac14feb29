"""Weights that sum to 1: the nearest ones to any point, and coordinates without that constraint.

Shapes: G groups of layers, B branches.
"""

import numpy as np


def nearest_weights(point: np.ndarray, allow_negative: bool = False) -> np.ndarray:
    """The nearest (least squares) weights to each row of a point.

    On the simplex that is max(x - c, 0) with the one number c that makes the sum 1; where weights may be negative, the
    excess is taken from all alike.

    Args:
        point: [G, B].
        allow_negative: weights need only sum to 1.
    """
    if allow_negative:
        return point - (point.sum(-1, keepdims=True) - 1) / point.shape[-1]
    descending = -np.sort(-point, axis=-1)
    excess = (np.cumsum(descending, axis=-1) - 1) / np.arange(1, point.shape[-1] + 1)
    count = (descending > excess).sum(-1, keepdims=True)  # weights above 0 in the result
    return np.maximum(point - np.take_along_axis(excess, count - 1, axis=-1), 0.0)


class SimplexCoordinates:
    """A neighbourhood of weights as a plain vector space: orthonormal steps that keep every row's sum.

    Args:
        origin: [G, B] weights at the coordinates 0.
        allow_negative: else a point outside the simplex means the nearest weights on it.
    """

    def __init__(self, origin: np.ndarray, allow_negative: bool = False) -> None:
        self.origin, self.allow_negative = origin, allow_negative
        branches = origin.shape[1]
        steps = np.tril(np.ones((branches - 1, branches)))
        steps[np.arange(branches - 1), np.arange(1, branches)] = -np.arange(1, branches)
        self._steps = steps / np.linalg.norm(steps, axis=1, keepdims=True)  # Helmert's rows, [B - 1, B]

    @property
    def size(self) -> int:
        """G (B - 1)."""
        return self.origin.shape[0] * self._steps.shape[0]

    def weights(self, coordinates: np.ndarray) -> np.ndarray:
        """[size] -> [G, B]."""
        steps = coordinates.reshape(self.origin.shape[0], -1) @ self._steps
        return nearest_weights(self.origin + steps, self.allow_negative)

    def coordinates(self, weights: np.ndarray) -> np.ndarray:
        """[G, B] -> [size]."""
        return ((weights - self.origin) @ self._steps.T).ravel()

"""What is quantized how, as plain values; facts and names of the paper's Table 3."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

CacheDtype = Literal["model", "int8"]
"""Of keys and values: the model's own type, or a byte a number with a range for each token and head."""


@dataclass(frozen=True)
class WeightScheme:
    """Symmetric integers with a scale for each group of neighbours in a row.

    Attributes:
        bits: of an integer, 2 to 8.
        group: weights of a row that share a scale; None: all of them, a scale for each output channel.
        learned: the scales are parameters that begin at the computed ones; else they follow from the weights.
    """

    bits: int = 4
    group: int | None = 32
    learned: bool = False

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise ValueError(f"weights of {self.bits} bits; expected 2 to 8")
        if self.group is not None and self.group < 1:
            raise ValueError(f"groups of {self.group} weights; expected at least 1, or None for whole rows")

    @property
    def lowest(self) -> int:
        """Smallest integer."""
        return -(1 << (self.bits - 1))

    @property
    def highest(self) -> int:
        """Largest integer."""
        return (1 << (self.bits - 1)) - 1

    def group_of(self, width: int, name: str = "a weight") -> int:
        """Weights that share a scale in rows of `width`.

        Raises:
            ValueError: the width is no multiple of the group; `name` says of what.
        """
        group = width if self.group is None else self.group
        if width == 0 or width % group:
            raise ValueError(
                f"{name}: rows of {width} weights do not divide into groups of {group}; choose another group or keep "
                "this layer out of the scheme"
            )
        return group


@dataclass(frozen=True)
class Scheme:
    """Of a whole model.

    Attributes:
        weights: of linear layers, embedding and head.
        activation_bits: of what goes into linear layers and the head, asymmetric per token with ranges of the moment;
            None: the model's own type.
        cache: of keys and values.
        shared_table: embedding and head are one stored table with one set of scales; else each has its own.
    """

    weights: WeightScheme = field(default_factory=WeightScheme)
    activation_bits: int | None = 8
    cache: CacheDtype = "int8"
    shared_table: bool = True


SCHEMES: Mapping[str, Scheme] = {
    "cpu": Scheme(),
    "accelerator": Scheme(WeightScheme(group=None, learned=True), None, "model", shared_table=False),
}
"""The paper's two."""

"""Curves over the steps of runs: what `compare` and `report` have in common."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class Curve:
    """One line of a plot."""

    steps: Sequence[int]
    values: Sequence[float]

    @classmethod
    def of(cls, records: Sequence[Mapping[str, Any]], key: str) -> "Curve":
        """What records of metrics.jsonl say of a key; those without it are left out."""
        found = [(record["step"], float(record[key])) for record in records if key in record]
        return cls([step for step, _ in found], [value for _, value in found])


def draw_curves(
    axes: "Axes", curves: Mapping[str, Curve], label: str, *, levels: Mapping[str, float] | None = None
) -> None:
    """Draws curves by name, and dashed lines at levels by name.

    Args:
        axes: to draw on.
        curves: name -> its points; those that are few are marked.
        label: of the values.
        levels: name -> value, as a teacher's.
    """
    for name, curve in curves.items():
        axes.plot(curve.steps, curve.values, label=name, marker="." if len(curve.steps) <= 20 else "")
    for name, value in (levels or {}).items():
        axes.axhline(value, color="gray", linestyle="--", label=name)
    axes.set(xlabel="step", ylabel=label)
    axes.grid(alpha=0.3)
    axes.legend()

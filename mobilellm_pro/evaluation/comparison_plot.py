"""The radar chart of a comparison: an axis a column of the suite, a closed line a model."""

import math
from collections.abc import Mapping, Sequence
from io import BytesIO

MIN_AXES = 3
"""Fewer columns make no area."""

_STEP = 20  # percent between two rings


def radar(columns: Sequence[str], scores: Mapping[str, Sequence[float]]) -> bytes:
    """The chart as a PNG file.

    The middle is always 0, so that areas of two charts can be looked at side by side; the rim is the next full ring
    above the best score.

    Args:
        columns: names of the axes, at least `MIN_AXES`, clockwise from the top.
        scores: model -> percent of each column.
    """
    from matplotlib.figure import Figure

    assert len(columns) >= MIN_AXES and all(len(values) == len(columns) for values in scores.values())
    angles = [2 * math.pi * number / len(columns) for number in range(len(columns))]
    rim = _STEP * max(1, math.ceil(max(value for values in scores.values() for value in values) / _STEP))
    figure = Figure(figsize=(7, 6), layout="constrained")
    axes = figure.add_subplot(projection="polar", theta_offset=math.pi / 2, theta_direction=-1)
    for name, values in scores.items():
        (line,) = axes.plot([*angles, angles[0]], [*values, values[0]], marker=".", label=name)
        axes.fill(angles, values, color=line.get_color(), alpha=0.08)
    axes.set_xticks(angles, list(columns))
    axes.set_yticks(range(_STEP, rim + 1, _STEP), [f"{ring} %" for ring in range(_STEP, rim + 1, _STEP)], fontsize=8)
    axes.tick_params(axis="x", pad=12)
    axes.set_ylim(0, rim)
    figure.legend(loc="outside lower center", ncols=2, fontsize=8)
    buffer = BytesIO()
    figure.savefig(buffer, dpi=120, format="png")
    return buffer.getvalue()

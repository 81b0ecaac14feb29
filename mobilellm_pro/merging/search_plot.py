"""The search for weights as a picture: every candidate's score, the best so far, and the weights that won."""

from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import TYPE_CHECKING

import numpy as np

from mobilellm_pro.merging.weight_search import Candidate

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw_search(
    candidates: Sequence[Candidate], winner: np.ndarray, branches: Sequence[str], groups: Sequence[str], *, score: str
) -> bytes:
    """A PNG file.

    Args:
        candidates: in their order.
        winner: [groups, branches] weights that were taken.
        branches, groups: their names.
        score: what the scores are, for the axis.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")  # without pyplot: nothing global, nothing to close
    left, right = figure.subplots(1, 2, width_ratios=(2, 1))
    _scores(left, candidates, score)
    _weights(right, dict(zip(groups, winner)), branches)
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": ""})
    return buffer.getvalue()


def _scores(axes: "Axes", candidates: Sequence[Candidate], score: str) -> None:
    from matplotlib.ticker import MaxNLocator

    finite = [number for number, candidate in enumerate(candidates) if np.isfinite(candidate.score)]
    for stage in dict.fromkeys(candidates[number].stage for number in finite):
        numbers = [number for number in finite if candidates[number].stage == stage]
        axes.scatter(numbers, [candidates[number].score for number in numbers], s=14, label=stage)
    best = np.minimum.accumulate([candidate.score for candidate in candidates])
    axes.step(range(len(best)), np.where(np.isfinite(best), best, np.nan), where="post", color="k", linewidth=0.8)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="candidate", ylabel=score, title="line: the best so far")
    axes.legend(fontsize=8)


def _weights(axes: "Axes", rows: Mapping[str, np.ndarray], branches: Sequence[str]) -> None:
    """Bars of each branch, a group of layers beside the other."""
    width, places = 0.8 / len(rows), np.arange(len(branches))
    for number, (name, weights) in enumerate(rows.items()):
        axes.bar(places - 0.4 + (number + 0.5) * width, weights, width, label=name)
    axes.axhline(1 / len(branches), color="k", linewidth=0.5, linestyle="--")
    axes.set_xticks(places, branches, rotation=30, ha="right")
    axes.set(ylabel="weight", title="taken (dashed: uniform)")
    if len(rows) > 1:
        axes.legend(fontsize=8)

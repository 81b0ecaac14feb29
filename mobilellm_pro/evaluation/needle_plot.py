"""Heat maps of needle tests: green where all needles were found.

Of one test: lengths to the right, depths downwards. Of several models: lengths to the right, a row a model.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mobilellm_pro.atomic_file import replacement

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def found_shares(scores: Mapping[str, Any]) -> np.ndarray:
    """Percent of the needles found, float64 [depths, lengths], from a `summary`."""
    return 100 * np.array(scores["found"], dtype=np.float64).T / scores["needles_per_place"]


def plot_heat_map(scores: Mapping[str, Any], title: str, path: Path) -> None:
    """Writes the PNG of one test."""
    _write(heat_map(scores, title), path)


def heat_map(scores: Mapping[str, Any], title: str) -> "Figure":
    """The picture of one test, from a `summary`."""
    said = f"{title}: {scores['correct']}/{scores['total']} = {scores['score']:.2f} %"
    depths = [f"{depth:g}" for depth in scores["depths"]]
    return _shares_figure(found_shares(scores), scores["lengths"], depths, rows="depth of the needle (%)", title=said)


def plot_models(by_length: Mapping[str, Sequence[float]], lengths: Sequence[int], title: str, path: Path) -> None:
    """Writes the PNG of the same test of several models.

    Args:
        by_length: name -> percent of the needles found at each length.
        lengths: tokens of prompt and answer.
        title: of the picture.
        path: of the file.
    """
    _write(_shares_figure(np.array(list(by_length.values())), lengths, list(by_length), title=title), path)


def _shares_figure(
    shares: np.ndarray, lengths: Sequence[int], names: Sequence[str], *, title: str, rows: str = ""
) -> "Figure":
    """Percents [rows, lengths] with a name at each row."""
    from matplotlib.figure import Figure

    num_rows, num_lengths = shares.shape
    figure = Figure(figsize=(3 + 0.7 * num_lengths, 2 + 0.4 * num_rows), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(shares, cmap="RdYlGn", vmin=0, vmax=100, aspect="auto")
    axes.set_xticks(range(num_lengths), [f"{length:,}" for length in lengths], rotation=45, ha="right")
    axes.set_yticks(range(num_rows), list(names))
    for row, length in np.ndindex(shares.shape):
        axes.text(length, row, f"{shares[row, length]:.0f}", ha="center", va="center", fontsize=8)
    axes.set(xlabel="tokens of prompt and answer", ylabel=rows)
    axes.set_title(title)
    figure.colorbar(image, label="needles found (%)")
    return figure


def _write(figure: "Figure", path: Path) -> None:
    """The file appears by rename."""
    with replacement(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")

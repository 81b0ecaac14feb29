"""The heat map of a needle test: lengths to the right, depths downwards, green where all needles were found."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np


def found_shares(scores: Mapping[str, Any]) -> np.ndarray:
    """Percent of the needles found, float64 [depths, lengths], from a `summary`."""
    return 100 * np.array(scores["found"], dtype=np.float64).T / scores["needles_per_place"]


def plot_heat_map(scores: Mapping[str, Any], title: str, path: Path) -> None:
    """Writes the PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shares = found_shares(scores)
    num_depths, num_lengths = shares.shape
    figure, axes = pyplot.subplots(figsize=(3 + 0.7 * num_lengths, 2 + 0.4 * num_depths), layout="constrained")
    image = axes.imshow(shares, cmap="RdYlGn", vmin=0, vmax=100, aspect="auto")
    axes.set_xticks(range(num_lengths), [f"{length:,}" for length in scores["lengths"]], rotation=45, ha="right")
    axes.set_yticks(range(num_depths), [f"{depth:g}" for depth in scores["depths"]])
    for depth, length in np.ndindex(shares.shape):
        axes.text(length, depth, f"{shares[depth, length]:.0f}", ha="center", va="center", fontsize=8)
    axes.set(xlabel="tokens of prompt and answer", ylabel="depth of the needle (%)")
    axes.set_title(f"{title}: {scores['correct']}/{scores['total']} = {scores['score']:.2f} %")
    figure.colorbar(image, label="needles found (%)")
    temporary = path.with_name(f".{path.stem}.tmp{os.getpid()}.png")
    figure.savefig(temporary, dpi=120)
    pyplot.close(figure)
    temporary.replace(path)

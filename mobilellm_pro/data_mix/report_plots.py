"""The plots of a data mix as PNG: weights, influence, it and its utility over the tokens, predictions."""

from collections.abc import Callable
from io import BytesIO
from typing import TYPE_CHECKING, Any

import numpy as np

from mobilellm_pro.data_mix.report_record import MixReport

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_INCHES = (3.6, 2.8)
"""Of a plot in a grid."""


def draw_plots(report: MixReport) -> dict[str, bytes]:
    """PNG files by name, of what the report holds: weights, influence, curves of both kinds, predictions."""
    wanted: dict[str, tuple[Any, Callable[[MixReport], Figure]]] = {
        "weights": (report.weights, _weights),
        "influence": (report.influence, _influence),
        "utility_curves": (report.utility_curves, _utility_curves),
        "curves": (report.curves, _curves),
        "predictions": (report.predictions, _predictions),
    }
    return {name: _png(draw(report)) for name, (content, draw) in wanted.items() if content}


def _png(figure: "Figure") -> bytes:
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": ""})
    return buffer.getvalue()


def _figure(width: float, height: float) -> "Figure":
    """Without pyplot: nothing global, no display, nothing to close."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _weights(report: MixReport) -> "Figure":
    """Bars of each source, ours with intervals, on a logarithmic axis: shares differ by factors of hundreds."""
    ours = np.array([row["weight"] for row in report.weights])
    mixtures = {"ours": ours, **{name: np.array(shares) for name, shares in report.baselines.items()}}
    figure = _figure(3 + 0.9 * len(ours), 4)
    axes = figure.subplots()
    width, places = 0.8 / len(mixtures), np.arange(len(ours))
    for number, (name, shares) in enumerate(mixtures.items()):
        axes.bar(places - 0.4 + (number + 0.5) * width, 100 * shares, width, label=name)
    low, high = (np.array([row[key] for row in report.weights]) for key in ("low", "high"))
    axes.errorbar(
        places - 0.4 + width / 2, 100 * ours, 100 * np.stack((ours - low, high - ours)), fmt="none", ecolor="k"
    )
    axes.set_yscale("log")
    axes.set_xticks(places, report.sources, rotation=30, ha="right")
    axes.set_ylabel("weight (%)")
    figure.legend(loc="outside right upper")
    return figure


def _influence(report: MixReport) -> "Figure":
    """The heat map, each domain (column) relative to its largest influence, with the numbers themselves."""
    table = np.array(report.influence)
    largest = np.abs(table).max(0)
    figure = _figure(2.5 + 0.9 * table.shape[1], 1.8 + 0.5 * table.shape[0])
    axes = figure.subplots()
    image = axes.imshow(table / np.where(largest > 0, largest, 1), cmap="RdYlGn", vmin=-1, vmax=1, aspect="auto")
    axes.set_xticks(range(table.shape[1]), report.domains, rotation=30, ha="right")
    axes.set_yticks(range(table.shape[0]), report.sources)
    for row, column in np.ndindex(table.shape):
        axes.text(column, row, f"{table[row, column]:.2g}", ha="center", va="center", fontsize=8)
    axes.set(xlabel="domain", ylabel="source", title="influence, nats a token per 1,000 tokens")
    figure.colorbar(image, label="relative to the domain's largest")
    return figure


def _utility_curves(report: MixReport) -> "Figure":
    """A line for each source, in a band of one deviation of its samples."""
    figure = _figure(8, 4)
    axes = figure.subplots()
    for source, curve in report.utility_curves.items():
        mean, deviation = np.array(curve["mean"]), np.array(curve["deviation"])
        (line,) = axes.plot(curve["tokens"], mean, marker=".", label=source)
        axes.fill_between(
            curve["tokens"], mean - deviation, mean + deviation, color=line.get_color(), alpha=0.08, linewidth=0
        )
    axes.set_xscale("log")
    largest = max(np.abs(curve["mean"]).max() for curve in report.utility_curves.values())
    axes.set_yscale("symlog", linthresh=largest / 5 or 1.0)
    axes.set(xlabel="tokens of the source", ylabel="nats a token per 1,000 tokens, domains weighted")
    figure.legend(loc="outside right upper")
    return figure


def _curves(report: MixReport) -> "Figure":
    """A plot for each source, a line for each domain."""
    figure = _figure(*_grid_inches(len(report.curves)))
    for axes, (source, curve) in zip(_grid(figure, len(report.curves)), report.curves.items()):
        for name, line in zip(report.domains, np.array(curve["mean"]).T):
            axes.plot(curve["tokens"], line, label=name, linewidth=1)
        axes.set_xscale("log")
        axes.set_yscale("symlog", linthresh=1e-6)
        axes.set_title(source, fontsize=9)
        axes.set_xlabel("tokens of the source", fontsize=8)
        axes.set_ylabel("nats a token per 1,000 tokens", fontsize=8)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize=7)
    return figure


def _predictions(report: MixReport) -> "Figure":
    """A plot for each target, a point for each run."""
    figure = _figure(*_grid_inches(len(report.predictions)))
    for axes, (target, one) in zip(_grid(figure, len(report.predictions)), report.predictions.items()):
        axes.scatter(one["measured"], one["predicted"], s=6)
        ends = [min(*one["measured"], *one["predicted"]), max(*one["measured"], *one["predicted"])]
        axes.plot(ends, ends, color="k", linewidth=0.5)
        rho = one["rank_correlation"]
        axes.set_title(f"{target}: " + ("constant" if rho is None else f"rank correlation {rho:.3f}"), fontsize=9)
        axes.set_xlabel("measured utility", fontsize=8)
        axes.set_ylabel("predicted", fontsize=8)
    return figure


def _grid_inches(count: int) -> tuple[float, float]:
    columns = min(count, 4)
    return _INCHES[0] * columns + 1, _INCHES[1] * -(-count // columns)


def _grid(figure: "Figure", count: int) -> list[Any]:
    """As many axes, at most four in a row."""
    columns = min(count, 4)
    rows = -(-count // columns)
    return [figure.add_subplot(rows, columns, number + 1) for number in range(count)]

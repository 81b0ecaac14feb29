"""The pictures of a run's report as SVG: durations, curves of the trainings, tokens of the corpora, needle tests."""

from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import TYPE_CHECKING, Any

from mobilellm_pro.evaluation.needle_plot import heat_map
from mobilellm_pro.pipeline.curve_plot import Curve, draw_curves
from mobilellm_pro.pipeline.pipeline_status import duration

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_WIDTH = 10.5
"""Inches of a picture as wide as the page."""

_UNITS = ((86_400, "days"), (3600, "hours"), (60, "minutes"), (1, "seconds"))


def durations_plot(seconds: Mapping[str, float]) -> bytes:
    """Bars of wall time, the first phase on top."""
    figure = _figure(_WIDTH, 0.9 + 0.27 * len(seconds))
    axes = figure.subplots()
    longest = max(seconds.values())
    unit, name = next((unit, name) for unit, name in _UNITS if longest >= 2 * unit or unit == 1)
    bars = axes.barh(list(seconds), [value / unit for value in seconds.values()], color="#4c78a8")
    axes.bar_label(bars, [duration(value) for value in seconds.values()], padding=4, fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlabel(f"wall time of all starts ({name})")
    axes.spines[["top", "right"]].set_visible(False)
    return _svg(figure)


def curves_plot(train: Sequence[Mapping[str, Any]], validation: Sequence[Mapping[str, Any]]) -> bytes:
    """Side by side what a training has of these: KL to the teacher, cross entropy, held-out bits per byte.

    Args:
        train, validation: records with step and terms of the loss.
    """
    teacher = validation[-1].get("teacher_bits_per_byte") if validation else None
    panels = {
        "KL to the teacher (nats/token)": _curves(train, {"training": "distill/kl"})
        | _curves(validation, {"held out": "kl"}),
        "cross entropy (nats/token)": _curves(train, {"training": "distill/ce"})
        | _curves(validation, {"held out": "ce"})
        | _curves(train, {"teacher, training": "distill/teacher_ce"}),
        "bits per byte": _curves(validation, {"held out": "bits_per_byte"}),
    }
    panels = {label: curves for label, curves in panels.items() if curves}
    figure = _figure(_WIDTH, 2.9)
    for axes, (label, curves) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        levels = {"teacher, held out": float(teacher)} if "bits" in label and teacher is not None else {}
        draw_curves(axes, curves, label, levels=levels)
        axes.legend(fontsize=8)
    return _svg(figure)


def _curves(records: Sequence[Mapping[str, Any]], keys: Mapping[str, str]) -> dict[str, Curve]:
    """Name -> the curve of a key, those that have points."""
    found = {name: Curve.of(records, key) for name, key in keys.items()}
    return {name: curve for name, curve in found.items() if curve.steps}


def tokens_plot(tokens: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> bytes:
    """A bar for each phase: which share of its tokens is of which corpus."""
    corpora = list(dict.fromkeys(name for found in tokens.values() for name in found))
    figure = _figure(_WIDTH, 1.2 + 0.27 * len(tokens))
    axes = figure.subplots()
    left = [0.0] * len(tokens)
    totals = [sum(one["tokens"] for one in found.values()) or 1 for found in tokens.values()]
    for corpus in corpora:
        shares = [
            100 * found[corpus]["tokens"] / total if corpus in found else 0.0
            for found, total in zip(tokens.values(), totals, strict=True)
        ]
        axes.barh(list(tokens), shares, left=left, label=corpus)
        left = [start + share for start, share in zip(left, shares, strict=True)]
    axes.invert_yaxis()
    axes.set(xlabel="tokens read (%)", xlim=(0, 100))
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", fontsize=8)
    return _svg(figure)


def needle_plot(scores: Mapping[str, Any], title: str) -> bytes:
    """The heat map of one test."""
    return _svg(heat_map(scores, title))


def _figure(width: float, height: float) -> "Figure":
    """Without pyplot: nothing global, no display, nothing to close."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _svg(figure: "Figure") -> bytes:
    """The same bytes for the same picture."""
    from matplotlib import rc_context

    buffer = BytesIO()
    with rc_context({"svg.hashsalt": "report"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()

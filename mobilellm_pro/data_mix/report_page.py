"""The report of a data mix: JSON, PNG plots, and one HTML page that needs no other file.

write_report(make_report("Mix of phase 1", result, baselines, ...), Path("outputs/mix"))
"""

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from mobilellm_pro.data_mix.report_plots import draw_plots
from mobilellm_pro.data_mix.report_record import MixReport, replace_file

NAME = "mix_report"
DIGITS = 6
"""Significant digits of the page; the JSON file has all."""
_STYLE = (
    "body{font:15px/1.5 sans-serif;max-width:72rem;margin:2rem auto;padding:0 1rem}table{border-collapse:collapse}"
    "td,th{border:1px solid #bbb;padding:.2rem .6rem;text-align:right}td:first-child,th:first-child{text-align:left}"
    "img{max-width:100%}"
)


def write_report(report: MixReport, folder: Path) -> list[Path]:
    """Writes mix_report.json, mix_report_<plot>.png and mix_report.html into a folder, which is made; each by rename.

    Returns:
        the files, the page last: a page that is there is complete.

    Raises:
        ValueError: a number that is not finite.
    """
    files = {f"{NAME}.json": report.to_json().encode()}
    plots = draw_plots(report)
    files |= {f"{NAME}_{name}.png": image for name, image in plots.items()}
    files[f"{NAME}.html"] = html_page(report, plots).encode()
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        replace_file(folder / name, content)
    return [folder / name for name in files]


def html_page(report: MixReport, plots: dict[str, bytes]) -> str:
    """The page; each section has an id, and one without content says so."""
    sections = {
        "weights": ("Weights", [_weights(report), _image(plots, "weights")]),
        "baselines": ("Beside other mixtures", [_baselines(report)]),
        "influence": ("Influence of sources on domains", [_influence(report), _image(plots, "influence")]),
        "utility_curves": (
            "Utility of the sources over the tokens read",
            [_utility_legend(report), _image(plots, "utility_curves")],
        ),
        "curves": ("Influence over the tokens read", [_image(plots, "curves")]),
        "predictions": ("Predicted against measured utility", [_predictions(report), _image(plots, "predictions")]),
        "scores": ("Regressors", [_pairs("regressor", "out-of-fold rank correlation", report.scores)]),
        "settings": ("Settings", [_pairs("setting", "value", report.settings)]),
        "notes": ("Notes", ["".join(f"<p>{escape(note)}</p>" for note in report.notes)]),
    }
    body = "".join(
        f'<section id="{key}"><h2>{heading}</h2>{"".join(parts) or "<p>not part of this run</p>"}</section>\n'
        for key, (heading, parts) in sections.items()
    )
    title = escape(report.title)
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style>'
        f"</head><body>\n<h1>{title}</h1>\n{body}</body></html>\n"
    )


def _weights(report: MixReport) -> str:
    keys = ["tokens", "natural_share", "utility", "unlimited", "low_limit", "high_limit", "weight", "low", "high"]
    keys += ["epochs", "limit"]
    rows = [[row["name"], *(row[key] for key in keys)] for row in report.weights]
    legend = (
        f"<p>Method: {escape(report.method)}. unlimited = natural share x exp(utility / temperature), normalised; "
        "weight = the solution between the limits, in millionths; low to high: 5 % to 95 % of the draws (see the "
        "notes), the same as the weight without draws.</p>"
    )
    return legend + _table(["source", *keys], rows)


def _baselines(report: MixReport) -> str:
    mixtures = {"ours": [row["weight"] for row in report.weights], **report.baselines}
    rows: list[list[Any]] = [[name, *values] for name, *values in zip(report.sources, *mixtures.values())]
    if report.predicted_utility:
        rows.append(["predicted utility", *(report.predicted_utility.get(name, "-") for name in mixtures)])
    return _table(["source", *mixtures], rows)


def _influence(report: MixReport) -> str:
    rows = [[name, *values] for name, values in zip(report.sources, report.influence)]
    return _table(["source", *report.domains], rows) if rows else ""


def _utility_legend(report: MixReport) -> str:
    if not report.utility_curves:
        return ""
    return (
        "<p>Influence of each source on all domains, each weighted as in the utility; the band is one standard "
        "deviation of the samples, at most (those of the domains are added).</p>"
    )


def _predictions(report: MixReport) -> str:
    rows = [
        [target, len(one["runs"]), "constant" if one["rank_correlation"] is None else one["rank_correlation"]]
        for target, one in report.predictions.items()
    ]
    return _table(["target", "runs", "leave-one-mixture-out rank correlation"], rows) if rows else ""


def _pairs(key: str, value: str, content: dict[str, Any]) -> str:
    return _table([key, value], [list(pair) for pair in content.items()]) if content else ""


def _table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in header)
    body = "".join("<tr>" + "".join(f"<td>{escape(_word(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def _word(value: Any) -> str:
    return f"{value:.{DIGITS}g}" if isinstance(value, float) else str(value)


def _image(plots: dict[str, bytes], name: str) -> str:
    if name not in plots:
        return ""
    return f'<p><img alt="{name}" src="data:image/png;base64,{base64.b64encode(plots[name]).decode()}"></p>'

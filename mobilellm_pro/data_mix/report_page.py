"""The report of a data mix: JSON, PNG plots, and one HTML page that needs no other file.

write_report(make_report("Mix of phase 1", result, baselines, ...), Path("outputs/mix"))
"""

from pathlib import Path
from typing import Any

from mobilellm_pro.atomic_file import write_atomically
from mobilellm_pro.data_mix.report_plots import draw_plots
from mobilellm_pro.data_mix.report_record import MixReport
from mobilellm_pro.static_page import Section, html_page, paragraph, picture, table

NAME = "mix_report"


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
    files[f"{NAME}.html"] = mix_page(report, plots).encode()
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        write_atomically(folder / name, content)
    return [folder / name for name in files]


def mix_page(report: MixReport, plots: dict[str, bytes]) -> str:
    """The page; each section has an id, and one without content says so."""
    sections = {
        "weights": ("Weights", [weights_table(report), _image(plots, "weights")]),
        "baselines": ("Beside other mixtures", [baselines_table(report)]),
        "influence": ("Influence of sources on domains", [_influence(report), _image(plots, "influence")]),
        "utility_curves": (
            "Utility of the sources over the tokens read",
            [_utility_legend(report), _image(plots, "utility_curves")],
        ),
        "curves": ("Influence over the tokens read", [_image(plots, "curves")]),
        "predictions": ("Predicted against measured utility", [_predictions(report), _image(plots, "predictions")]),
        "scores": ("Regressors", [_pairs("regressor", "out-of-fold rank correlation", report.scores)]),
        "settings": ("Settings", [_pairs("setting", "value", report.settings)]),
        "notes": ("Notes", [paragraph(note) for note in report.notes]),
    }
    return html_page(report.title, [Section(key, *section) for key, section in sections.items()])


def weights_table(report: MixReport) -> str:
    """HTML: how the weight of each source came about."""
    keys = ["tokens", "natural_share", "utility", "unlimited", "low_limit", "high_limit", "weight", "low", "high"]
    keys += ["epochs", "limit"]
    rows = [[row["name"], *(row[key] for key in keys)] for row in report.weights]
    legend = paragraph(
        f"Method: {report.method}. unlimited = natural share x exp(utility / temperature), normalised; "
        "weight = the solution between the limits, in millionths; low to high: 5 % to 95 % of the draws (see the "
        "notes), the same as the weight without draws."
    )
    return legend + table(["source", *keys], rows)


def baselines_table(report: MixReport) -> str:
    """HTML: the weights found beside other mixtures, with what the regressor expects of each."""
    mixtures = {"ours": [row["weight"] for row in report.weights], **report.baselines}
    rows: list[list[Any]] = [[name, *values] for name, *values in zip(report.sources, *mixtures.values())]
    if report.predicted_utility:
        rows.append(["predicted utility", *(report.predicted_utility.get(name, "-") for name in mixtures)])
    return table(["source", *mixtures], rows)


def _influence(report: MixReport) -> str:
    rows = [[name, *values] for name, values in zip(report.sources, report.influence)]
    return table(["source", *report.domains], rows) if rows else ""


def _utility_legend(report: MixReport) -> str:
    if not report.utility_curves:
        return ""
    return paragraph(
        "Influence of each source on all domains, each weighted as in the utility; the band is one standard "
        "deviation of the samples, at most (those of the domains are added)."
    )


def _predictions(report: MixReport) -> str:
    rows = [
        [target, len(one["runs"]), "constant" if one["rank_correlation"] is None else one["rank_correlation"]]
        for target, one in report.predictions.items()
    ]
    return table(["target", "runs", "leave-one-mixture-out rank correlation"], rows) if rows else ""


def _pairs(key: str, value: str, content: dict[str, Any]) -> str:
    return table([key, value], [list(pair) for pair in content.items()]) if content else ""


def _image(plots: dict[str, bytes], name: str) -> str:
    return picture(plots[name], name) if name in plots else ""

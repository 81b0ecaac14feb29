"""The page of a run's report, made from its record and from plots that other verbs have drawn."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from mobilellm_pro.data_mix.report_page import baselines_table, weights_table
from mobilellm_pro.data_mix.report_record import MixReport
from mobilellm_pro.pipeline.pipeline_status import duration
from mobilellm_pro.pipeline.run_report_plots import curves_plot, durations_plot, needle_plot, tokens_plot
from mobilellm_pro.pipeline.run_report_record import RunReport
from mobilellm_pro.pipeline.run_report_tables import evaluation_table, inside_phase, merge_tables, size_table
from mobilellm_pro.static_page import Html, Section, html_page, paragraph, picture, table

_ENVIRONMENT_FIRST = ("commit", "processor", "accelerator", "cpus", "processes", "platform", "python")
_VERSION = "versions."


def run_page(report: RunReport, plots: Mapping[str, bytes]) -> str:
    """The page; a section without content says in a line what it waits for.

    Args:
        report: the record.
        plots: files of the record's mixes and merges by their path.
    """
    sections = [
        Section("run", "What ran", _what_ran(report), "No phase has been started yet."),
        Section("phases", "Phases", _phases(report)),
        Section("curves", "Loss curves", _curves(report), _waits(report, "No loss was logged yet", "train")),
        Section("tokens", "Tokens of the corpora", _tokens(report), _waits(report, "No token was read yet", "train")),
        Section("mix", "Data mix", _mixes(report, plots), _waits(report, "No weights were found yet", "data_mix")),
        Section("merge", "Merge", _merges(report, plots), _waits(report, "Nothing was merged yet", "merge")),
        Section("needle", "Needle in a haystack", _needles(report), "No needle test has run yet."),
    ]
    if report.evaluations:
        sections.append(Section("evaluation", "Evaluation", [evaluation_table(report.evaluations, report.needles)]))
    sizes = [size_table(report.sizes)] if report.sizes else []
    sections.append(Section("sizes", "Model sizes", sizes, "No checkpoint was written yet."))
    done = sum(phase["state"] == "done" for phase in report.phases)
    lead = paragraph(f"{done} of {len(report.phases)} phases are done. Made {_time(report.made)} from {report.output}.")
    return html_page(f"Run of {report.pipeline}", sections, lead=lead, contents=True)


def _waits(report: RunReport, said: str, kind: str) -> str:
    """Why a section is empty: which phases will fill it, and how far they are."""
    found = [f"{phase['name']} ({phase['state']})" for phase in report.phases if phase["kind"] == kind]
    if not found:
        return f"This pipeline has no phase of kind {kind}."
    return f"{said}: waiting for {', '.join(found) if len(found) <= 3 else f'{len(found)} phases of kind {kind}'}."


def _what_ran(report: RunReport) -> list[str]:
    if not report.environment:
        return []
    began = min(phase["begun"] for phase in report.phases if phase["begun"])
    ended = max((phase["ended"] for phase in report.phases if phase["ended"]), default=None)
    seconds = sum(phase["wall_seconds"] or 0 for phase in report.phases)
    rows: list[list[str]] = [["pipeline", report.pipeline], ["output", report.output]]
    rows += [["first start", _time(began)], ["last end", "none yet" if ended is None else _time(ended)]]
    rows.append(["wall time of all phases", duration(seconds)])
    keys = sorted(report.environment, key=lambda key: (_place(key), key))
    shared = {key.removeprefix(_VERSION): _values(report.environment[key]) for key in keys
              if key.startswith(_VERSION) and len(report.environment[key]) == 1}  # fmt: skip
    rows += [[key.replace(_VERSION, "version of "), _values(report.environment[key])] for key in keys
             if key.removeprefix(_VERSION) not in shared]  # fmt: skip
    rows.append(["versions", ", ".join(f"{name} {version}" for name, version in shared.items())])
    return [table(["what", "value"], rows, text=["value"])]


def _place(key: str) -> int:
    """What matters most first, versions last."""
    if key in _ENVIRONMENT_FIRST:
        return _ENVIRONMENT_FIRST.index(key)
    return len(_ENVIRONMENT_FIRST) + key.startswith(_VERSION)


def _values(values: Mapping[str, Sequence[str]]) -> str:
    """One value for all, or each with the phases that had it."""
    if len(values) == 1:
        return next(iter(values))
    return "; ".join(f"{value} ({', '.join(phases)})" for value, phases in values.items())


def _time(moment: str) -> str:
    return moment.replace("T", " ").replace("+00:00", " UTC")


def _phases(report: RunReport) -> list[str]:
    header = ["phase", "kind", "state", "starts", "wall time", "steps", "tokens", "tokens/s", "loss", "bits/byte"]
    header += ["made"]
    rows = [_phase_cells(phase) for phase in report.phases]
    parts = [table(header, rows, text=["kind", "state", "made"])]
    legend = (
        "Wall time: of all starts that have ended. Loss: the last logged step, nats a token. Bits/byte: held out, at "
    )
    parts.append(paragraph(f"{legend}the last validation. Made: in the phase's folder.", "note"))
    for phase in report.phases:
        if phase["error"]:
            said = f"<h3>{escape(phase['name'])} failed</h3><pre>{escape(phase['error'])}</pre>"
            parts.append(said)
    seconds = {phase["name"]: phase["wall_seconds"] for phase in report.phases if phase["wall_seconds"]}
    return [*parts, picture(durations_plot(seconds), "wall time of the phases")] if seconds else parts


def _phase_cells(phase: Mapping[str, Any]) -> list[Any]:
    state = phase["state"]
    badge = Html(f'<span class="state {escape(state.replace(" ", "-"))}">{escape(state)}</span>')
    wall = None if phase["wall_seconds"] is None else duration(phase["wall_seconds"])
    steps = None if phase["steps"] is None else f"{phase['steps']:,}"
    if steps is not None and phase["of_steps"] not in (None, phase["steps"]):
        steps += f" of {phase['of_steps']:,}"
    counts = [None if phase[key] is None else f"{phase[key]:,.0f}" for key in ("tokens", "tokens_per_second")]
    numbers = [None if phase[key] is None else f"{phase[key]:.4f}" for key in ("loss", "bits_per_byte")]
    made = inside_phase(phase["product"] or "", phase["name"])
    return [phase["name"], phase["kind"], badge, phase["starts"], wall, steps, *counts, *numbers, made]


def _curves(report: RunReport) -> list[str]:
    parts = []
    for name, curves in report.curves.items():
        parts.append(f"<h3>{escape(name)}</h3>")
        parts.append(picture(curves_plot(curves["train"], curves["validation"]), f"loss curves of {name}"))
    return parts


def _tokens(report: RunReport) -> list[str]:
    if not report.tokens:
        return []
    corpora = list(dict.fromkeys(name for found in report.tokens.values() for name in found))
    rows: list[list[str | None]] = []
    for phase, found in report.tokens.items():
        total = f"{sum(one['tokens'] for one in found.values()):,}"
        rows.append([phase, *(_tokens_cell(found.get(name)) for name in corpora), total])
    legend = "Without padding, with how often the corpus was passed; a phase counts from its own beginning."
    plot = picture(tokens_plot(report.tokens), "share of the corpora in each phase")
    return [table(["phase", *corpora, "all"], rows), paragraph(legend, "note"), plot]


def _tokens_cell(found: Mapping[str, Any] | None) -> str | None:
    if found is None:
        return None
    epochs = "" if found["epochs"] is None else f" ({found['epochs']:.3g} x)"
    return f"{found['tokens']:,}{epochs}"


def _mixes(report: RunReport, plots: Mapping[str, bytes]) -> list[str]:
    parts = []
    for phase, found in report.mixes.items():
        record = MixReport(**found["report"])
        parts += [f"<h3>{escape(phase)}</h3>", weights_table(record), "<h3>Beside other mixtures</h3>"]
        parts.append(baselines_table(record))
        parts += [picture(plots[path], path) for path in found["plots"]]
        link = f'<a href="{escape(found["page"])}">{escape(found["page"])}</a>'
        parts.append(f"<p>How each number came about: {link}.</p>")
    return parts


def _merges(report: RunReport, plots: Mapping[str, bytes]) -> list[str]:
    parts = []
    for phase, record in report.merges.items():
        parts += [f"<h3>{escape(phase)}</h3>", *merge_tables(record)]
        parts += [picture(plots[path], path) for path in record["plots"]]
    return parts


def _needles(report: RunReport) -> list[str]:
    parts = []
    for phase, found in report.needles.items():
        parts.append(picture(needle_plot(found["last"], phase), f"needle test of {phase}"))
        if len(found["score_by_step"]) > 1:
            scores = (f"step {int(step):,}: {score:.2f}" for step, score in found["score_by_step"].items())
            parts.append(paragraph(f"Needles found (%) in {phase}: {', '.join(scores)}.", "note"))
    return parts

"""Evaluations of several models beside each other: one table, with which differences are more than chance.

    compare_evaluations(["outputs/merged/evaluation", "outputs/int4/evaluation"], "outputs/int4/comparison")

The first model is what the others are compared with, document by document (`paired_difference`). So all must have read
the same documents the same way: another limit, other data, shots or metric is refused and not averaged over. Beside
them stand the published scores, of which no documents are known, and which are therefore not tested.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mobilellm_pro.atomic_file import write_atomically
from mobilellm_pro.evaluation.comparison_plot import MIN_AXES, radar
from mobilellm_pro.evaluation.paired_difference import holm, mean_error, paired_difference
from mobilellm_pro.evaluation.published_scores import MODELS, QUANTIZED_MODELS, published
from mobilellm_pro.evaluation.scored_documents import Column, Evaluation, ScoredDocument, read_evaluation
from mobilellm_pro.static_page import Section, html_page, paragraph, picture, table

NAME, RADAR = "comparison", "radar.png"
_PUBLISHED_MODELS = (*MODELS, *QUANTIZED_MODELS)
INSTRUCT = "instruct"
"""The suite of instruction-tuned models: it has a radar chart, and published scores of its own."""

ALPHA = 0.05
_SAME = 1e-6  # a column's score is the mean of its documents' up to rounding, or it is another measure

Table = tuple[list[str], list[list[str | None]]]


def compare_evaluations(folders: Sequence[str | Path], output: str | Path) -> dict[str, Any]:
    """Compares evaluations of one suite with the first of them, prints the table, and writes a page.

    Writes comparison.md, comparison.json, comparison.html and, of the suite "instruct", radar.png. Differences are
    other - first. Those of columns carry an exact or a permutation p value, corrected by Holm's method over the columns
    of one pair of models. Those of averages have a standard error, in which the columns count as independent.

    Args:
        folders: of two or more evaluations; each is called by its folder's name, with parents where names repeat.
        output: folder to write to; made if missing.

    Returns:
        what comparison.json holds: suite, models, columns, averages, notes. Scores are fractions.

    Raises:
        ValueError: fewer than two folders, one of them twice or without results; another suite; columns, averages,
            metrics, shots or documents that differ (all such differences at once); a damaged file.
    """
    if len(folders) < 2:
        raise ValueError(f"{len(folders)} evaluation folder(s), expected two or more: name those to compare")
    evaluations = dict(zip(model_names(folders), map(read_evaluation, folders), strict=True))
    record = comparison(evaluations)
    target = Path(output)
    target.mkdir(parents=True, exist_ok=True)
    drawn = record["suite"] == INSTRUCT and len(record["columns"]) >= MIN_AXES
    image = radar(*_radar_values(record)) if drawn else None
    if image is not None:
        write_atomically(target / RADAR, image)
    markdown = comparison_markdown(record)
    write_atomically(target / f"{NAME}.json", json.dumps(record, indent=2) + "\n")
    write_atomically(target / f"{NAME}.md", markdown)
    write_atomically(target / f"{NAME}.html", comparison_page(record, image))
    print(markdown, end="")
    return record


def model_names(folders: Sequence[str | Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart; ValueError where a folder is given twice."""
    parts = [Path(folder).resolve().parts for folder in folders]
    for number, one in enumerate(parts):
        if one in parts[:number]:
            raise ValueError(f"{folders[number]}: given twice, expected different evaluation folders: name it once")
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(one[-count:]) for one in parts]
        if len(set(names)) == len(names):
            break
    return names


def comparison(evaluations: Mapping[str, Evaluation]) -> dict[str, Any]:
    """What `compare_evaluations` returns, of two or more evaluations by the names of their models."""
    (first, base), *others = evaluations.items()
    documents = _paired_documents(list(evaluations.values()))
    scores = {key: [np.array([one.score for one in column]) for column in found] for key, found in documents.items()}
    columns = {key: _column_record(key, evaluations, base.suite) for key in base.columns}
    for number, (name, _) in enumerate(others, start=1):
        found = {key: paired_difference(column[0], column[number]) for key, column in scores.items()}
        adjusted = holm([one.p_value for one in found.values()])
        for (key, one), p_holm in zip(found.items(), adjusted, strict=True):
            columns[key]["differences"][name] = {**vars(one), "p_holm": p_holm, "significant": p_holm <= ALPHA}
    models = {
        name: {"folder": str(one.folder), "checkpoint": one.checkpoint, "limit": one.limit}
        for name, one in evaluations.items()
    }
    averages = {name: _average_record(name, evaluations, columns) for name in base.averages}
    notes = list(_other_measures(evaluations, scores))
    return {"suite": base.suite, "first": first, "models": models, "columns": columns, "averages": averages,
            "notes": notes}  # fmt: skip


def _column_record(key: str, evaluations: Mapping[str, Evaluation], suite: str) -> dict[str, Any]:
    found = {name: one.columns[key] for name, one in evaluations.items()}
    column: Column = next(iter(found.values()))
    return {
        "name": column.name,
        "metric": column.metric,
        "shots": column.shots,
        "documents": column.documents,
        "scores": {name: {"score": one.score, "stderr": one.stderr} for name, one in found.items()},
        "published": {model: score / 100 for model, score in published(suite, key).items()},
        "differences": {},
    }


def _average_record(name: str, evaluations: Mapping[str, Evaluation], columns: Mapping[str, Any]) -> dict[str, Any]:
    """Of `columns` with their differences."""
    found = {model: one.averages[name] for model, one in evaluations.items()}
    first, *others = found
    keys = found[first].columns
    shown = [columns[key]["published"] for key in keys]
    scores = {
        model: {"score": one.score, "stderr": mean_error([columns[key]["scores"][model]["stderr"] for key in keys])}
        for model, one in found.items()
    }
    differences = {
        model: {
            "difference": found[model].score - found[first].score,
            "stderr": mean_error([columns[key]["differences"][model]["stderr"] for key in keys]),
        }
        for model in others
    }
    complete = [model for model in _PUBLISHED_MODELS if all(model in one for one in shown)]
    means = {model: sum(one[model] for one in shown) / len(keys) for model in complete}
    return {"columns": list(keys), "scores": scores, "published": means, "differences": differences}


def _other_measures(evaluations: Mapping[str, Evaluation], scores: Mapping[str, list[np.ndarray]]) -> Iterator[str]:
    """Columns whose score is no mean over documents, as a measure that sums over all of them first."""
    for key, found in scores.items():
        pairs = zip(evaluations.values(), found, strict=True)
        if any(abs(float(one.mean()) - evaluation.columns[key].score) > _SAME for evaluation, one in pairs):
            yield (
                f"{key}: the score is not the mean of its documents' scores; the difference and its tests are of "
                "those means."
            )


def _paired_documents(evaluations: Sequence[Evaluation]) -> dict[str, list[list[ScoredDocument]]]:
    """Column -> the documents of each evaluation, in one order; ValueError with all that keeps them from that."""
    first = evaluations[0]
    problems = [problem for other in evaluations[1:] for problem in _mismatches(first, other)]
    if problems:
        raise ValueError("\n".join(problems))
    documents = {key: [one.documents(key) for one in evaluations] for key in first.columns}
    problems = [
        f"{other.folder}: {key!r} has other documents than in {first.folder}: {what}"
        for key, found in documents.items()
        for other, theirs in zip(evaluations[1:], found[1:], strict=True)
        if (what := _other_documents(found[0], theirs, first.limit, other.limit))
    ]
    if problems:
        raise ValueError("\n".join(problems))
    return documents


def _mismatches(first: Evaluation, other: Evaluation) -> Iterator[str]:
    """What of two results.json is not comparable."""
    if first.suite != other.suite:
        yield f"{other.folder}: suite {other.suite!r}, expected {first.suite!r} as in {first.folder}: compare one suite"
        return
    if not first.columns:
        yield f"{first.folder}: no columns, expected at least one: evaluate again"
    for one, than in ((first, other), (other, first)):
        if missing := [key for key in than.columns if key not in one.columns]:
            yield f"{one.folder}: lacks {', '.join(missing)}, which {than.folder} has: finish that evaluation"
    for key in (key for key in first.columns if key in other.columns):
        for what in ("metric", "shots"):
            expected, found = getattr(first.columns[key], what), getattr(other.columns[key], what)
            if found != expected:
                yield (
                    f"{other.folder}: columns.{key}.{what} = {found!r}, expected {expected!r} as in {first.folder}: "
                    "evaluate both the same way"
                )
    if {name: one.columns for name, one in first.averages.items()} != {
        name: one.columns for name, one in other.averages.items()
    }:
        yield f"{other.folder}: other averages than {first.folder}, by name or by columns: evaluate both the same way"


def _other_documents(
    first: Sequence[ScoredDocument], other: Sequence[ScoredDocument], limit: float | None, other_limit: float | None
) -> str:
    """How two lists of documents differ and why, or nothing."""
    ours, theirs = ({one.key: one.doc_hash for one in found} for found in (first, other))
    lost, new = ours.keys() - theirs.keys(), theirs.keys() - ours.keys()
    changed = [key for key in ours if key in theirs and ours[key] != theirs[key]]
    if not (lost or new or changed):
        return ""
    task, doc_id = min([*lost, *new, *changed], key=str)
    said = (
        f"{len(lost)} missing, {len(new)} more, {len(changed)} with another doc_hash (as document {doc_id} of {task})"
    )
    if limit != other_limit and (lost or new):
        return f"{said}: limit = {other_limit} there and {limit} here: evaluate both with the same limit"
    return f"{said}: other data: evaluate both with the same version of the data"


def scores_table(record: Mapping[str, Any]) -> Table:
    """Header and rows: columns of the suite, then averages; percent."""
    others, models = list(record["models"])[1:], list(record["models"])
    columns = record["columns"].values()
    beside = [model for model in _PUBLISHED_MODELS if any(model in one["published"] for one in columns)]
    header = ["task", "metric", "shots", *models, *(f"{other} − {record['first']}" for other in others)]
    header += [f"{model} (published)" for model in beside]
    rows: list[list[str | None]] = []
    for key, one in [*record["columns"].items(), *record["averages"].items()]:
        shots = one.get("shots")
        row = [one.get("name", key), one.get("metric"), None if shots is None else str(shots)]
        row += [percent(one["scores"][model]["score"], one["scores"][model]["stderr"]) for model in models]
        row += [_difference(one["differences"][other]) for other in others]
        rows.append([*row, *(percent(one["published"].get(model)) for model in beside)])
    return header, rows


def _difference(found: Mapping[str, Any]) -> str:
    return f"{percent(found['difference'], found['stderr'], sign='+')}{' *' if found.get('significant') else ''}"


def percent(value: float | None, stderr: float | None = None, *, sign: str = "") -> str | None:
    """A fraction as percent with two decimals, and ± its standard error; None stays None."""
    if value is None:
        return None
    return f"{100 * value:{sign}.2f}" + ("" if stderr is None else f" ± {100 * stderr:.2f}")


def tests_table(record: Mapping[str, Any]) -> Table:
    """Header and rows: the test of each column and each pair of models."""
    rows: list[list[str | None]] = [
        [one["name"], model, str(one["documents"]), _difference(found), f"{found['p_value']:.3g}",
         f"{found['p_holm']:.3g}", found["test"]]
        for one in record["columns"].values() for model, found in one["differences"].items()
    ]  # fmt: skip
    return ["task", "model", "documents", "difference", "p", "p (Holm)", "test"], rows


def _legend(record: Mapping[str, Any]) -> list[str]:
    said = [
        "Percent ± the standard error. Differences are paired by document; "
        f"*: p <= {ALPHA:g} after Holm's correction over the {len(record['columns'])} columns of that pair of models. "
        "Averages are not tested; their standard errors count the columns as independent."
    ]
    if any(one["published"] for one in record["columns"].values()):
        tables = "Table 7" if record["suite"] == INSTRUCT else "Tables 4 and 5"
        said.append(f"Published: {tables} of the technical report, whose shots and metrics may differ.")
    return [*said, *record["notes"]]


def comparison_markdown(record: Mapping[str, Any]) -> str:
    """comparison.md."""
    models = [f"- {name}: {one['checkpoint']} ({one['folder']})" for name, one in record["models"].items()]
    parts = [f"# Comparison, suite {record['suite']}", "\n".join(models), markdown_table(*scores_table(record))]
    parts += [*_legend(record), f"## Tests against {record['first']}", markdown_table(*tests_table(record))]
    return "\n\n".join(parts) + "\n"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str | None]]) -> str:
    """A table in Markdown, without a last line end; None is a dash."""
    cells = [["–" if cell is None else cell.replace("|", "\\|") for cell in row] for row in [header, *rows]]
    lines = [f"| {' | '.join(row)} |" for row in cells]
    return "\n".join([lines[0], "|---" * len(header) + "|", *lines[1:]])


def comparison_page(record: Mapping[str, Any], image: bytes | None) -> str:
    """comparison.html, with the radar chart where there is one."""
    models = [[name, one["checkpoint"], one["folder"], one["limit"]] for name, one in record["models"].items()]
    (header, rows), tests = scores_table(record), tests_table(record)
    averages = range(len(record["columns"]), len(rows))
    legend = [paragraph(text, "note") for text in _legend(record)]
    sections = [
        Section(
            "models",
            "Models",
            [table(["model", "checkpoint", "folder", "limit"], models, text=["checkpoint", "folder"])],
        ),
        Section("scores", "Scores", [table(header, rows, text=["metric"], strong=averages), *legend]),
        *([] if image is None else [Section("radar", "Radar chart", [picture(image, "scores of the models")])]),
        Section("tests", f"Tests against {record['first']}", [table(*tests, text=["model", "test"])]),
    ]
    return html_page(f"Comparison, suite {record['suite']}", sections)


def _radar_values(record: Mapping[str, Any]) -> tuple[list[str], dict[str, list[float]]]:
    """Names of the columns, and the scores of each model in percent."""
    columns = record["columns"].values()
    scores = {model: [100 * one["scores"][model]["score"] for one in columns] for model in record["models"]}
    return [one["name"] for one in columns], scores

"""What phases have left of a mix, a merge, needle tests and evaluations, found by the files in a phase's folder."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mobilellm_pro.data_mix.report_page import NAME as MIX_REPORT
from mobilellm_pro.data_mix.report_record import MixReport
from mobilellm_pro.evaluation.needle_results import RESULT
from mobilellm_pro.pipeline.merge import PICTURE as MERGE_PICTURE
from mobilellm_pro.pipeline.merge import RESULT as MERGE

PERCENT_METRICS = ("acc_norm", "acc", "exact_match", "em", "f1")
"""Metrics between 0 and 1, as lm-eval calls them; of several that a task has, the first of this order is shown."""

_MERGE_KEYS = (
    *("branches", "domains", "method", "score", "candidates", "groups"),
    *("weights", "rows", "distances", "barriers", "warnings"),
)
_NEEDLE_KEYS = ("score", "correct", "total", "lengths", "depths", "found", "needles_per_place")
_MIX_PLOTS = ("weights", "influence")
_MIX_KEYS = ("title", "method", "weights", "baselines", "predicted_utility")


def read_json(path: Path) -> dict[str, Any] | None:
    """An object; None where there is no file.

    Raises:
        ValueError: the file holds something else.
    """
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: expected JSON ({error}); remove it, or run the phase again") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: expected an object, found {type(found).__name__}; run the phase again")
    return found


def mix_result(folder: Path, output: Path) -> dict[str, Any] | None:
    """Weights of a finished mix beside other mixtures.

    Args:
        folder: of the phase.
        output: of the pipeline; paths are relative to it.

    Returns:
        report: `MixReport` without its curves; page and plots: files.

    Raises:
        ValueError: the record is damaged.
    """
    path = folder / f"{MIX_REPORT}.json"
    if not path.is_file():
        return None
    report = asdict(MixReport.from_json(path.read_text(), str(path)))
    plots = [folder / f"{MIX_REPORT}_{name}.png" for name in _MIX_PLOTS]
    return {
        "page": os.path.relpath(path.with_suffix(".html"), output),
        "plots": [os.path.relpath(plot, output) for plot in plots if plot.is_file()],
        "report": {key: report[key] for key in _MIX_KEYS},
    }


def merge_result(folder: Path, output: Path) -> dict[str, Any] | None:
    """The record of a finished merge.

    Args:
        folder, output: see `mix_result`.

    Returns:
        what merge.json says of weights and scores; plots: files.

    Raises:
        ValueError: merge.json is not what `merge` writes.
    """
    path = folder / MERGE
    if not path.is_file():
        return None
    plot = folder / MERGE_PICTURE
    plots = [os.path.relpath(plot, output)] if plot.is_file() else []
    return {"plots": plots, **_with_keys(path, _MERGE_KEYS, "the result of a merge")}


def needle_scores(folder: Path) -> dict[str, Any] | None:
    """Needle tests of a training (needle/step-N.json) or of the verb `needle` in a phase's folder or one below it.

    Returns:
        score_by_step: step -> percent, of a training's tests; last: the newest test, without its cells.

    Raises:
        ValueError: a file is not the result of a needle test.
    """
    steps = {int(path.stem.removeprefix("step-")): path for path in (folder / "needle").glob("step-*.json")}
    tests = {step: _needle_test(steps[step]) for step in sorted(steps)}
    alone = [path for path in (folder / RESULT, *sorted(folder.glob(f"*/{RESULT}"))) if path.is_file()]
    if not tests and not alone:
        return None
    last = _needle_test(alone[0]) if alone else tests[max(tests)]
    return {"score_by_step": {str(step): test["score"] for step, test in tests.items()}, "last": last}


def _needle_test(path: Path) -> dict[str, Any]:
    return _with_keys(path, _NEEDLE_KEYS, "the result of a needle test")


def _with_keys(path: Path, keys: Sequence[str], what: str) -> dict[str, Any]:
    """These keys of a file and no other."""
    found = read_json(path) or {}
    missing = [key for key in keys if key not in found]
    if missing:
        raise ValueError(f"{path}: expected {what}, found no {', '.join(missing)}; run the phase again")
    return {key: found[key] for key in keys}


def evaluation_scores(folder: Path) -> dict[str, dict[str, Any]] | None:
    """Scores of results.json, as `evaluate` writes it or lm-eval itself.

    Returns:
        task -> {"metric", "value", "stderr"}: percent where the metric is one of `PERCENT_METRICS`, else as it is.

    Raises:
        ValueError: the file is none of lm-eval's.
    """
    path = folder / "results.json"
    found = read_json(path)
    if found is None:
        return None
    results = found.get("results")
    if not isinstance(results, dict) or not all(isinstance(scores, dict) for scores in results.values()):
        raise ValueError(f'{path}: expected lm-eval\'s {{"results": {{task: {{"acc,none": ...}}}}}}')
    if "columns" in found:  # the suite has chosen the metrics
        return {task: _column(column) for task, column in found["columns"].items()}
    chosen = {task: _score(scores) for task, scores in results.items()}
    return {task: score for task, score in chosen.items() if score is not None}


def _column(column: Mapping[str, Any]) -> dict[str, Any]:
    error = column["stderr"]
    metric = column["metric"].partition(",")[0]
    return {"metric": metric, "value": 100 * column["score"], "stderr": None if error is None else 100 * error}


def _score(scores: Mapping[str, Any]) -> dict[str, Any] | None:
    """The metric to show of a task; keys are "metric,filter", and groups of tasks may have none."""
    numbers = {key: value for key, value in scores.items() if "," in key and isinstance(value, int | float)}
    keys = [key for key in numbers if not key.partition(",")[0].endswith("_stderr")]
    if not keys:
        return None
    order = {name: place for place, name in enumerate(PERCENT_METRICS)}
    key = min(keys, key=lambda key: order.get(key.partition(",")[0], len(order)))
    metric, _, kind = key.partition(",")
    factor, error = 100 if metric in order else 1, numbers.get(f"{metric}_stderr,{kind}")
    return {"metric": metric, "value": factor * numbers[key], "stderr": None if error is None else factor * error}

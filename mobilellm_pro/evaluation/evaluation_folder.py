"""What an evaluation leaves in its folder, and how it goes on after a stop.

settings.json     what decides about the scores; another start must agree with it
responses/        answers of the model so far, of the task that is being evaluated
tasks/TASK.json   scores of a finished task, as lm-eval gives them
samples/TASK.jsonl  its documents, a line each: score, text, hashes, the model's answer
results.json      everything, once all tasks are finished: `results` as lm-eval writes it, columns, averages, settings
results.md        the table
DONE              written last
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mobilellm_pro.atomic_file import write_atomically
from mobilellm_pro.evaluation.suite import Column, Suite

SETTINGS, RESULTS, TABLE, SAMPLES, DONE = "settings.json", "results.json", "results.md", "samples", "DONE"


def task_file(folder: Path, task: str) -> Path:
    """Scores of a finished task."""
    return folder / "tasks" / f"{task}.json"


def write_task(folder: Path, column: Column, scores: Mapping[str, Any], samples: Mapping[str, Sequence[Any]]) -> None:
    """Writes the documents of a task, then its scores: a task with scores is finished.

    Args:
        folder: of the evaluation.
        column: its task may be a group of tasks.
        scores: `results`, `n-shot`, `n-samples` and `versions` of lm-eval.
        samples: task -> its documents as lm-eval logs them.

    Raises:
        ValueError: the task has no such metric.
    """
    for name in ("tasks", SAMPLES):
        (folder / name).mkdir(parents=True, exist_ok=True)
    key = metric_key(column, scores["results"][column.task])
    lines = [
        json.dumps(line, ensure_ascii=False) + "\n" for line in (
            _sample(task, document, key) for task, found in samples.items() for document in found
        ) if line is not None
    ]  # fmt: skip
    write_atomically(folder / SAMPLES / f"{column.task}.jsonl", "".join(lines))
    write_atomically(task_file(folder, column.task), json.dumps(scores, indent=2) + "\n")


def metric_key(column: Column, scores: Mapping[str, Any]) -> str:
    """lm-eval's "metric,filter" of a column.

    Raises:
        ValueError: there is none, or several filters and none is named.
    """
    numbers = [key for key in scores if "," in key and not key.partition(",")[0].endswith("_stderr")]
    found = [key for key in numbers if column.metric in (key, key.partition(",")[0])]
    if len(found) != 1:
        raise ValueError(
            f'task {column.task}: metric "{column.metric}" is {"none" if not found else "several"} of its '
            f"{', '.join(numbers)}; correct the suite's column"
        )
    return found[0]


def _sample(task: str, document: Mapping[str, Any], key: str) -> dict[str, Any] | None:
    """A document as it is kept; None: that of another filter."""
    metric, _, kind = key.partition(",")
    if document["filter"] != kind or metric not in document:
        return None
    return {
        "task": task,
        "doc_id": document["doc_id"],
        "doc_hash": document["doc_hash"],
        "score": _number(document[metric]),
        "text": "\n".join(_texts(document["doc"])),
        "target": document["target"] if isinstance(document["target"], str | int) else str(document["target"]),
        "answer": document["filtered_resps"],
    }


def _number(score: Any) -> float:
    """A document's score; some metrics give one a part, as of each instruction."""
    if isinstance(score, list | tuple):
        return sum(map(float, score)) / len(score)
    return float(score)


def _texts(value: Any) -> Iterator[str]:
    """All strings of a document."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _texts(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)


def write_results(folder: Path, suite: Suite, record: Mapping[str, Any]) -> dict[str, Any]:
    """Puts finished tasks together.

    Args:
        folder: with the scores of all columns.
        suite: whose columns they are.
        record: what else results.json shall say.
    """
    columns: dict[str, Any] = {}
    results: dict[str, Any] = {}
    for column in suite.columns:
        scores = json.loads(task_file(folder, column.task).read_text())
        results |= scores["results"]
        own = scores["results"][column.task]
        key = metric_key(column, own)
        metric, _, kind = key.partition(",")
        error = own.get(f"{metric}_stderr,{kind}")
        columns[column.task] = {
            "name": column.name,
            "metric": key,
            "score": own[key],
            "stderr": error if isinstance(error, int | float) and math.isfinite(error) else None,
            "documents": sum(count["effective"] for count in scores["n-samples"].values()),
            "shots": max(scores["n-shot"].values(), default=0),
        }
    averages = {
        average.name: {
            "score": sum(columns[task]["score"] for task in average.columns) / len(average.columns),
            "columns": average.columns,
        }
        for average in suite.averages
    }
    whole = {**record, "results": results, "columns": columns, "averages": averages}
    write_atomically(folder / RESULTS, json.dumps(whole, indent=2, ensure_ascii=False) + "\n")
    write_atomically(folder / TABLE, "\n".join(table(whole)) + "\n")
    write_atomically(folder / DONE, json.dumps({"results": RESULTS}) + "\n")
    return whole


def table(results: Mapping[str, Any]) -> Iterator[str]:
    """Markdown: a line a column, then the averages, in percent."""
    limit = "" if results["limit"] is None else f", the first {results['limit']} documents of each task"
    yield f"{results['checkpoint']}, suite {results['suite']}{limit}"
    yield ""
    yield "| task | metric | shots | documents | score | ± |"
    yield "|---|---|---:|---:|---:|---:|"
    for column in results["columns"].values():
        error = "" if column["stderr"] is None else f"{100 * column['stderr']:.2f}"
        yield (
            f"| {column['name']} | {column['metric']} | {column['shots']} | {column['documents']} "
            f"| {100 * column['score']:.2f} | {error} |"
        )
    for name, average in results["averages"].items():
        yield f"| mean of {len(average['columns'])}: {name} | | | | {100 * average['score']:.2f} | |"

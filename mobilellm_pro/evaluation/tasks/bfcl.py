"""Berkeley Function-Calling Leaderboard, version 2 (Patil et al.): which functions to call for a request, and how.

The documents of the categories that are scored by the syntax tree of the answer: one function on offer (simple),
several (multiple), one called several times (parallel), both (parallel_multiple), each written by the leaderboard's
authors and, since version 2, asked by users (live_...).
"""

import json
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mobilellm_pro.evaluation.tasks.function_calls import answers_match, parse_calls
from mobilellm_pro.evaluation.tasks.local_files import Source, json_lines, require_folder

KINDS = ("simple", "multiple", "parallel", "parallel_multiple")
SOURCE = Source(
    "bfcl_v2",
    "BFCL_v2_simple.json, ..._multiple.json, ..._parallel.json, ..._parallel_multiple.json and the four of live_..., "
    "with a line {'id', 'question', 'function'} a document, and files of the same names in possible_answer/ with "
    "{'id', 'ground_truth'}",
    "https://huggingface.co/datasets/gorilla-llm/Berkeley-Function-Calling-Leaderboard",
)


def read_bfcl(folder: Path) -> list[dict[str, str]]:
    """Rows of id, category, question, functions and answers (both JSON), one category after the other.

    The four files of live_... belong to version 2; without all four of them, and with a warning, there are only those
    of version 1.

    Raises:
        ValueError: a file is missing or malformed, or there are those of several versions.
    """
    require_folder(folder, SOURCE)
    categories = list(KINDS)
    live = [f"live_{kind}" for kind in KINDS]
    if any(_files(folder, category) for category in live):
        categories += live
    else:
        logging.getLogger(__name__).warning("%s: no files of live_...: only the documents of BFCL v1", folder)
    return [row for category in categories for row in _read_category(folder, category)]


def prompt(doc: Mapping[str, str]) -> str:
    """The functions on offer, the form of the answer, and the request."""
    return (
        f"These functions can be called, here as JSON:\n{doc['functions']}\n\n"
        "Answer the request below with the calls that it needs, as one Python list without any other text:\n"
        '[first_function(some_number=1, some_text="a"), second_function()]\n\n'
        f"Request: {doc['question']}\n"
    )


def score_calls(doc: Mapping[str, str], results: Sequence[str]) -> dict[str, Any]:
    """ast_match, 1 if the answer's calls are among the possible ones; ast_summary, the same with the category."""
    calls = parse_calls(results[0])
    right = calls is not None and answers_match(calls, json.loads(doc["answers"]), json.loads(doc["functions"]))
    return {"ast_match": float(right), "ast_summary": (doc["category"], float(right))}


def ast_summary(items: Iterable[tuple[str, float]]) -> float:
    """Mean over the kinds of the mean over a kind's categories (live and not) of the mean over its documents."""
    scores: dict[str, dict[str, list[float]]] = {}
    for category, score in items:
        scores.setdefault(category.removeprefix("live_"), {}).setdefault(category, []).append(score)
    return _mean([_mean([_mean(category) for category in kind.values()]) for kind in scores.values()])


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _files(folder: Path, category: str) -> list[Path]:
    name = re.compile(rf"BFCL_v\d+_{category}(_python)?\.json")  # since version 4 some names end in _python
    return [path for path in sorted(folder.iterdir()) if name.fullmatch(path.name)]


def _read_category(folder: Path, category: str) -> list[dict[str, str]]:
    files = _files(folder, category)
    if len(files) != 1:
        found = ", ".join(path.name for path in files) or "none"
        raise SOURCE.mistake(folder, f"one file BFCL_v2_{category}.json (or v3, v4) is needed, found {found}")
    answers = {}
    for place, record in json_lines(folder / "possible_answer" / files[0].name, SOURCE):
        _require(record, {"id": str, "ground_truth": list}, place)
        answers[record["id"]] = record["ground_truth"]
    rows = []
    for place, record in json_lines(files[0], SOURCE):
        _require(record, {"id": str, "question": list, "function": list}, place)
        if record["id"] not in answers:
            raise SOURCE.mistake(place, f"no possible answer for id {record['id']!r}")
        rows.append(_row(category, record, answers[record["id"]], place))
    if not rows:
        raise SOURCE.mistake(files[0], "no documents")
    return rows


def _row(category: str, record: Mapping[str, Any], answers: list[Any], place: str) -> dict[str, str]:
    for answer in answers:
        if not isinstance(answer, dict) or len(answer) != 1:
            raise SOURCE.mistake(place, f"possible answer {answer!r} is not {{function: {{parameter: [values]}}}}")
    offered = {function.get("name") for function in record["function"]}
    unknown = sorted(name for answer in answers for name in answer if name not in offered)
    if unknown:
        raise SOURCE.mistake(place, f"possible answers call {unknown}, which are not on offer")
    return {
        "id": record["id"],
        "category": category,
        "question": _text(record["question"], place),
        "functions": json.dumps(record["function"], ensure_ascii=False),
        "answers": json.dumps(answers, ensure_ascii=False),
    }


def _text(question: list[Any], place: str) -> str:
    """The messages of the only turn, one after the other; since version 3 they are in a list of turns."""
    messages = question[0] if len(question) == 1 and isinstance(question[0], list) else question
    if not messages or not all(isinstance(message, dict) and "content" in message for message in messages):
        raise SOURCE.mistake(place, "question is not the messages {'role', 'content'} of one turn")
    return "\n\n".join(message["content"] for message in messages)


def _require(record: Mapping[str, Any], columns: Mapping[str, type], place: str) -> None:
    for column, kind in columns.items():
        if not isinstance(record.get(column), kind):
            raise SOURCE.mistake(place, f"{column!r} is {record.get(column)!r}, not a {kind.__name__}")

"""An evaluation folder as it is read again: scores of the suite's columns, and those of every document behind them.

    results.json            suite, checkpoint, limit; per column name, metric, score, stderr, documents, shots; averages
    samples/<column>.jsonl  one line a document: task, doc_id, doc_hash, score, text

    evaluation = read_evaluation("outputs/evaluation/base")
    documents = evaluation.documents("hellaswag")

All scores are fractions. What a reader relies on is checked here, so that a half-written or edited folder is named
instead of being averaged.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from mobilellm_pro.evaluation.evaluation_folder import RESULTS, SAMPLES

_CURE = "evaluate again"
_NUMBER = (int, float)
_COLUMN = {"name": str, "metric": str, "score": _NUMBER, "documents": int}
_DOCUMENT = {"task": str, "doc_id": (int, str), "doc_hash": str, "score": _NUMBER}
_AVERAGE = {"score": _NUMBER, "columns": list}


class ScoredDocument(NamedTuple):
    """One document of a column.

    Attributes:
        task, doc_id: which one; together unique in a column.
        doc_hash: of its content, so that another version of the data is noticed.
        score: 0 to 1.
        text: its own text; "" where the evaluation kept none.
    """

    task: str
    doc_id: int | str
    doc_hash: str
    score: float
    text: str

    @property
    def key(self) -> tuple[str, int | str]:
        """What names it in any evaluation of the column."""
        return self.task, self.doc_id


@dataclass(frozen=True)
class Column:
    """One column of a suite: a task, or a group of tasks.

    Attributes:
        name: for people.
        metric: as lm-eval calls it, as "acc_norm,none".
        score, stderr: fractions; no standard error is None.
        documents: number of them.
        shots: examples before the question; None: not said.
    """

    name: str
    metric: str
    score: float
    stderr: float | None
    documents: int
    shots: int | None


@dataclass(frozen=True)
class Average:
    """A mean over columns: its score, a fraction, and their keys."""

    score: float
    columns: tuple[str, ...]


@dataclass(frozen=True)
class Evaluation:
    """What results.json says.

    Attributes:
        folder: where it lies.
        suite, checkpoint: what was evaluated.
        limit: documents of each task at most; None: all.
        columns: key -> column, in the order of the suite.
        averages: name -> average.
    """

    folder: Path
    suite: str
    checkpoint: str
    limit: float | None
    columns: dict[str, Column]
    averages: dict[str, Average]

    def documents(self, column: str, *, text: bool = False) -> list[ScoredDocument]:
        """The documents of a column, at least one, in an order that does not depend on the order of the lines.

        Args:
            column: one of `columns`.
            text: whether each must have its text.

        Raises:
            ValueError: no file, a damaged line, a score outside 0 to 1, a document twice or without text, none at all,
                or another number of documents than results.json says.
        """
        path = self.folder / SAMPLES / f"{column}.jsonl"
        if not path.is_file():
            raise ValueError(f"{path} does not exist: the scores of the documents of {column!r} are needed: {_CURE}")
        found: dict[tuple[str, int | str], ScoredDocument] = {}
        with path.open(encoding="utf-8", newline="\n") as lines:  # text may hold other line ends
            for number, line in enumerate(lines, start=1):
                document = _document(line, f"{path}, line {number}", text)
                if document.key in found:
                    raise ValueError(
                        f"{path}, line {number}: document {document.doc_id} of {document.task} stands there twice, "
                        f"expected one line a document: remove the folder and {_CURE}"
                    )
                found[document.key] = document
        if not found:
            raise ValueError(f"{path}: no documents, expected at least one: raise the limit and {_CURE}")
        if len(found) != self.columns[column].documents:
            raise ValueError(
                f"{path}: {len(found)} documents, {RESULTS} says {self.columns[column].documents}: "
                f"the file is incomplete or of another run: {_CURE}"
            )
        return [found[key] for key in sorted(found, key=lambda key: (key[0], isinstance(key[1], str), key[1]))]


def read_evaluation(folder: str | Path) -> Evaluation:
    """Reads results.json of an evaluation folder.

    Raises:
        ValueError: there is none, or it lacks something.
    """
    path = Path(folder) / RESULTS
    if not path.is_file():
        raise ValueError(f"{path} does not exist: expected the folder of a finished evaluation: {_CURE}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}): {_CURE}") from None
    _check(content, {"suite": str, "checkpoint": str, "columns": dict}, str(path))
    columns = {key: _column(column, f"{path}: columns.{key}") for key, column in content["columns"].items()}
    averages = {name: _average(one, f"{path}: averages.{name}") for name, one in content.get("averages", {}).items()}
    for name, average in averages.items():
        if unknown := [key for key in average.columns if key not in columns]:
            raise ValueError(f"{path}: averages.{name}.columns: {unknown[0]!r} is no column (those: {[*columns]})")
    said = (content["suite"], content["checkpoint"], content.get("limit"))
    return Evaluation(Path(folder), *said, columns, averages)


def _column(content: Any, place: str) -> Column:
    _check(content, _COLUMN, place)
    stderr, shots = content.get("stderr"), content.get("shots")
    kept = (content["name"], content["metric"], float(content["score"]))
    return Column(*kept, None if stderr is None else float(stderr), content["documents"], shots)


def _average(content: Any, place: str) -> Average:
    _check(content, _AVERAGE, place)
    if not content["columns"]:
        raise ValueError(f"{place}.columns: expected at least one column: {_CURE}")
    return Average(float(content["score"]), tuple(content["columns"]))


def _document(line: str, place: str, text: bool) -> ScoredDocument:
    try:
        content = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{place}: not JSON ({error}): the line is damaged: {_CURE}") from None
    _check(content, _DOCUMENT | ({"text": str} if text else {}), place)
    score = float(content["score"])
    if not 0 <= score <= 1:
        raise ValueError(f"{place}: score = {score}, expected a fraction from 0 to 1: {_CURE}")
    return ScoredDocument(content["task"], content["doc_id"], content["doc_hash"], score, content.get("text") or "")


def _check(content: Any, expected: Mapping[str, Any], place: str) -> None:
    """Raises ValueError unless this is a JSON object with values of these types; numbers must be finite."""
    if not isinstance(content, dict):
        raise ValueError(f"{place}: {type(content).__name__}, expected a JSON object: {_CURE}")
    for key, kind in expected.items():
        value = content.get(key)
        if not isinstance(value, kind) or isinstance(value, float) and not math.isfinite(value):
            kinds = kind if isinstance(kind, tuple) else (kind,)
            names = " or ".join(one.__name__ for one in kinds)
            raise ValueError(f"{place}: {key} = {value!r}, expected {names}: {_CURE}")

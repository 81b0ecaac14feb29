"""Tasks whose documents come from files that a user supplies, read and checked here rather than by `datasets`.

`datasets` guesses one type for a column from all its rows; the arguments of function calls have no one type. And its
errors do not say which file of which task was expected where.
"""

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import pyarrow.parquet
from lm_eval.api.task import ConfigurableTask


class Source(NamedTuple):
    """Which files a task reads and where they come from, for the messages about missing or malformed ones."""

    task: str
    expected: str
    origin: str

    def mistake(self, place: Path | str, problem: str) -> ValueError:
        """The error to raise about a file, a folder or a line of it."""
        return ValueError(
            f"task {self.task}: {place}: {problem}; expected {self.expected}, from {self.origin}; put the files"
            " into the folder of evaluation data, under the name of the task's dataset_path"
        )


class LocalFilesTask(ConfigurableTask):
    """A task of a YAML file whose `custom_dataset` is a function of a folder, and gives the rows of its split "test".

    The folder is `dataset_path`, within the folder of evaluation data that `datasets.load_dataset.folder` names, if
    there is such an attribute: whoever makes that function read local folders sets it. An absolute path stays.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        """Reads the files.

        Raises:
            ValueError: a file is missing or malformed.
        """
        super().__init__(config={key: value for key, value in config.items() if key != "class"})

    def download(self, dataset_kwargs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Called by lm-eval; nothing is downloaded."""
        folder = Path(getattr(datasets.load_dataset, "folder", "")) / self.config.dataset_path
        rows = self.config.custom_dataset(folder)
        self.dataset = datasets.DatasetDict({"test": datasets.Dataset.from_list(rows)})


def require_folder(folder: Path, source: Source) -> None:
    """Raises ValueError if the folder is not there."""
    if not folder.is_dir():
        raise source.mistake(folder, "no such folder")


def read_rows(path: Path, columns: Mapping[str, Sequence[str]], source: Source) -> list[dict[str, str]]:
    """The rows of a table of texts: JSON lines, CSV with a header, or parquet, by the end of the file's name.

    Args:
        path: the file.
        columns: for each column of the result the names that it may have in the file; other columns are left out.
        source: for messages.

    Raises:
        ValueError: no rows; a column is missing; a value is no text or empty.
    """
    rows = []
    for place, row in _records(path, source):
        found = {}
        for column, names in columns.items():
            name = next((name for name in names if name in row), None)
            if name is None:
                raise source.mistake(place, f"no column {' or '.join(map(repr, names))} among {sorted(row)}")
            if not isinstance(row[name], str) or not row[name].strip():
                raise source.mistake(place, f"column {name!r} is {row[name]!r}, not a text")
            found[column] = row[name]
        rows.append(found)
    if not rows:
        raise source.mistake(path, "no rows")
    return rows


def json_lines(path: Path, source: Source) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a file with one JSON object a line, each with its place ("FILE:LINE"); empty lines are skipped.

    Raises:
        ValueError: there is no such file, or a line is not one.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (FileNotFoundError, UnicodeDecodeError) as error:
        raise source.mistake(path, "no such file" if isinstance(error, FileNotFoundError) else str(error)) from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise source.mistake(f"{path}:{number}", f"not one JSON object on a line ({error})") from error
        if not isinstance(record, dict):
            raise source.mistake(f"{path}:{number}", f"a JSON {type(record).__name__}, not an object")
        yield f"{path}:{number}", record


def _records(path: Path, source: Source) -> Iterator[tuple[str, dict[str, Any]]]:
    if path.suffix == ".csv":
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            for row in reader:
                yield f"{path}:{reader.line_num}", row
    elif path.suffix == ".parquet":
        for number, row in enumerate(pyarrow.parquet.read_table(path).to_pylist(), start=1):
            yield f"{path}: row {number}", row
    else:
        yield from json_lines(path, source)

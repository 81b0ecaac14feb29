"""`datasets.toml`: which text becomes which corpus, read strictly.

    tokenizer = "llama4"                  # or a path of a tiktoken-format file
    output = "outputs/tokens"             # each corpus becomes output/<name>

    [[dataset]]
    name = "wiki"
    source = "data/wiki/*.jsonl.gz"       # a path, a pattern, or a list; relative to the working directory
    holdout = 0.01                        # share of documents for validation

All problems of a file are reported at once, each with its key and the nearest valid name.
"""

import difflib
import glob
import re
import tomllib
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from mobilellm_pro.data.documents import FORMATS


@dataclass(frozen=True)
class DatasetConfig:
    """One `[[dataset]]` table.

    Attributes:
        name: of the corpus and its folder.
        source: paths or patterns of files (folders for the format "folder").
        format: "jsonl" or "folder".
        text_column, id_column: keys of a JSON object; id_column "" takes a hash of the text.
        holdout: share of documents that go to the split "valid", chosen by a hash of their id.
        shard_tokens: largest number of tokens in a shard (and so in a document).
        min_chars: shorter documents are left out and counted.
        bos, eos: add the token at the begin and end of every document.
    """

    name: str
    source: tuple[str, ...]
    format: str = "jsonl"
    text_column: str = "text"
    id_column: str = "id"
    holdout: float = 0.01
    shard_tokens: int = 500_000_000
    min_chars: int = 1
    bos: bool = True
    eos: bool = True

    def settings(self) -> dict[str, Any]:
        """The keys that decide about the tokens, as JSON values, for the manifest."""
        return {**asdict(self), "source": list(self.source)}

    def files(self) -> list[Path]:
        """Existing files (or folders) of `source`, patterns expanded in the order of the names."""
        found: list[Path] = []
        for pattern in self.source:
            found += [Path(path) for path in sorted(glob.glob(pattern, recursive=True))]
        return found


@dataclass(frozen=True)
class DatasetsConfig:
    """A whole `datasets.toml`: tokenizer source, output folder and the datasets."""

    tokenizer: str
    output: Path
    datasets: list[DatasetConfig]


def load_datasets_config(path: str | Path) -> DatasetsConfig:
    """Reads and checks a `datasets.toml`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: every problem of the file, one a line.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: give the path of a datasets.toml")
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid TOML: {error}") from None
    problems = _unknown(content, ["tokenizer", "output", "dataset"], "")
    for key in ("tokenizer", "output"):
        if not (isinstance(content.get(key), str) and content[key]):
            problems.append(f"{key}: expected a string, found {content.get(key)!r}")
    tables = content.get("dataset")
    if not (isinstance(tables, list) and tables and all(isinstance(table, dict) for table in tables)):
        tables = []
        problems.append("dataset: expected at least one [[dataset]] table")
    datasets = [_dataset(table, f"dataset[{number}]", problems) for number, table in enumerate(tables)]
    names = [table.get("name") for table in tables]
    problems += [f"dataset: the name {name!r} occurs twice" for name in {n for n in names if names.count(n) > 1}]
    if problems:
        raise ValueError("\n".join(f"{path}: {problem}" for problem in problems))
    return DatasetsConfig(content["tokenizer"], Path(content["output"]), [item for item in datasets if item])


def _dataset(table: dict[str, Any], where: str, problems: list[str]) -> DatasetConfig | None:
    """The table as a config, or None after adding to `problems`."""
    types: dict[str, Any] = {item.name: item.type for item in fields(DatasetConfig)}
    found = _unknown(table, list(types), f"{where}.")
    values = {**table}
    if isinstance(values.get("source"), str):
        values["source"] = [values["source"]]
    for key, value in values.items():
        if key not in types:
            continue
        if key == "source":
            if not (isinstance(value, list) and value and all(isinstance(item, str) for item in value)):
                found.append(f"{where}.source: expected a path or a list of paths, found {value!r}")
        elif not _fits(value, types[key]):
            found.append(f"{where}.{key}: expected {types[key].__name__}, found {value!r}")
    found += [f"{where}.{key}: missing" for key in ("name", "source") if key not in values]
    found = found or _ranges(values, where)
    problems += found
    return None if found else DatasetConfig(**{**values, "source": tuple(values["source"])})


def _fits(value: Any, kind: type) -> bool:
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def _ranges(values: dict[str, Any], where: str) -> list[str]:
    """Problems of values that have the right type."""
    checks = {
        "name": (lambda v: bool(re.fullmatch(r"[\w.-]+", v)), "letters, digits, '.', '-' and '_'"),
        "format": (lambda v: v in FORMATS, f"one of {', '.join(FORMATS)}"),
        "holdout": (lambda v: 0 <= v < 1, "a share of at least 0 and below 1"),
        "shard_tokens": (lambda v: v >= 1, "at least 1"),
        "min_chars": (lambda v: v >= 0, "at least 0"),
    }
    return [
        f"{where}.{key}: expected {expected}, found {values[key]!r}"
        for key, (check, expected) in checks.items()
        if key in values and not check(values[key])
    ]


def _unknown(table: dict[str, Any], known: list[str], prefix: str) -> list[str]:
    problems = []
    for key in table:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
            problems.append(f"{prefix}{key}: unknown key; {hint}")
    return problems

"""`datasets.toml`: which text becomes which corpus, read strictly.

    tokenizer = "llama4"                  # or a path of a tiktoken-format file
    output = "outputs/tokens"             # each corpus becomes output/<name>

    [[dataset]]
    name = "wiki"
    format = "jsonl"                      # or parquet, folder, hub, megatron
    source = "data/wiki/*.jsonl.zst"      # a path, a pattern, or a list; relative to the working directory
    holdout = 0.01                        # share of documents for validation
    dev = 0.01                            # and for choices, on which no report rests
    clusters = 6                          # groups of documents, for `prepare --cluster`

    [cluster]                             # how they are made, see `cluster_config`
    features = "tfidf"

All problems of a file are reported at once, each with its key and the nearest valid name. A key that the format does
not read is a problem too: it would promise a filter that nobody applies.
"""

import difflib
import glob
import re
import tomllib
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from mobilellm_pro.data.cluster_config import MAX_CLUSTERS, ClusterConfig
from mobilellm_pro.data.source import Document, Source
from mobilellm_pro.repeated_names import repeated

FORMATS = ("jsonl", "parquet", "folder", "hub", "megatron")
# Keys that only some formats read; every other key belongs to all of them.
_RECORDS, _TEXT = ("jsonl", "parquet", "hub"), ("jsonl", "parquet", "folder", "hub")
_READ_BY = {
    **dict.fromkeys(("text_column", "id_column", "language_column", "languages"), _RECORDS),
    **dict.fromkeys(("min_chars", "bos", "eos"), _TEXT),
    **dict.fromkeys(("subset", "hub_split", "hub_files"), ("hub",)),
}


@dataclass(frozen=True)
class DatasetConfig:
    """One `[[dataset]]` table.

    Attributes:
        name: of the corpus and its folder.
        source: paths or patterns of files ("folder": of folders, "megatron": of .idx files); for "hub" the names of
            datasets.
        format: "jsonl" (a suffix .gz or .zst says how it is packed), "parquet", "folder" (each file is a document),
            "hub" (a Hugging Face dataset, streamed) or "megatron" (token shards that others prepared).
        text_column, id_column: names of the columns, or keys of a JSON object. The id names a document in messages;
            "" takes a hash of the text.
        language_column, languages: keep only documents whose column holds one of the languages; [] keeps all.
        subset, hub_split: configuration and split of a Hugging Face dataset.
        hub_files: patterns of .jsonl[.gz|.zst] or .parquet files inside the dataset's repository, read instead of what
            `subset` and `hub_split` name: for datasets that were published with a loading script.
        holdout: share of documents that go to the split "valid", chosen by a hash of their text.
        dev: share that goes to a third split "dev", by the same hash; "valid" is the same with and without it.
        clusters: groups that `prepare --cluster` sorts the documents into; 0 leaves the corpus out.
        shard_tokens: a shard ends with the document that reaches so many tokens.
        min_chars: shorter documents are left out and counted.
        bos, eos: add the token at the begin and end of every document.
    """

    name: str
    source: tuple[str, ...]
    format: str = "jsonl"
    text_column: str = "text"
    id_column: str = "id"
    language_column: str = ""
    languages: tuple[str, ...] = ()
    subset: str = ""
    hub_split: str = "train"
    hub_files: tuple[str, ...] = ()
    holdout: float = 0.01
    dev: float = 0.0
    clusters: int = 0
    shard_tokens: int = 500_000_000
    min_chars: int = 1
    bos: bool = True
    eos: bool = True

    def settings(self) -> dict[str, Any]:
        """The keys that decide about the tokens, as JSON values, for the manifest; `dev` only where it is not 0."""
        values = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}
        left_out = {"clusters"} if self.dev else {"clusters", "dev"}
        return {key: value for key, value in values.items() if key not in left_out}

    def files(self) -> list[Path]:
        """Existing files (or folders) of `source`, patterns expanded in the order of the names; [] for "hub"."""
        return [] if self.format == "hub" else _expand(self.source)

    def unmatched(self) -> list[str]:
        """Paths and patterns of `source` that nothing matches; [] for "hub", where only the network could tell."""
        return [] if self.format == "hub" else [pattern for pattern in self.source if not _expand([pattern])]

    def sources(self) -> list[Source]:
        """What there is to read, in order; a pattern that matches nothing gives nothing (see `unmatched`).

        Raises:
            ValueError: a Hugging Face dataset cannot be opened.
        """
        if self.format == "hub":
            from mobilellm_pro.data.hub_records import hub_sources  # needs a large package, and a network

            return hub_sources(self)
        return [Source(str(path), path, _size(path)) for path in self.files()]

    def rejects(self, document: Document) -> str:
        """Why the document stays out of the corpus: "short", "language", or "" when it belongs in."""
        if len(document.text) < self.min_chars or not document.text or document.text.isspace():
            return "short"
        return "language" if self.languages and document.language not in self.languages else ""


def folder_files(root: Path) -> list[Path]:
    """Every file below `root` in the order of the names, hidden ones and those in hidden folders left out."""
    return [
        file
        for file in sorted(root.rglob("*"))
        if file.is_file() and not any(part.startswith(".") for part in file.relative_to(root).parts)
    ]


def _expand(patterns: tuple[str, ...] | list[str]) -> list[Path]:
    found = [Path(path) for pattern in patterns for path in sorted(glob.glob(pattern, recursive=True))]
    return list(dict.fromkeys(found))  # a file that two patterns name is read once


def _size(path: Path) -> int:
    return sum(file.stat().st_size for file in (folder_files(path) if path.is_dir() else [path]))


@dataclass(frozen=True)
class DatasetsConfig:
    """A whole `datasets.toml`: tokenizer source, output folder, the datasets, and how documents are clustered."""

    tokenizer: str
    output: Path
    datasets: list[DatasetConfig]
    cluster: ClusterConfig = field(default_factory=ClusterConfig)


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
    problems = _unknown(content, ["tokenizer", "output", "dataset", "cluster"], "")
    for key in ("tokenizer", "output"):
        if not (isinstance(content.get(key), str) and content[key]):
            problems.append(f"{key}: expected a string, found {content.get(key)!r}")
    tables = content.get("dataset")
    if not (isinstance(tables, list) and tables and all(isinstance(table, dict) for table in tables)):
        tables = []
        problems.append("dataset: expected at least one [[dataset]] table")
    datasets = [_dataset(table, f"dataset[{number}]", problems) for number, table in enumerate(tables)]
    names = [table["name"] for table in tables if isinstance(table.get("name"), str)]
    problems += [f"dataset: the name {name!r} occurs twice" for name in repeated(names)]
    cluster = _cluster(content.get("cluster", {}), problems)
    problems += [
        f"dataset[{number}].clusters: more than cluster.{key} = {getattr(cluster, key)}: raise that or lower this"
        for number, dataset in enumerate(datasets)
        for key in ("batch_documents", "fit_documents")
        if dataset and dataset.clusters > getattr(cluster, key)
    ]
    if problems:
        raise ValueError("\n".join(f"{path}: {problem}" for problem in problems))
    return DatasetsConfig(content["tokenizer"], Path(content["output"]), [item for item in datasets if item], cluster)


def _cluster(table: Any, problems: list[str]) -> ClusterConfig:
    """The table as settings; the defaults after adding to `problems`."""
    if not isinstance(table, dict):
        problems.append(f"cluster: expected a table, found {table!r}")
        return ClusterConfig()
    types: dict[str, Any] = {item.name: item.type for item in fields(ClusterConfig)}
    found = _unknown(table, list(types), "cluster.")
    found += [
        f"cluster.{key}: expected {types[key].__name__}, found {value!r}"
        for key, value in table.items()
        if key in types and not _fits(value, types[key])
    ]
    found = found or [f"cluster.{problem}" for problem in ClusterConfig(**table).problems()]
    problems += found
    return ClusterConfig() if found else ClusterConfig(**table)


def _dataset(table: dict[str, Any], where: str, problems: list[str]) -> DatasetConfig | None:
    """The table as a config, or None after adding to `problems`."""
    types: dict[str, Any] = {item.name: item.type for item in fields(DatasetConfig)}
    lists = [key for key, kind in types.items() if kind == tuple[str, ...]]
    found = _unknown(table, list(types), f"{where}.")
    values = {**table}
    for key in ("source", "hub_files"):
        if isinstance(values.get(key), str):
            values[key] = [values[key]]
    for key in (key for key in values if key in types):
        value = values[key]
        if key in lists:
            filled = value or key == "languages"
            if not (isinstance(value, list) and filled and all(isinstance(item, str) and item for item in value)):
                kind = "a path or a list of paths" if key == "source" else "a list of strings"
                found.append(f"{where}.{key}: expected {kind}, found {value!r}")
        elif not _fits(value, types[key]):
            found.append(f"{where}.{key}: expected {types[key].__name__}, found {value!r}")
    found += [f"{where}.{key}: missing" for key in ("name", "source") if key not in values]
    found = found or _ranges(values, where) or _conflicts(values, where)
    problems += found
    return None if found else DatasetConfig(**{**values, **{key: tuple(values[key]) for key in lists if key in values}})


def _fits(value: Any, kind: type) -> bool:
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def _ranges(values: dict[str, Any], where: str) -> list[str]:
    """Problems of values that have the right type."""
    checks = {
        "name": (lambda v: bool(re.fullmatch(r"[\w.-]+", v)), "letters, digits, '.', '-' and '_'"),
        "format": (lambda v: v in FORMATS, f"one of {', '.join(FORMATS)}"),
        "text_column": (bool, "the name of a column"),
        "hub_split": (bool, "the name of a split"),
        "holdout": (lambda v: 0 <= v < 1, "a share of at least 0 and below 1"),
        "dev": (lambda v: 0 <= v < 1, "a share of at least 0 and below 1"),
        "clusters": (lambda v: 0 <= v <= MAX_CLUSTERS and v != 1, f"0, or 2 to {MAX_CLUSTERS}"),
        "shard_tokens": (lambda v: v >= 1, "at least 1"),
        "min_chars": (lambda v: v >= 0, "at least 0"),
    }
    return [
        f"{where}.{key}: expected {expected}, found {values[key]!r}"
        for key, (check, expected) in checks.items()
        if key in values and not check(values[key])
    ]


def _conflicts(values: dict[str, Any], where: str) -> list[str]:
    """Keys that the format does not read, and keys that make sense only together or only apart."""
    format = values.get("format", DatasetConfig.format)
    problems = [
        f"{where}.{key}: the format {format!r} does not read this key ({', '.join(_READ_BY[key])} do): remove it"
        for key in values
        if format not in _READ_BY.get(key, FORMATS)
    ]
    held_out = values.get("holdout", DatasetConfig.holdout) + values.get("dev", DatasetConfig.dev)
    if held_out >= 1:
        problems.append(f"{where}.dev: with holdout it takes {held_out:g} of the documents, expected below 1 together")
    if values.get("languages") and not values.get("language_column"):
        problems.append(f"{where}.languages: needs language_column, the column that names a document's language")
    if "hub_files" in values:
        problems += [f"{where}.{key}: not read beside hub_files: remove one of them" for key in ("subset", "hub_split")
                     if key in values]  # fmt: skip
    return problems


def _unknown(table: dict[str, Any], known: list[str], prefix: str) -> list[str]:
    problems = []
    for key in table:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
            problems.append(f"{prefix}{key}: unknown key; {hint}")
    return problems

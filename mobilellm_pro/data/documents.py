"""Readers: files of text -> an iterator of `Document(id, text)`.

Two formats: "jsonl" (one object a line, plain or gzip by the file's suffix) and "folder" (each file is a document). An
error names file and record, because in a corpus of millions nothing else finds the culprit. Empty documents are passed
on; whoever counts them (`prepare`) leaves them out.

    for document in read_documents("jsonl", ["corpus.jsonl.gz"], text_column="text", id_column="id"): ...
"""

import gzip
import hashlib
import json
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

FORMATS = ("jsonl", "folder")


class Document(NamedTuple):
    """One document: an id that decides on which side of the held-out split it falls, and its text."""

    id: str
    text: str


def read_documents(
    format: str, sources: Iterable[str | Path], *, text_column: str = "text", id_column: str = ""
) -> Iterator[Document]:
    """All documents of the sources, in order.

    Args:
        format: "jsonl" for files of JSON objects, "folder" for folders of text or source files.
        sources: files, or folders for "folder".
        text_column: key of the text in a JSON object.
        id_column: key of the id; "" takes a hash of the text, which does not depend on the record's place.

    Raises:
        FileNotFoundError: a source does not exist.
        ValueError: unknown format, invalid UTF-8 or JSON, a missing column, a column of another type, a damaged
            archive.
    """
    if format not in FORMATS:
        raise ValueError(f"format = {format!r}: expected one of {', '.join(FORMATS)}")
    for source in map(Path, sources):
        if not source.exists():
            raise FileNotFoundError(f"{source} does not exist: correct `source`, or make the text first")
        if format == "folder":
            yield from _read_folder(source)
        else:
            yield from _read_jsonl(source, text_column, id_column)


def text_hash(text: str) -> str:
    """An id made of the text alone."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def _read_jsonl(path: Path, text_column: str, id_column: str) -> Iterator[Document]:
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        place = f"{path}, record {number}"
        try:
            record = json.loads(_decode(line, place))
        except json.JSONDecodeError as error:
            raise ValueError(f"{place}: not a JSON object ({error}): repair or remove the line") from None
        if not isinstance(record, dict):
            raise ValueError(f"{place}: expected a JSON object, found {type(record).__name__}")
        text = _column(record, text_column, "text_column", place)
        if not isinstance(text, str):
            raise ValueError(
                f"{place}: column {text_column!r} holds {type(text).__name__}, expected a string: "
                "remove the record or set text_column"
            )
        name = str(_column(record, id_column, "id_column", place)) if id_column else text_hash(text)
        yield Document(name, text)


def _column(record: dict, column: str, setting: str, place: str) -> object:
    if column not in record:
        raise ValueError(f"{place}: no column {column!r}; it has {', '.join(sorted(record)) or 'none'}: set {setting}")
    return record[column]


def _lines(path: Path) -> Iterator[bytes]:
    """Raw lines: decoded one by one, so that a wrong byte can be placed."""
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        try:
            yield from file
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"{path}: damaged or truncated gzip file ({error}): copy or make it again") from None


def _decode(raw: bytes, place: str) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{place}: invalid UTF-8 at byte {error.start} ({raw[error.start]:#04x}): "
            "convert the file to UTF-8 or remove the record"
        ) from None


def _read_folder(root: Path) -> Iterator[Document]:
    """Every file below `root` in the order of the names, hidden ones left out; the id is the path below `root`."""
    if not root.is_dir():
        raise ValueError(f'{root} is a file, expected a folder: set format = "jsonl", or correct `source`')
    for file in sorted(root.rglob("*")):
        parts = file.relative_to(root).parts
        if file.is_file() and not any(part.startswith(".") for part in parts):
            yield Document("/".join(parts), _decode(file.read_bytes(), f"{file}, record 1"))

"""Readers: one source of a dataset -> an iterator of `Document`.

Rows of JSON lines, parquet files and Hugging Face datasets pass through one function that makes documents of them, so
all formats check the same things with the same words; in a folder each file is a document. An error names file and
record, because in a corpus of millions nothing else finds the culprit. Every document is passed on;
`DatasetConfig.rejects` says which ones stay out of the corpus.

    for source in dataset.sources():
        for document in read_documents(dataset, source): ...
"""

import gzip
import hashlib
import io
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from mobilellm_pro.data.dataset_config import DatasetConfig, folder_files
from mobilellm_pro.data.hub_records import HUB_FILE_PREFIX, hub_records
from mobilellm_pro.data.source import Document, Source

_BUFFER_BYTES = 1 << 20
_PARQUET_ROWS = 64  # rows in memory at a time: some corpora have documents of megabytes


def read_documents(dataset: DatasetConfig, source: Source) -> Iterator[Document]:
    """All documents of one source, in order.

    Args:
        dataset: says the format and the columns.
        source: one of `dataset.sources()`.

    Raises:
        FileNotFoundError: the source does not exist.
        ValueError: invalid UTF-8 or JSON, a missing column, a column of another type or without a value, a damaged
            file, a Hugging Face dataset that cannot be read.
    """
    assert dataset.format != "megatron", "token shards hold no documents of text"
    if source.path is not None and not source.path.exists():
        raise FileNotFoundError(f"{source.path} does not exist: correct `source`, or make the text first")
    if dataset.format == "folder":
        yield from _read_folder(source)
    elif source.num_shards:
        for record, place in hub_records(dataset, source):
            yield _document(record, dataset, place, 0)
    else:
        with _open(dataset, source) as file:
            parquet = dataset.format == "parquet" or (dataset.format == "hub" and source.name.endswith(".parquet"))
            yield from (_read_parquet if parquet else _read_jsonl)(dataset, source, file)


def text_hash(text: str) -> str:
    """An id made of the text alone."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def _document(record: dict[str, Any], dataset: DatasetConfig, place: str, position: int) -> Document:
    """The document of one row; raises ValueError when a column is missing or not what it should be."""
    text = _column(record, dataset.text_column, "text_column", place)
    if not isinstance(text, str):
        raise ValueError(
            f"{place}: column {dataset.text_column!r} holds {type(text).__name__}, expected a string: "
            "remove the record or set text_column"
        )
    if dataset.id_column:
        name = _column(record, dataset.id_column, "id_column", place)
        if not isinstance(name, str | int):
            raise ValueError(
                f"{place}: column {dataset.id_column!r} holds {type(name).__name__}, expected a string or an integer: "
                'set id_column, or id_column = "" for a hash of the text'
            )
    else:
        name = text_hash(text)
    language = _column(record, dataset.language_column, "language_column", place) if dataset.language_column else ""
    if language is not None and not isinstance(language, str):
        raise ValueError(
            f"{place}: column {dataset.language_column!r} holds {type(language).__name__}, expected a string: "
            "set language_column"
        )
    return Document(str(name), text, language or "", position)


def _column(record: dict[str, Any], column: str, setting: str, place: str) -> Any:
    if column not in record:
        raise ValueError(f"{place}: no column {column!r}; it has {', '.join(sorted(record)) or 'none'}: set {setting}")
    return record[column]


def _open(dataset: DatasetConfig, source: Source) -> BinaryIO:
    """The file, buffered; of a Hugging Face repository where the source has no path."""
    if source.path is None:
        assert source.name.startswith(HUB_FILE_PREFIX)
        from huggingface_hub import HfFileSystem

        return HfFileSystem().open(source.name, "rb")
    if source.path.is_dir():
        raise ValueError(f'{source.path} is a folder, expected a file: set format = "folder", or correct `source`')
    if (dataset.format == "jsonl") == (source.path.suffix == ".parquet") and dataset.format != "hub":
        right = "parquet" if dataset.format == "jsonl" else "jsonl"
        raise ValueError(f'{source.path}: not a {dataset.format} file by its suffix: set format = "{right}"')
    return source.path.open("rb", buffering=_BUFFER_BYTES)


def _read_jsonl(dataset: DatasetConfig, source: Source, file: BinaryIO) -> Iterator[Document]:
    for number, line in enumerate(_lines(source.name, file), start=1):
        if not line.strip():
            continue
        place = f"{source.name}, record {number}"
        try:
            record = json.loads(_decode(line, place))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{place}: not a JSON object ({error}): repair or remove the line") from None
        if not isinstance(record, dict):
            raise ValueError(f"{place}: expected a JSON object, found {type(record).__name__}: remove the line")
        yield _document(record, dataset, place, file.tell())


def _lines(name: str, file: BinaryIO) -> Iterator[bytes]:
    """Raw lines, unpacked by the suffix of the name: decoded one by one, so that a wrong byte can be placed."""
    try:
        if name.endswith(".gz"):
            # Without a buffer of its own, a line costs several calls into the archive.
            yield from io.BufferedReader(gzip.GzipFile(fileobj=file), 2**20)
        elif name.endswith(".zst"):
            yield from _zstandard(file)
        else:
            yield from file
    except (EOFError, gzip.BadGzipFile, zlib.error, OSError) as error:
        raise ValueError(f"{name}: damaged or truncated file ({error}): copy or make it again") from None


def _zstandard(file: BinaryIO) -> Iterator[bytes]:
    """Lines of a Zstandard file of any number of frames."""
    import pyarrow

    unpacked = pyarrow.CompressedInputStream(pyarrow.PythonFile(file, mode="r"), "zstd")
    yield from io.BufferedReader(unpacked, _BUFFER_BYTES)


def _read_parquet(dataset: DatasetConfig, source: Source, file: BinaryIO) -> Iterator[Document]:
    """Rows in small batches of the needed columns: memory does not grow with the row groups of the file."""
    import pyarrow
    import pyarrow.parquet

    columns = [column for column in (dataset.text_column, dataset.id_column, dataset.language_column) if column]
    number = 0
    try:
        table = pyarrow.parquet.ParquetFile(file, buffer_size=_BUFFER_BYTES, pre_buffer=False)
        _check_schema(table.schema_arrow, dataset, source.name)
        num_rows, num_bytes = max(table.metadata.num_rows, 1), source.num_bytes or 0
        for batch in table.iter_batches(_PARQUET_ROWS, columns=list(dict.fromkeys(columns))):
            for row in range(batch.num_rows):
                number += 1
                place = f"{source.name}, row {number}"
                yield _document(_row(batch, row, place), dataset, place, number * num_bytes // num_rows)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(
            f"{source.name}: damaged or truncated parquet file, after row {number} ({error}): copy or make it again"
        ) from None


def _check_schema(schema: Any, dataset: DatasetConfig, name: str) -> None:
    """Raises ValueError unless the columns are there and the text is text, before the first row is read."""
    for setting in ("text_column", "id_column", "language_column"):
        column = getattr(dataset, setting)
        if not column:
            continue
        _column(dict.fromkeys(schema.names), column, setting, name)
        kind = str(schema.field(column).type)
        if setting != "id_column" and "string" not in kind:
            raise ValueError(f"{name}: column {column!r} holds {kind}, expected a string: set {setting}")


def _row(batch: Any, row: int, place: str) -> dict[str, Any]:
    try:
        return {column: batch.column(column)[row].as_py() for column in batch.schema.names}
    except UnicodeDecodeError as error:
        raise _invalid_utf8(error, place) from None


def _decode(raw: bytes, place: str) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _invalid_utf8(error, place) from None


def _invalid_utf8(error: UnicodeDecodeError, place: str) -> ValueError:
    return ValueError(
        f"{place}: invalid UTF-8 at byte {error.start} ({error.object[error.start]:#04x}): "
        "convert the file to UTF-8 or remove the record"
    )


def _read_folder(source: Source) -> Iterator[Document]:
    """Every file below the folder in the order of the names, hidden ones left out; the id is the path below it."""
    root = source.path
    assert isinstance(root, Path)
    if not root.is_dir():
        raise ValueError(f'{root} is a file, expected a folder: set format = "jsonl", or correct `source`')
    position = 0
    for file in folder_files(root):
        raw = file.read_bytes()
        position += len(raw)
        yield Document("/".join(file.relative_to(root).parts), _decode(raw, f"{file}, record 1"), "", position)

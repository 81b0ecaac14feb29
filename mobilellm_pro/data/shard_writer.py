"""Writes documents into token shards, each file under a temporary name until it is complete.

A document may arrive in pieces and be of any length: nothing here holds more than a few megabytes of ids.

    with ShardWriter(folder, "train", shard_tokens=500_000_000) as writer:
        writer.append(first_piece)
        writer.append(second_piece)
        writer.end_document("id of the document")
"""

import errno
import hashlib
import os
import shutil
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np

from mobilellm_pro.data.manifest import ShardRecord, file_sha256
from mobilellm_pro.data.shard_index import MAX_DOCUMENT_TOKENS, write_index

_BUFFER_TOKENS = 1_000_000  # written, hashed and searched for the largest id at once
_FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class ShardWriter:
    """Writes documents into shards `<folder>/<split>-<part>-<number>.bin/.idx`, each of about `shard_tokens`.

    A shard ends after the document that reaches `shard_tokens`, so no document is too long for one. Use as a context
    manager: leaving it normally finishes the last shard, leaving it by an error removes the unfinished one. Every file
    is written under a temporary name and renamed when complete.

    Attributes:
        records: of the finished shards, in order.
    """

    def __init__(self, folder: str | Path, split: str, *, shard_tokens: int, part: int = 0) -> None:
        """Writes nothing yet; the first ids open the first shard."""
        self.records: list[ShardRecord] = []
        self._folder, self._prefix, self._shard_tokens = Path(folder), f"{split}-{part:05d}", shard_tokens
        self._file: BinaryIO | None = None
        self._buffer: list[np.ndarray] = []
        self._lengths = array("i")  # 4 bytes a document, not 40
        self._tokens = self._document_tokens = self._buffered = 0
        self._digest, self._max_id = hashlib.sha256(), -1

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if error is None and self._lengths:
                self._finish_shard()
        finally:  # whatever is still there by now is of a shard that could not be finished
            self._discard()

    def add(self, ids: np.ndarray, document_id: str = "") -> None:
        """Writes a whole document: `append` and `end_document`."""
        self.append(ids)
        self.end_document(document_id)

    def append(self, ids: np.ndarray) -> None:
        """Appends ids to the current document.

        Args:
            ids: int32 [tokens]; must not change afterwards, they are written later.

        Raises:
            ValueError: the disk is full.
        """
        self._buffer.append(ids)
        self._buffered += len(ids)
        self._document_tokens += len(ids)
        if self._buffered >= _BUFFER_TOKENS:
            self._flush()

    def end_document(self, document_id: str = "") -> None:
        """Ends the current document, and the shard if it is full.

        Args:
            document_id: named in errors.

        Raises:
            ValueError: the document has more tokens than an index can say, or the disk is full.
        """
        if self._document_tokens > MAX_DOCUMENT_TOKENS:
            raise ValueError(
                f"document {document_id!r} has {self._document_tokens} tokens, more than the {MAX_DOCUMENT_TOKENS} "
                "that an index can hold: split the document"
            )
        self._lengths.append(self._document_tokens)
        self._tokens += self._document_tokens
        self._document_tokens = 0
        if self._tokens >= self._shard_tokens:
            self._finish_shard()

    def _flush(self) -> None:
        path = self._temporary(".bin")
        with full_disk_named(path):
            if self._file is None:
                self._folder.mkdir(parents=True, exist_ok=True)
                self._file = path.open("wb")
            if self._buffer:
                ids = np.ascontiguousarray(np.concatenate(self._buffer), dtype="<i4")
                self._file.write(ids.data)
                self._digest.update(ids.data)
                self._max_id = max(self._max_id, int(ids.max(initial=-1)))
        self._buffer, self._buffered = [], 0

    def _finish_shard(self) -> None:
        self._flush()
        assert self._file is not None
        binary, index = self._temporary(".bin"), self._temporary(".idx")
        with full_disk_named(binary):
            flush_to_disk(self._file)
            self._file.close()
        with full_disk_named(index):
            write_index(index, np.frombuffer(self._lengths, dtype=np.int32))
            with index.open("rb+") as file:
                flush_to_disk(file)
        record = ShardRecord(
            self._name(), len(self._lengths), self._tokens, self._max_id, self._digest.hexdigest(), file_sha256(index)
        )
        for path in (binary, index):
            os.replace(path, path.with_suffix(""))
        self.records.append(record)
        self._file, self._lengths, self._tokens = None, array("i"), 0
        self._digest, self._max_id = hashlib.sha256(), -1

    def _discard(self) -> None:
        if self._file:
            try:
                self._file.close()
            except OSError:  # the disk is full: nobody wants the rest of the buffer
                pass
        for suffix in (".bin", ".idx"):
            self._temporary(suffix).unlink(missing_ok=True)

    def _name(self) -> str:
        return f"{self._prefix}-{len(self.records):03d}"

    def _temporary(self, suffix: str) -> Path:
        return self._folder / f"{self._name()}{suffix}.tmp"


def flush_to_disk(file: BinaryIO) -> None:
    """Waits until the content is on disk: a rename that survives a power cut must not name an empty file."""
    file.flush()
    os.fsync(file.fileno())


@contextmanager
def full_disk_named(path: Path) -> Iterator[None]:
    """Turns "no space left", a quota or a file size limit into a ValueError with file, free space and cure."""
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL_DISK:
            raise
        free = shutil.disk_usage(path.parent).free / 1e6
        raise ValueError(
            f"{path}: cannot be written ({error.strerror}; {free:.1f} MB free on this disk): free space and run "
            "`prepare` again; finished parts are kept"
        ) from None

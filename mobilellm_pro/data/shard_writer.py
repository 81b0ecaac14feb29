"""Writes documents into token shards, each file under a temporary name until it is complete."""

import os
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np

from mobilellm_pro.data.manifest import ShardRecord, file_sha256
from mobilellm_pro.data.shard_index import write_index


class ShardWriter:
    """Writes documents into shards `<folder>/<split>-00000.bin/.idx`, each at most `shard_tokens` long.

    Use as a context manager: leaving it normally finishes the last shard, leaving it by an error removes the
    unfinished one. Every file is written under a temporary name and renamed when complete.
    """

    def __init__(self, folder: str | Path, split: str, *, shard_tokens: int) -> None:
        """Writes nothing yet; the first document opens the first shard."""
        self.records: list[ShardRecord] = []
        self._folder, self._split, self._shard_tokens = Path(folder), split, shard_tokens
        self._file: BinaryIO | None = None
        self._lengths: list[int] = []
        self._tokens = 0
        self._max_id = -1

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None:
            self._finish_shard()
        elif self._file:
            self._file.close()
            self._temporary(".bin").unlink(missing_ok=True)

    def add(self, ids: np.ndarray, document_id: str) -> None:
        """Appends one document.

        Args:
            ids: int32 [tokens].
            document_id: named in errors.

        Raises:
            ValueError: the document is longer than a shard may be.
        """
        if len(ids) > self._shard_tokens:
            raise ValueError(
                f"document {document_id!r} has {len(ids)} tokens, more than shard_tokens = {self._shard_tokens}: "
                "raise shard_tokens or split the document"
            )
        if self._tokens + len(ids) > self._shard_tokens:
            self._finish_shard()
        if self._file is None:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._file = self._temporary(".bin").open("wb")
        self._file.write(np.ascontiguousarray(ids, dtype="<i4").tobytes())
        self._lengths.append(len(ids))
        self._tokens += len(ids)
        self._max_id = max(self._max_id, int(ids.max(initial=-1)))

    def _finish_shard(self) -> None:
        if self._file is None:
            return
        self._file.close()
        write_index(self._temporary(".idx"), np.array(self._lengths, dtype=np.int32))
        name = self._name()
        digests = {suffix: file_sha256(self._temporary(suffix)) for suffix in (".bin", ".idx")}
        for suffix in (".bin", ".idx"):
            os.replace(self._temporary(suffix), self._folder / f"{name}{suffix}")
        record = ShardRecord(name, len(self._lengths), self._tokens, self._max_id, digests[".bin"], digests[".idx"])
        self.records.append(record)
        self._file, self._lengths, self._tokens, self._max_id = None, [], 0, -1

    def _name(self) -> str:
        return f"{self._split}-{len(self.records):05d}"

    def _temporary(self, suffix: str) -> Path:
        return self._folder / f"{self._name()}{suffix}.tmp"

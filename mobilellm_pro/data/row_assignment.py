"""Which documents share a row: best-fit packing of one corpus, kept beside its manifest.

Two arrays describe it, as `.npy` files that are mapped, or in memory where the folder cannot be written:

    pieces       (document, start, length) of every part of a document, row after row
    first_piece  int64 [rows + 1], the piece that each row begins with, then the number of pieces

Pieces of a row stand in order of length, so that the last token of a full row, which is a label only, never is a piece
of its own. The files carry a digest of the manifest and are made again when it changes.
"""

import hashlib
import os
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from mobilellm_pro.data import manifest
from mobilellm_pro.data.document_limits import NO_LIMITS, DocumentLimits
from mobilellm_pro.data.shards import Corpus

PIECE = np.dtype([("document", "<i8"), ("start", "<i4"), ("length", "<i4")])
WINDOW_DOCUMENTS = 65_536
_VERSION = 1  # a change of the packing makes older files invalid
_WORD_BITS = 512  # of the sets of free lengths: large enough for two levels, small enough to be fast


@dataclass(frozen=True)
class RowAssignment:
    """The rows of one corpus.

    Attributes:
        pieces: PIECE [pieces], row after row.
        first_piece: int64 [rows + 1].
        files: of the two arrays; None where they are held in memory.
    """

    pieces: np.ndarray
    first_piece: np.ndarray
    files: tuple[Path, Path] | None = None

    @classmethod
    def of(cls, corpus: Corpus, capacity: int, limits: DocumentLimits = NO_LIMITS) -> "RowAssignment":
        """Opens the assignment of a corpus, or makes it and tries to keep it.

        Args:
            corpus: an opened split.
            capacity: tokens of a row, the last label included.
            limits: which documents are read, and how much of each; at least one token must be left.

        Raises:
            ValueError: damaged files.
        """
        made_of, chosen = (corpus.folder / manifest.FILE).read_bytes() + b"%d" % _VERSION, ""
        if limits.min_document_tokens is not None:
            chosen += f"_of_{limits.min_document_tokens}"
        if limits.clusters is not None:
            made_of += corpus.clusters.content.encode()
            chosen += "_in_" + hashlib.sha256(repr(sorted(limits.clusters)).encode()).hexdigest()[:8]
        digest = hashlib.sha256(made_of).hexdigest()[:16]
        stem = f"best_fit-{corpus.split}-{capacity - 1}-{limits.max_document_tokens or 'whole'}{chosen}-"
        files = corpus.folder / f"{stem}{digest}.pieces.npy", corpus.folder / f"{stem}{digest}.rows.npy"
        if all(file.exists() for file in files):
            return cls.read(*files)
        try:
            _store(assign(corpus, capacity, limits), files)
        except OSError as error:
            warnings.warn(f"{corpus.folder}: rows are packed at every start ({error})", stacklevel=2)
            pieces, counts = zip(*assign(corpus, capacity, limits), strict=True)
            return cls(np.concatenate(pieces), np.cumsum(np.concatenate((np.zeros(1, np.int64), *counts))))
        for stale in corpus.folder.glob(f"{stem}*.npy"):
            if stale not in files:
                stale.unlink(missing_ok=True)
        return cls.read(*files)

    @classmethod
    def read(cls, pieces: Path, rows: Path) -> "RowAssignment":
        """Maps the two files; raises ValueError for damaged ones."""
        try:
            arrays = [np.load(file, mmap_mode="r").view(np.ndarray) for file in (pieces, rows)]
            if arrays[0].dtype != PIECE or len(arrays[1]) < 2 or int(arrays[1][-1]) != len(arrays[0]):
                raise ValueError("the two files do not fit together")
        except (ValueError, EOFError) as error:
            raise ValueError(f"{pieces} and {rows.name}: damaged ({error}): delete both") from None
        return cls(arrays[0], arrays[1], (pieces, rows))

    def num_inputs(self, seq_len: int) -> int:
        """Inputs of one pass over the corpus, without padding: a full row's last token is only a label."""
        tokens = np.add.reduceat(self.pieces["length"], self.first_piece[:-1], dtype=np.int64)
        return int(np.minimum(tokens, seq_len).sum())

    @property
    def num_rows(self) -> int:
        """Rows of one pass over the corpus."""
        return len(self.first_piece) - 1

    def row(self, number: int) -> np.ndarray:
        """PIECE [pieces of the row]."""
        return self.pieces[self.first_piece[number] : self.first_piece[number + 1]]

    def __reduce__(self) -> tuple[Any, ...]:
        """A worker process maps the files again instead of receiving their content."""
        return (RowAssignment.read, self.files) if self.files else (RowAssignment, (self.pieces, self.first_piece))


def assign(
    corpus: Corpus, capacity: int, limits: DocumentLimits = NO_LIMITS
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The rows of each window of neighbouring documents: PIECE [pieces] and int64 [rows], pieces of each row."""
    for documents, lengths in _windows(corpus, limits):
        yield _assign_window(documents, lengths, capacity)


def _windows(corpus: Corpus, limits: DocumentLimits) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Documents and their lengths, int64 [documents] each, enough of them for little padding: one window at a time.

    Where none is left out a window is WINDOW_DOCUMENTS neighbours, else it grows until so many are left in it.
    """
    size = corpus.num_documents
    held: list[tuple[np.ndarray, np.ndarray]] = []
    num_held = 0
    with tqdm(total=size, desc=f"packing {corpus.name}", unit=" documents", unit_scale=True, delay=2) as bar:
        for first in range(0, size, WINDOW_DOCUMENTS):
            documents = np.arange(first, min(first + WINDOW_DOCUMENTS, size))
            lengths = limits.lengths(corpus, first, first + len(documents))
            bar.update(len(documents))
            if limits.leaves_out:
                documents, lengths = documents[lengths > 0], lengths[lengths > 0]
            if len(documents):
                held.append((documents, lengths))
                num_held += len(documents)
            if held and (num_held >= WINDOW_DOCUMENTS or first + WINDOW_DOCUMENTS >= size):
                yield _joined(held)
                held, num_held = [], 0


def _joined(parts: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    documents, lengths = zip(*parts, strict=True)
    return np.concatenate(documents), np.concatenate(lengths)


def _assign_window(documents: np.ndarray, lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the documents with the given lengths."""
    full, rest = np.divmod(lengths, capacity)
    whole = np.zeros(int(full.sum()), PIECE)  # one a row
    owner = np.repeat(np.arange(len(lengths)), full)
    whole["document"], whole["length"] = documents[owner], capacity
    whole["start"] = (np.arange(len(owner)) - (np.cumsum(full) - full)[owner]) * capacity
    ranked = np.argsort(-rest, kind="stable")[: np.count_nonzero(rest)]  # the longest first
    rows = best_fit(rest[ranked], capacity)
    # Backwards the pieces grow, and a stable sort by row keeps that within each row.
    by_row = np.argsort(rows[::-1], kind="stable")
    ranked = ranked[::-1][by_row]
    part = np.zeros(len(ranked), PIECE)
    part["document"], part["start"], part["length"] = documents[ranked], (full * capacity)[ranked], rest[ranked]
    counts = np.concatenate((np.ones(len(whole), np.int64), np.bincount(rows)))
    return np.concatenate((whole, part)), counts


def best_fit(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """Puts each length into the row with the least room that holds it, or into a new row.

    Rows are kept by their room. Which rooms occur is a set of bits in two levels, so that the least room of at least n
    is found by two shifts, whatever the number of rows. Of rows with equal room the one used last is taken.

    Args:
        lengths: int64 [pieces], 1 .. capacity each.
        capacity: room of an empty row.

    Returns:
        int64 [pieces]: row of each piece, rows numbered as they are opened.
    """
    by_room: dict[int, list[int]] = {}
    words = [0] * (capacity // _WORD_BITS + 1)  # bit r % 512 of word r // 512: rows with room r exist
    occupied, num_rows, rows = 0, 0, []  # bit w of occupied: word w is not zero
    for length in lengths.tolist():
        word = length // _WORD_BITS
        if found := words[word] >> length % _WORD_BITS:
            room = length + (found & -found).bit_length() - 1
        elif found := occupied >> word + 1:
            word += (found & -found).bit_length()
            found = words[word]
            room = word * _WORD_BITS + (found & -found).bit_length() - 1
        else:
            room = 0
        if room:
            stack = by_room[room]
            row = stack.pop()
            if not stack:
                words[word] ^= 1 << room % _WORD_BITS
                if not words[word]:
                    occupied ^= 1 << word
        else:
            row, room, num_rows = num_rows, capacity, num_rows + 1
        rows.append(row)
        if left := room - length:
            stack = by_room.setdefault(left, [])
            if not stack:
                words[left // _WORD_BITS] |= 1 << left % _WORD_BITS
                occupied |= 1 << left // _WORD_BITS
            stack.append(row)
    return np.array(rows, dtype=np.int64)


def _store(windows: Iterator[tuple[np.ndarray, np.ndarray]], files: tuple[Path, Path]) -> None:
    """Writes the windows as the two arrays under temporary names and renames them; OSError leaves nothing behind."""
    temporary: list[Path] = []
    try:
        for file in files:
            handle, name = tempfile.mkstemp(prefix=f"{file.stem}-", suffix=".tmp", dir=file.parent)
            os.close(handle)
            temporary.append(Path(name))
        with temporary[0].open("wb") as pieces_file, temporary[1].open("wb") as rows_file:
            _write_header(pieces_file, PIECE, 0)
            _write_header(rows_file, np.dtype("<i8"), 0)
            rows_file.write(np.zeros(1, "<i8").data)
            num_pieces = num_rows = 0
            for pieces, counts in windows:
                pieces_file.write(pieces.data)
                rows_file.write((num_pieces + np.cumsum(counts)).astype("<i8").data)
                num_pieces, num_rows = num_pieces + len(pieces), num_rows + len(counts)
            _write_header(pieces_file, PIECE, num_pieces)
            _write_header(rows_file, np.dtype("<i8"), num_rows + 1)
        for source, file in zip(temporary, files, strict=True):
            source.chmod(0o644)  # temporary files are private to their owner
            os.replace(source, file)
    finally:
        for source in temporary:
            with suppress(OSError):
                source.unlink(missing_ok=True)


def _write_header(file: Any, dtype: np.dtype, count: int) -> None:
    """The header of a .npy file of one dimension; numpy pads it so that the count may change in place."""
    file.seek(0)
    descr = np.lib.format.dtype_to_descr(dtype)
    np.lib.format.write_array_header_1_0(file, {"descr": descr, "fortran_order": False, "shape": (count,)})

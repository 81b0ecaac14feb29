"""Which tokens of a corpus are in the hidden-state cache, and where: one index of the headers of all its files.

Tokens are numbered through the rows of a corpus (row j begins at token j * seq_len), so an entry is an interval, and
what is missing are the gaps between intervals, however rows were split among ranks when they were written.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mobilellm_pro.data.hidden_state_files import REWRITE, CacheKey, CorpusKey, differences, read_header

_COLUMNS = np.dtype(
    [
        ("begin", "i8"),
        ("end", "i8"),
        ("file", "i4"),
        ("values", "i8"),
        ("scale", "i8"),
        ("sha256", "V32"),
    ]
)


class Place(NamedTuple):
    """Where an entry lies.

    Attributes:
        begin, end: its tokens, numbered through the rows.
        path: the file.
        values, scale: bytes of the file at which they begin; scale is -1 without scales.
        sha256: of both, 32 bytes.
    """

    begin: int
    end: int
    path: Path
    values: int
    scale: int
    sha256: bytes


@dataclass(frozen=True)
class CorpusIndex:
    """The entries of one split of one corpus, sorted, those that others contain left out.

    Attributes:
        key: of the corpus.
        paths: its files.
        table: [entries] of `_COLUMNS`; begins and ends both grow.
    """

    key: CorpusKey
    paths: list[Path]
    table: np.ndarray

    @classmethod
    def open(cls, folder: Path, cache: CacheKey, key: CorpusKey) -> "CorpusIndex":
        """Reads the headers of the corpus' files, in a process only those that it has not read before.

        Raises:
            ValueError: a truncated file, or one of another teacher.
        """
        states = {path: _state(path) for path in sorted((folder / key.name).glob(f"{key.prefix}*.safetensors"))}
        seen, index = _opened.get((folder, cache, key), ({}, cls(key, [], np.empty(0, _COLUMNS))))
        if not seen.items() <= states.items():  # a file was changed or removed
            seen, index = {}, cls(key, [], np.empty(0, _COLUMNS))
        new = [path for path in states if path not in seen]
        if new:
            tables = [_read_table(path, number, cache, key) for number, path in enumerate(new, len(index.paths))]
            index = cls(key, [*index.paths, *new], _sorted(np.concatenate([index.table, *tables])))
        _opened[folder, cache, key] = states, index
        return index

    def missing_rows(self, num_rows: int) -> np.ndarray:
        """int64: which of the first `num_rows` rows are not there as a whole."""
        total = num_rows * self.key.seq_len
        starts = np.concatenate(([0], self.table["end"]))
        stops = np.concatenate((self.table["begin"], [total])).clip(max=total)
        gaps = stops > starts
        first, last = starts[gaps] // self.key.seq_len, (stops[gaps] - 1) // self.key.seq_len
        depth = np.zeros(num_rows + 1, dtype=np.int64)
        np.add.at(depth, first, 1)
        np.add.at(depth, last + 1, -1)
        return np.flatnonzero(np.cumsum(depth[:-1]))

    def holds(self, begin: int, end: int) -> bool:
        """Whether all tokens begin .. end - 1 are there."""
        filled = begin
        for place in self.places(begin, end):
            if place.begin > filled:
                break
            filled = place.end
        return filled >= end

    def places(self, begin: int, end: int) -> list[Place]:
        """The entries that hold any of the tokens begin .. end - 1, in order; neighbours may overlap."""
        first = int(np.searchsorted(self.table["end"], begin, side="right"))
        last = int(np.searchsorted(self.table["begin"], end, side="left"))
        return [self._place(row) for row in self.table[first:last]]

    def _place(self, row: Any) -> Place:
        path = self.paths[int(row["file"])]
        offsets = int(row["values"]), int(row["scale"])
        return Place(int(row["begin"]), int(row["end"]), path, *offsets, row["sha256"].tobytes())


_State = tuple[int, int, int]
_opened: dict[tuple[Path, CacheKey, CorpusKey], tuple[dict[Path, _State], CorpusIndex]] = {}
"""What `CorpusIndex.open` knows: preflight, loaders and writer of a process ask for the same indexes, and a large cache
has many headers. Files are listed each time, so that new ones are found."""


def order_problems(folder: Path, key: CorpusKey) -> str:
    """In words, how the cached rows of a corpus differ from those that a job reads; "" where the cache has its order.

    Args:
        folder: of the cache.
        key: of the corpus as the job reads it, which the cache does not hold.
    """
    found: dict[str, CorpusKey] = {}
    for path in sorted((folder / key.name).glob(f"{key.split}-*.safetensors")):
        prefix = path.name.rsplit("-", 1)[0]
        if prefix + "-" == key.prefix:
            return ""
        if prefix not in found:
            found[prefix] = CorpusKey(**read_header(path)[0]["corpus"])
    if not found:
        return ""
    nearest = min((differences(other, key) for other in found.values()), key=lambda text: text.count(" is "))
    return (
        f"{folder / key.name}: the cached rows of {key} are other rows: {nearest}: restore what differs, or write a "
        "cache for this order"
    )


def _sorted(table: np.ndarray) -> np.ndarray:
    """Entries by their begin, without those that lie inside others: then their ends grow too."""
    table = table[np.lexsort((-table["end"], table["begin"]))]
    furthest = np.maximum.accumulate(table["end"])
    return table[table["end"] > np.concatenate(([-1], furthest))[: len(table)]]


def _state(path: Path) -> _State:
    """Differs after a file was replaced or changed."""
    stat = path.stat()
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


def _read_table(path: Path, number: int, cache: CacheKey, key: CorpusKey) -> np.ndarray:
    """The entries of one file as `_COLUMNS`."""
    metadata, tensors, start = read_header(path)
    try:
        for found, expected in ((CacheKey(**metadata["teacher"]), cache), (CorpusKey(**metadata["corpus"]), key)):
            if found != expected:
                raise ValueError(f"made for another cache: {differences(found, expected)}")
        rows = []
        for name, digest in metadata["sha256"].items():
            row, first = map(int, name.split(":"))
            values, scale = tensors[name], tensors.get(f"{name}:scale")
            num_tokens, width = values["shape"]
            if width != cache.hidden_size or (scale is None) != (cache.stored != "float8"):
                raise ValueError(f"entry {name} has width {width}, or scales where none belong")
            begin = row * key.seq_len + first
            offsets = [start + values["data_offsets"][0], -1 if scale is None else start + scale["data_offsets"][0]]
            rows.append((begin, begin + num_tokens, number, *offsets, bytes.fromhex(digest)))
        return np.array(rows, dtype=_COLUMNS)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path}: changed, or of another cache ({error}): {REWRITE}") from None

"""The indexed format of Megatron-LM: where each document of a shard lies.

A shard is two files. `.bin` holds the ids of all documents, int32 or uint16 little endian. `.idx` holds, little endian
and without padding:

    9 bytes   magic "MMIDIDX\\0\\0"
    u64       version, 1
    u8        type of the ids, 4 = int32, 8 = uint16
    u64       number of sequences S
    u64       number of document borders D + 1
    int32[S]  tokens of each sequence
    int64[S]  byte at which each sequence begins in .bin
    int64[D+1] first sequence of each document, then S

Here every document is one sequence, so that its number finds its length and place without a search. The arrays are
mapped, not read: a corpus of a billion documents costs no more memory than one of ten. Documents need not follow one
another, and an index may leave out documents of its .bin.

    index = ShardIndex.open(Path("train-00000.idx"))
    begin, length = index.pointers[7], index.lengths[7]
"""

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
DTYPE_OF_CODE: dict[int, np.dtype] = {4: np.dtype("<i4"), 8: np.dtype("<u2")}
REMAKE = "delete the folder and run `prepare` again"
MAX_DOCUMENT_TOKENS = 2**31 - 1  # lengths are int32
_CHUNK_DOCUMENTS = 2**20  # checks and writes go through the arrays in steps of this many


def write_index(
    path: Path, lengths: np.ndarray, *, starts: np.ndarray | None = None, dtype: np.typing.DTypeLike = np.int32
) -> None:
    """Writes the `.idx` of documents, one sequence each.

    Args:
        path: of the `.idx`.
        lengths: int32 [documents], tokens of each.
        starts: int64 [documents], token of the `.bin` at which each begins; left out, they lie one after another.
        dtype: of the ids in the `.bin`, int32 or uint16.
    """
    codes = {kind: code for code, kind in DTYPE_OF_CODE.items()}
    kind = np.dtype(dtype).newbyteorder("<")
    assert kind in codes and (starts is None or len(starts) == len(lengths))
    position = 0
    with path.open("wb") as file:
        file.write(HEADER.pack(MAGIC, VERSION, codes[kind], len(lengths), len(lengths) + 1))
        file.write(np.ascontiguousarray(lengths, dtype="<i4").data)
        for first in range(0, len(lengths), _CHUNK_DOCUMENTS):
            part = slice(first, first + _CHUNK_DOCUMENTS)
            if starts is None:
                ends = position + np.cumsum(lengths[part], dtype=np.int64)
                begins, position = ends - lengths[part], int(ends[-1])
            else:
                begins = starts[part].astype(np.int64)
            file.write((begins * kind.itemsize).astype("<i8").data)
        for first in range(0, len(lengths) + 1, _CHUNK_DOCUMENTS):
            file.write(np.arange(first, min(first + _CHUNK_DOCUMENTS, len(lengths) + 1), dtype="<i8").data)


@dataclass(frozen=True)
class ShardIndex:
    """The mapped `.idx` of one shard.

    Attributes:
        path: of the `.idx`; the `.bin` lies beside it.
        dtype: of the ids in the `.bin`.
        lengths: int32 [documents], tokens of each document.
        pointers: int64 [documents], byte of the `.bin` at which each begins.
        num_tokens: sum of the lengths; -1 where the index was opened without a check.
    """

    path: Path
    dtype: np.dtype
    lengths: np.ndarray
    pointers: np.ndarray
    num_tokens: int = -1

    @classmethod
    def open(cls, path: Path, check: bool = True) -> "ShardIndex":
        """Maps an index after a look at its header and size.

        Args:
            path: the `.idx`; its `.bin` must lie beside it.
            check: also read the index once, in pieces, and compare every document with the size of the `.bin`.

        Raises:
            FileNotFoundError: one of the two files is missing.
            ValueError: wrong magic, version or type; an index of another size than it says; documents of several
                sequences; a document that lies outside the `.bin`.
        """
        for file in (path, path.with_suffix(".bin")):
            if not file.is_file():
                raise FileNotFoundError(f"{file} is missing: {REMAKE}")
        dtype, documents = _read_header(path)
        num_tokens = _check(path, dtype, documents) if check else -1
        # One map for both, as each counts as an open file.
        _, lengths, pointers, _ = np.split(
            map_array(path, np.dtype("u1")), HEADER.size + np.array([0, 4, 12]) * documents
        )
        return cls(path, dtype, lengths.view("<i4"), pointers.view("<i8"), num_tokens)

    def map_ids(self) -> np.ndarray:
        """[size of the `.bin`] its ids, of type `dtype`."""
        return map_array(self.path.with_suffix(".bin"), self.dtype, scattered=True)


def map_array(
    path: Path, dtype: np.dtype, offset: int = 0, count: int | None = None, *, scattered: bool = False
) -> np.ndarray:
    """[count] a read-only map of a file, a plain array: slicing a numpy.memmap takes ten times as long.

    Args:
        path: of the file.
        dtype: of the entries.
        offset: byte of the first entry.
        count: entries; None: to the end of the file.
        scattered: it will be read in small parts here and there. Without this hint the kernel reads up to megabytes
            around each part that is not in its cache.
    """
    if count is None:
        count = (path.stat().st_size - offset) // dtype.itemsize
    if count == 0:  # an empty file cannot be mapped
        return np.empty(0, dtype)
    with path.open("rb") as file:
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    if scattered and hasattr(mmap, "MADV_RANDOM"):
        content.madvise(mmap.MADV_RANDOM)
    return np.frombuffer(content, dtype, count, offset)


def unpack_header(path: Path, cure: str) -> tuple[int, int, int]:
    """(type code, sequences, document borders) of an index of any writer; ValueError with the cure if it is none."""
    with path.open("rb") as file:
        raw = file.read(HEADER.size)
    magic, version, *numbers = HEADER.unpack(raw.ljust(HEADER.size, b"\0"))
    if magic != MAGIC or version != VERSION:
        raise ValueError(f"{path}: not an index of version {VERSION} (it starts with {raw[:17]!r}): {cure}")
    code, sequences, borders = numbers
    return code, sequences, borders


def _read_header(path: Path) -> tuple[np.dtype, int]:
    """(type of the ids, number of documents)."""
    code, sequences, borders = unpack_header(path, REMAKE)
    if code not in DTYPE_OF_CODE:
        raise ValueError(f"{path}: ids have type code {code}, expected 4 (int32) or 8 (uint16): prepare as int32")
    size, expected = path.stat().st_size, HEADER.size + 12 * sequences + 8 * borders
    if size != expected:
        raise ValueError(f"{path}: {size} bytes, expected {expected} for {sequences} sequences: {REMAKE}")
    if borders != sequences + 1:
        raise ValueError(
            f"{path}: {sequences} sequences and {borders} document borders, expected one sequence a document "
            f"({sequences + 1} borders): import the corpus with `prepare`"
        )
    return DTYPE_OF_CODE[code], sequences


def _check(path: Path, dtype: np.dtype, documents: int) -> int:
    """Checks every document and returns the sum of their tokens.

    Reads the file instead of the maps, whose pages would count as memory of this process.
    """
    size, total = path.with_suffix(".bin").stat().st_size, 0
    for first in range(0, documents, _CHUNK_DOCUMENTS):
        count = min(_CHUNK_DOCUMENTS, documents - first)
        lengths = np.fromfile(path, "<i4", count, offset=HEADER.size + 4 * first)
        begins = np.fromfile(path, "<i8", count, offset=HEADER.size + 4 * documents + 8 * first)
        ends = begins + lengths.astype(np.int64) * dtype.itemsize
        wrong = (lengths < 0) | (begins < 0) | (begins > size) | (ends > size) | (begins % dtype.itemsize != 0)
        if wrong.any():
            _raise_misplaced(path, dtype, first, int(wrong.argmax()), lengths, begins)
        total += int(lengths.sum(dtype=np.int64))
    for first in range(0, documents + 1, _CHUNK_DOCUMENTS):
        count = min(_CHUNK_DOCUMENTS, documents + 1 - first)
        borders = np.fromfile(path, "<i8", count, offset=HEADER.size + 12 * documents + 8 * first)
        wrong = borders != np.arange(first, first + count)
        if wrong.any():
            number = first + int(wrong.argmax())
            raise ValueError(
                f"{path}: document {number} begins with sequence {borders[number - first]}, expected one sequence a "
                f"document: import the corpus with `prepare` or, if `prepare` wrote it, {REMAKE}"
            )
    return total


def _raise_misplaced(
    path: Path, dtype: np.dtype, first: int, number: int, lengths: np.ndarray, begins: np.ndarray
) -> None:
    """Raises for document `first + number` of the index, which is entry `number` of both arrays."""
    binary, length, begin = path.with_suffix(".bin"), int(lengths[number]), int(begins[number])
    size, document = binary.stat().st_size, first + number
    if length < 0:
        raise ValueError(f"{path}: document {document} has {length} tokens, expected 0 or more: {REMAKE}")
    if begin < 0 or begin % dtype.itemsize:
        raise ValueError(
            f"{path}: document {document} begins at byte {begin} of {binary.name}, expected a multiple of "
            f"{dtype.itemsize} from 0 on: {REMAKE}"
        )
    raise ValueError(
        f"{binary}: {size} bytes, but {path.name} puts document {document} at bytes {begin} to "
        f"{begin + length * dtype.itemsize}; truncated or of another run: {REMAKE}"
    )

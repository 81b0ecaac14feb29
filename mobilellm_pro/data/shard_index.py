"""The indexed format of Megatron-LM: where each document of a shard lies.

A shard is two files. `.bin` holds the ids of all documents one after another, int32 little endian. `.idx` holds, little
endian and without padding:

    9 bytes   magic "MMIDIDX\\0\\0"
    u64       version, 1
    u8        type of the ids, 4 = int32
    u64       number of sequences S
    u64       number of document borders D + 1
    int32[S]  tokens of each sequence
    int64[S]  byte at which each sequence begins in .bin
    int64[D+1] first sequence of each document, then S
"""

import struct
from pathlib import Path

import numpy as np

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
DTYPE_CODE_INT32 = 4
HEADER = struct.Struct("<9sQBQQ")
TOKEN_BYTES = 4
REMAKE = "delete the folder and run `prepare` again"


def write_index(path: Path, lengths: np.ndarray) -> None:
    """Writes the `.idx` of documents of the given lengths (int32 [documents]), one sequence each."""
    ends = np.cumsum(lengths, dtype=np.int64)
    with path.open("wb") as file:
        file.write(HEADER.pack(MAGIC, VERSION, DTYPE_CODE_INT32, len(lengths), len(lengths) + 1))
        file.write(lengths.astype("<i4").tobytes())
        file.write(((ends - lengths) * TOKEN_BYTES).astype("<i8").tobytes())
        file.write(np.arange(len(lengths) + 1, dtype="<i8").tobytes())


def read_index(path: Path) -> np.ndarray:
    """int64 [documents]: tokens of each document of a shard; sequences of one document are joined.

    Args:
        path: the `.idx`; its `.bin` must lie beside it.

    Raises:
        FileNotFoundError: one of the two files is missing.
        ValueError: wrong magic, version or type; an index shorter than it says; pointers that do not follow the
            lengths; a `.bin` of another size than the index describes.
    """
    binary = path.with_suffix(".bin")
    for file in (path, binary):
        if not file.is_file():
            raise FileNotFoundError(f"{file} is missing: {REMAKE}")
    raw = path.read_bytes()
    magic, version, code, sequences, borders = HEADER.unpack(raw[: HEADER.size].ljust(HEADER.size, b"\0"))
    if magic != MAGIC or version != VERSION:
        raise ValueError(f"{path}: not an index of version {VERSION} (it starts with {raw[:9]!r}): {REMAKE}")
    if code != DTYPE_CODE_INT32:
        raise ValueError(f"{path}: ids have type code {code}, expected {DTYPE_CODE_INT32} (int32): prepare as int32")
    expected = HEADER.size + 12 * sequences + 8 * borders
    if len(raw) != expected:
        raise ValueError(f"{path}: {len(raw)} bytes, expected {expected} for {sequences} sequences: {REMAKE}")
    lengths = np.frombuffer(raw, "<i4", sequences, HEADER.size).astype(np.int64)
    pointers = np.frombuffer(raw, "<i8", sequences, HEADER.size + 4 * sequences)
    first = np.frombuffer(raw, "<i8", borders, HEADER.size + 12 * sequences)
    ends = np.cumsum(lengths)
    size = binary.stat().st_size
    wrong = np.flatnonzero((pointers != (ends - lengths) * TOKEN_BYTES) | (lengths < 0) | (pointers > size))
    if len(wrong):
        raise ValueError(
            f"{path}: sequence {wrong[0]} points to byte {pointers[wrong[0]]}, outside {binary.name} ({size} bytes) or "
            f"not where the sequence before it ends: {REMAKE}"
        )
    total = int(ends[-1]) if sequences else 0
    if size != total * TOKEN_BYTES:
        raise ValueError(
            f"{binary}: {size} bytes, but {path.name} describes {total * TOKEN_BYTES}; truncated or of "
            f"another run: {REMAKE}"
        )
    if borders < 1 or first[0] != 0 or first[-1] != sequences or np.any(np.diff(first) < 0):
        raise ValueError(f"{path}: document borders do not run from 0 to {sequences}: {REMAKE}")
    sums = np.concatenate(([0], ends))
    return np.diff(sums[first])

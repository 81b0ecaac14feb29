"""Files of the hidden-state cache (`hidden_states`): what identifies their content, how one is written and looked up.

    <cache>/cache.json                                    whose hidden states and in which number format; written once
    <cache>/<corpus>/<split>-<key>-<random>.safetensors   entries of one split of one corpus

An entry is a run of tokens of one row of a corpus: the tensor "<row>:<first token>" [T, D] and, in float8, its scales
"<row>:<first token>:scale" [T]. It is read as a whole, so a long row has many. A file's metadata hold the format's
version, the teacher and the corpus in words, and sha256 of the bytes of every entry. A file appears under its name by
rename, complete. Any number of processes write at once: names are random, and the only file that they share,
cache.json, is linked into place by one of them (`hidden_state_folder`).

Shapes: T tokens, D width of the teacher.
"""

import hashlib
import json
import os
import secrets
import shutil
import struct
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mobilellm_pro.data.shard_writer import flush_to_disk

VERSION = 1
TEMPORARY = ".tmp"
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float8": torch.float8_e4m3fn}
_CODES = {"bfloat16": "BF16", "float32": "F32", "float8": "F8_E4M3"}  # of safetensors
_LARGEST_FLOAT8 = 448.0  # of e4m3
_FLOAT8_VALUES = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()  # of every byte
_DECODED_TOKENS = 64
REWRITE = 'delete it and run the job that wrote it again, with teacher.cache = "write"'


@dataclass(frozen=True)
class CacheKey:
    """Whose hidden states, and how they are stored: one for a cache.

    Attributes:
        fingerprint: of the teacher's folder.
        quantization: of the teacher's weights, "none" or "float8": it changes what the teacher computes.
        dtype: that the teacher computes in, "bfloat16" or "float32".
        hidden_size: D.
        cache_dtype: "teacher" (as computed) or "float8" (e4m3 with one fp32 scale a token).
    """

    fingerprint: str
    quantization: str
    dtype: str
    hidden_size: int
    cache_dtype: str

    @property
    def stored(self) -> str:
        """Name of the data type in the files."""
        return self.dtype if self.cache_dtype == "teacher" else self.cache_dtype

    @property
    def bytes_per_token(self) -> int:
        """On disk, scale included, headers not."""
        return self.hidden_size * DTYPES[self.stored].itemsize + (4 if self.stored == "float8" else 0)


@dataclass(frozen=True)
class CorpusKey:
    """What decides which tokens row j of a corpus holds and what the teacher sees of them; weights do not.

    Attributes:
        split, name, content: of the corpus (`Corpus`).
        seq_len: tokens of a row.
        seed: of the order.
        packing: "stream", or what differs from it in words.
        teacher_mask, positions: as in [attention].
    """

    split: str
    name: str
    content: str
    seq_len: int
    seed: int
    packing: str
    teacher_mask: str
    positions: str

    @property
    def prefix(self) -> str:
        """Beginning of the names of this corpus' files: split and ten hex digits of the key."""
        digest = hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()
        return f"{self.split}-{digest[:10]}-"

    def __str__(self) -> str:
        return f"{self.name} ({self.split})"


class Entry(NamedTuple):
    """Hidden states to be written, on the CPU: T tokens of a row from token `first` on, [T, D], and scales [T]."""

    row: int
    first: int
    values_TD: Tensor
    scale_T: Tensor | None

    @property
    def num_bytes(self) -> int:
        """On disk, its part of the header not counted."""
        return self.values_TD.nbytes + (0 if self.scale_T is None else self.scale_T.nbytes)


def encode(hidden_TD: Tensor, key: CacheKey) -> tuple[Tensor, Tensor | None]:
    """Hidden states as they are stored: themselves, or float8 with fp32 scales [T] that map the largest to 448.

    Raises:
        ValueError: hidden states of another width or data type than the cache's.
    """
    if hidden_TD.dtype != DTYPES[key.dtype] or hidden_TD.shape[-1] != key.hidden_size:
        raise ValueError(
            f"hidden states are {hidden_TD.dtype} of width {hidden_TD.shape[-1]}; the cache holds {key.dtype} of width "
            f"{key.hidden_size}: correct teacher.dtype"
        )
    if key.stored != "float8":
        return hidden_TD, None
    values = hidden_TD.float()
    scale = values.abs().amax(dim=-1).div(_LARGEST_FLOAT8).clamp(min=torch.finfo(torch.float32).tiny)
    values = (values / scale[:, None]).clamp(-_LARGEST_FLOAT8, _LARGEST_FLOAT8)  # e4m3 has no infinity to fall into
    return values.to(torch.float8_e4m3fn), scale


def decode(values_TD: Tensor, scale_T: Tensor | None, out_TD: Tensor) -> None:
    """Writes what `encode` made into memory of the teacher's data type, on the CPU.

    Float8 is looked up in a table, a few tokens at a time, which stay in the processor's cache: torch converts a fifth
    as many tokens a second.
    """
    if scale_T is None:
        out_TD.copy_(values_TD)
        return
    bytes_TD = values_TD.view(torch.uint8).numpy()
    for first in range(0, len(bytes_TD), _DECODED_TOKENS):
        part = slice(first, first + _DECODED_TOKENS)
        decoded = torch.from_numpy(np.take(_FLOAT8_VALUES, bytes_TD[part], mode="clip"))
        out_TD[part].copy_(decoded.mul_(scale_T[part, None]))


def byte_view(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, writable."""
    return tensor.view(torch.uint8).numpy().data.cast("B")


def entry_sha256(values_TD: Tensor, scale_T: Tensor | None) -> str:
    """sha256 in hex of an entry's values, then its scales."""
    digest = hashlib.sha256(byte_view(values_TD))
    if scale_T is not None:
        digest.update(byte_view(scale_T))
    return digest.hexdigest()


def write_file(folder: Path, cache: CacheKey, corpus: CorpusKey, entries: Sequence[Entry]) -> Path:
    """Writes entries as a new file and returns its path.

    Raises:
        ValueError: the disk is full or cannot be written; nothing remains of the file.
    """
    path = folder / corpus.name / f"{corpus.prefix}{secrets.token_hex(8)}.safetensors"
    temporary = path.with_name(path.name + TEMPORARY)
    tensors = [(f"{e.row}:{e.first}:scale", "F32", e.scale_T) for e in entries if e.scale_T is not None]
    tensors += [(f"{e.row}:{e.first}", _CODES[cache.stored], e.values_TD) for e in entries]
    header: dict[str, Any] = {"__metadata__": _metadata(cache, corpus, entries)}
    end = 0
    for name, code, tensor in tensors:
        assert tensor is not None
        header[name] = {"dtype": code, "shape": list(tensor.shape), "data_offsets": [end, end + tensor.nbytes]}
        end += tensor.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at multiples of 8 bytes
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("xb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for _, _, tensor in tensors:
                assert tensor is not None
                file.write(byte_view(tensor))
            flush_to_disk(file)
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        free = shutil.disk_usage(existing_parent(path)).free / 1e9
        raise ValueError(
            f"{path}: hidden states of {corpus} cannot be written ({error.strerror}; {free:.1f} GB free on this disk): "
            "free space or choose another teacher.cache_path, and start the job again; what is complete is kept"
        ) from None
    return path


def _metadata(cache: CacheKey, corpus: CorpusKey, entries: Sequence[Entry]) -> dict[str, str]:
    sums = {f"{e.row}:{e.first}": entry_sha256(e.values_TD, e.scale_T) for e in entries}
    described = {"version": VERSION, "teacher": asdict(cache), "corpus": asdict(corpus), "sha256": sums}
    return {name: json.dumps(value, sort_keys=True) for name, value in described.items()}


def read_header(path: Path) -> tuple[dict[str, Any], dict[str, Any], int]:
    """(metadata decoded from JSON, tensors by name, byte at which tensors begin); reads the header only.

    Raises:
        ValueError: not such a file, of another version, or truncated.
    """
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            length = struct.unpack("<Q", file.read(8))[0]
            if length > size - 8:
                raise ValueError("its header is cut off")
            tensors = json.loads(file.read(length))
        metadata = {name: json.loads(value) for name, value in tensors.pop("__metadata__").items()}
        end = 8 + length + max(entry["data_offsets"][1] for entry in tensors.values())
        if set(metadata) != {"version", "teacher", "corpus", "sha256"}:
            raise ValueError("its metadata are not this cache's")
    except (struct.error, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path}: truncated, or no file of hidden states ({error}): {REWRITE}") from None
    if metadata["version"] != VERSION:
        raise ValueError(f"{path}: version {metadata['version']}, expected {VERSION}: {REWRITE}")
    if size != end:
        raise ValueError(f"{path}: truncated or changed: {size:,} bytes, its header promises {end:,}: {REWRITE}")
    return metadata, tensors, 8 + length


def differences(found: Any, expected: Any) -> str:
    """Fields in which two keys of one class differ, in words."""
    pairs = ((field.name, getattr(found, field.name), getattr(expected, field.name)) for field in fields(found))
    return ", ".join(f"{name} is {was!r} there and {now!r} here" for name, was, now in pairs if was != now)


def existing_parent(path: Path) -> Path:
    """The path itself or the nearest folder above it that exists."""
    path = path.absolute()
    return next(parent for parent in (path, *path.parents) if parent.exists())

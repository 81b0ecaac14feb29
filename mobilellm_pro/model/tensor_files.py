"""What is in a Hugging Face folder: tensors by name, whether they fit a model, and which weights they are.

All of it from config.json, the headers of the safetensors and a few samples of bytes: everything that can be wrong is
known before a weight is loaded.
"""

import hashlib
import json
import math
import struct
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from mobilellm_pro.model.hugging_face import (
    hugging_face_name,
    read_config,
    student_args,
    student_config,
    teacher_args,
    teacher_config,
    text_prefix,
)

Ranges = tuple[tuple[int, int], ...]
"""Half-open ranges of one dim, in order; what they name is concatenated."""

Slices = Mapping[int, Ranges]
"""Dim -> ranges of the full tensor that a rank's parameter consists of; other dims are whole."""

INDEX = "model.safetensors.index.json"
ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
"""Data types of weights that a copy converts; others (quantized weights) need a scale that a copy knows nothing of."""

_SAMPLE_BYTES = 4096
_DOWNLOAD = "download it again"


class StoredTensor(NamedTuple):
    """Where a tensor lies."""

    file: Path
    start: int
    """First byte in the file."""

    stop: int
    """Byte after the last."""

    dtype: str
    """As safetensors names it: "BF16", "F32", ..."""

    shape: tuple[int, ...]


def stored_tensors(folder: str | Path) -> dict[str, StoredTensor]:
    """Every tensor in the folder's safetensors by its name there, from the headers alone.

    Raises:
        FileNotFoundError: there is no safetensors file, or one that the index names is missing.
        ValueError: a file is damaged, or two files hold a tensor of the same name.
    """
    files = sorted(Path(folder).glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{folder}: no *.safetensors file")
    missing = sorted(_indexed_files(Path(folder) / INDEX) - {file.name for file in files})
    if missing:
        raise FileNotFoundError(
            f"{Path(folder) / INDEX}: names files that are not there: {', '.join(missing)}; download them again"
        )
    found: dict[str, StoredTensor] = {}
    for file in files:
        for name, tensor in _read_header(file).items():
            if name in found:
                raise ValueError(
                    f"{file}: tensor {name} is in {found[name].file.name} too; remove the file that is left over from "
                    "another checkpoint"
                )
            found[name] = tensor
    return found


def _indexed_files(index: Path) -> set[str]:
    if not index.is_file():
        return set()
    try:
        return set(json.loads(index.read_text())["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index}: not an index of safetensors files (no weight_map); {_DOWNLOAD}") from error


def _read_header(file: Path) -> dict[str, StoredTensor]:
    """Header of one file: 8 bytes of length, then JSON; the data must end where the header says."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = struct.unpack("<Q", stream.read(8).ljust(8, b"\0"))[0]
        if length + 8 > size:
            raise ValueError(f"{file}: not a safetensors file, or truncated in its header; {_DOWNLOAD}")
        try:
            header: dict[str, Any] = json.loads(stream.read(length))
            header.pop("__metadata__", None)
            tensors = {name: _stored(file, 8 + length, **entry) for name, entry in header.items()}
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{file}: not a safetensors file (its header is damaged); {_DOWNLOAD}") from error
    end = max((tensor.stop for tensor in tensors.values()), default=0)
    if end > size:
        raise ValueError(f"{file}: truncated: {size:,} bytes, its header promises {end:,}; {_DOWNLOAD}")
    return tensors


def _stored(file: Path, data: int, *, dtype: str, shape: list[int], data_offsets: list[int]) -> StoredTensor:
    start, stop = data_offsets
    if dtype in ITEM_BYTES and stop - start != math.prod(shape) * ITEM_BYTES[dtype]:
        raise ValueError(f"{stop - start} bytes for {dtype} {shape}")
    return StoredTensor(file, data + start, data + stop, dtype, tuple(shape))


def tensor_problems(
    model: nn.Module,
    folder: str | Path,
    *,
    slices: Mapping[str, Slices] | None = None,
    names: Collection[str] | None = None,
) -> list[str]:
    """Everything that keeps the folder's tensors from filling the model: missing, extra, wrongly shaped.

    Args:
        model: on any device, sharded or whole.
        folder: with safetensors.
        slices: by our name, what a parameter is of its full tensor. Of a sliced dim can be checked only that the ranges
            are inside the stored tensor; its size is known to the whole model alone.
        names: consider only these parameters (our names); then no tensor is extra.

    Raises:
        FileNotFoundError, ValueError: see `stored_tensors`.
    """
    return list(differences(model, folder, stored_tensors(folder), slices=slices, names=names))


def differences(
    model: nn.Module,
    folder: str | Path,
    stored: Mapping[str, StoredTensor],
    *,
    slices: Mapping[str, Slices] | None = None,
    names: Collection[str] | None = None,
) -> Iterator[str]:
    """`tensor_problems` for headers that were read already."""
    prefix = text_prefix(stored)
    parameters = {name: tuple(p.shape) for name, p in model.named_parameters() if names is None or name in names}
    assert names is None or not set(names) - set(parameters), f"the model has no {set(names) - set(parameters)}"
    assert not set(slices or ()) - set(dict(model.named_parameters())), "slices of parameters that do not exist"
    wanted = {hugging_face_name(name, prefix): name for name in parameters}
    yield from (f"{folder}: tensor {full_name} is missing" for full_name in wanted if full_name not in stored)
    if names is None:
        tied = set() if hasattr(model, "lm_head") else {hugging_face_name("lm_head.weight", prefix)}
        for full_name in stored:
            if full_name.startswith(prefix) and full_name not in wanted.keys() | tied:
                yield f"{folder}: tensor {full_name} is not part of the model"
    for full_name, name in wanted.items():
        if full_name in stored:
            yield from _misfit(
                f"{folder}: tensor {full_name}", stored[full_name], parameters[name], (slices or {}).get(name, {})
            )


def _misfit(tensor: str, stored: StoredTensor, shape: tuple[int, ...], slices: Slices) -> Iterator[str]:
    """What is wrong with one stored tensor for a parameter of this shape (global, of a DTensor)."""
    assert all(shape[dim] == sum(stop - start for start, stop in ranges) for dim, ranges in slices.items()), (
        f"{tensor}: ranges {dict(slices)} do not make up {list(shape)}"
    )
    if stored.dtype not in ITEM_BYTES:
        expected = ", ".join(ITEM_BYTES)
        yield f"{tensor} has data type {stored.dtype}, expected one of {expected}; convert the checkpoint to BF16 first"
    fits = len(stored.shape) == len(shape) and all(
        max(stop for _, stop in slices[dim]) <= size if slices.get(dim) else size == shape[dim]
        for dim, size in enumerate(stored.shape)
    )
    if not fits:
        rows = "".join(f", of which [{dim}] is {list(ranges)}" for dim, ranges in slices.items())
        yield f"{tensor} has shape {list(stored.shape)}, expected {list(shape)}{rows}"


def fingerprint(folder: str | Path) -> str:
    """16 hex digits that tell the text model's weights apart, read in seconds at any size.

    SHA-256 over the architecture, as this project writes it to config.json, and of every tensor of the text model its
    name without prefix, data type, shape, and up to 4 KiB from its start, its middle and its end. How tensors are
    distributed over files does not matter, nor whether a vision model is beside them. An edit that leaves all samples
    as they are is **not** seen; training changes them.

    Raises:
        FileNotFoundError, ValueError: the folder is neither a student nor a teacher, or a file is damaged.
    """
    stored = stored_tensors(folder)
    prefix = text_prefix(stored)
    digest = hashlib.sha256(json.dumps(_architecture(folder), sort_keys=True).encode())
    for name in sorted(name for name in stored if name.startswith(prefix)):
        tensor = stored[name]
        digest.update(json.dumps([name.removeprefix(prefix), tensor.dtype, tensor.shape]).encode())
        for sample in _samples(tensor):
            digest.update(sample)
    return digest.hexdigest()[:16]


def _architecture(folder: str | Path) -> dict[str, Any]:
    """config.json without what says nothing about the network: versions, special tokens, data type on load."""
    config = read_config(folder)
    nothing: dict[str, Any] = {"bos_id": 0, "eos_id": 0, "pad_id": 0, "dtype": ""}
    if config.get("model_type") == "smollm3":
        return student_config(student_args(config, folder), max_position_embeddings=0, **nothing)
    return teacher_config(teacher_args(config, folder), **nothing)


def _samples(tensor: StoredTensor) -> Iterator[bytes]:
    middle = (tensor.start + tensor.stop) // 2
    with tensor.file.open("rb", buffering=0) as stream:
        for start in (tensor.start, middle, tensor.stop - _SAMPLE_BYTES):
            start = max(start, tensor.start)
            stream.seek(start)
            yield stream.read(min(_SAMPLE_BYTES, tensor.stop - start))

"""Streams safetensors into a model's parameters, sharded or whole; every rank reads only what it keeps.

Tensor by tensor, in the order of the files: a tensor of a hundred gigabytes of checkpoint is mapped, the rank's region
of it is copied into the parameter's memory, and the mapping is closed. Mapped pages count as resident memory, so a
mapping that stayed open would hold a second copy of all that was read. No collective is called: ranks may load at any
time, and one that holds an empty shard reads nothing.
"""

import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from itertools import product
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torchtitan.tools.logging import logger
from tqdm import tqdm

from mobilellm_pro.model.hugging_face import hugging_face_name, text_prefix
from mobilellm_pro.model.tensor_files import ITEM_BYTES, Ranges, Slices, StoredTensor, differences, stored_tensors

__all__ = ["Ranges", "Slices", "load_tensors"]

BLOCK_BYTES = 64 * 2**20
"""Most that is copied from one mapping."""

_QUIET_SECONDS = 2.0  # a load that takes no longer is not worth a line of the log

_Box = tuple[slice, ...]


class _Copy(NamedTuple):
    """A box of a stored tensor, and the same box of this rank's memory."""

    name: str
    stored: StoredTensor
    source: _Box
    target: Tensor


@torch.no_grad()
def load_tensors(
    model: nn.Module,
    folder: str | Path,
    *,
    slices: Mapping[str, Slices] | None = None,
    names: Collection[str] | None = None,
    show_progress: bool = False,
) -> None:
    """Fills the model's parameters from the folder's safetensors, converting to the parameters' data type.

    Host memory grows by the parameters themselves and by at most 64 MiB read from one tensor (up to that tensor's size
    where the rank's part of it lies scattered over its rows).

    Args:
        model: its parameters are tensors on any device or DTensors on any mesh, allocated already.
        folder: with safetensors of a text model, or of a multimodal one.
        slices: by our name, where a parameter (before FSDP) is a part of the full tensor: tensor, expert parallelism.
        names: fill only these parameters (our names); the others may be on the meta device.
        show_progress: a bar on rank 0 in a terminal, else a line in the log every 10 %.

    Raises:
        FileNotFoundError: there is no safetensors file, or one that the index names is missing.
        ValueError: a file is damaged; or all tensors that are missing, extra or wrongly shaped, one a line.
    """
    stored = stored_tensors(folder)
    problems = list(differences(model, folder, stored, slices=slices, names=names))
    if problems:
        raise ValueError("\n".join(problems))
    prefix = text_prefix(stored)
    copies: list[_Copy] = []
    for name, parameter in model.named_parameters():
        if names is None or name in names:
            full_name = hugging_face_name(name, prefix)
            copies += _copies(full_name, stored[full_name], parameter, (slices or {}).get(name, {}))
    copies.sort(key=lambda copy: (copy.stored.file, copy.stored.start))  # disks read on; a tensor's boxes stay in order
    with _progress(folder, sum(map(_num_bytes, copies)), show_progress) as advance:
        for copy in copies:
            # A mapping lives as long as the file is open, and so do the pages that were read.
            with safe_open(copy.stored.file, framework="pt") as file:
                copy.target.copy_(file.get_slice(copy.name)[copy.source])
            advance(_num_bytes(copy))


def _num_bytes(copy: _Copy) -> int:
    return copy.target.numel() * ITEM_BYTES[copy.stored.dtype]


def _copies(name: str, stored: StoredTensor, parameter: Tensor, slices: Slices) -> Iterator[_Copy]:
    """What fills this rank's part of a parameter, in blocks of bounded size."""
    local, offsets = _local_part(parameter)
    assert local.device.type != "meta", f"{name}: allocate the parameter (to_empty) before loading"
    if local.numel() == 0:
        return
    pieces = [
        list(_pieces(offset, offset + size, slices.get(dim, ((0, parameter.shape[dim]),))))
        for dim, (offset, size) in enumerate(zip(offsets, local.shape, strict=True))
    ]
    for box in product(*pieces):
        source, target = tuple(piece[0] for piece in box), tuple(piece[1] for piece in box)
        for part in _blocks([piece.stop - piece.start for piece in source], BLOCK_BYTES // ITEM_BYTES[stored.dtype]):
            yield _Copy(name, stored, _inside(source, part), local[_inside(target, part)])


def _local_part(parameter: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """This rank's memory of a parameter, without padding, and where it begins in the parameter."""
    if not isinstance(parameter, DTensor):
        return parameter, (0,) * parameter.ndim
    assert not any(placement.is_partial() for placement in parameter.placements)
    local = parameter.to_local()
    shape, offsets = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    assert tuple(local.shape) == shape or local.numel() == 0, f"{tuple(local.shape)} is not the shard {shape}"
    return local, offsets


def _pieces(start: int, stop: int, ranges: Ranges) -> Iterator[tuple[slice, slice]]:
    """Elements `start` to `stop` of the concatenated ranges: (where in the full dim, where counted from `start`)."""
    passed = 0
    for first, last in ranges:
        low, high = max(start, passed), min(stop, passed + last - first)
        if low < high:
            yield slice(first + low - passed, first + high - passed), slice(low - start, high - start)
        passed += last - first


def _blocks(shape: list[int], max_elements: int) -> Iterator[_Box]:
    """Cuts a box of this shape in halves, along its first dims, until no part has more elements than allowed."""

    def cut(box: _Box) -> Iterator[_Box]:
        sizes = [side.stop - side.start for side in box]
        if prod(sizes) <= max_elements:
            yield box
            return
        dim = next(dim for dim, size in enumerate(sizes) if size > 1)
        middle = box[dim].start + sizes[dim] // 2
        yield from cut((*box[:dim], slice(box[dim].start, middle), *box[dim + 1 :]))
        yield from cut((*box[:dim], slice(middle, box[dim].stop), *box[dim + 1 :]))

    return cut(tuple(slice(0, size) for size in shape))


def _inside(outer: _Box, inner: _Box) -> _Box:
    """A box counted from the corner of another, counted from where that is counted from."""
    return tuple(slice(o.start + i.start, o.start + i.stop) for o, i in zip(outer, inner, strict=True))


@contextmanager
def _progress(folder: str | Path, total: int, show: bool) -> Iterator[Callable[[int], None]]:
    """Yields what is told the bytes read; shows them in a terminal, else logs every tenth, on rank 0 only."""
    show = show and (not dist.is_initialized() or dist.get_rank() == 0)
    begun, done, told = time.monotonic(), 0, 0
    with tqdm(total=total, desc=Path(folder).name, unit="B", unit_scale=True, disable=None if show else True) as bar:

        def advance(num_bytes: int) -> None:
            nonlocal done, told
            bar.update(num_bytes)
            done += num_bytes
            tenth, seconds = 10 * done // total, time.monotonic() - begun
            if show and bar.disable and tenth > told and seconds > _QUIET_SECONDS:
                told = tenth
                speed = done / 1e6 / seconds
                logger.info(f"{folder}: {10 * tenth} % of {total / 1e9:.2f} GB loaded ({speed:.0f} MB/s)")

        yield advance

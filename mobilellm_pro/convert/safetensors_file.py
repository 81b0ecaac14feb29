"""A safetensors file written from front to back, a tensor at a time, with the bytes that the library would write.

The library's `save_file` wants all tensors at once. Shapes and types are known beforehand, so the header is too: eight
bytes of its length, JSON padded with spaces to a multiple of eight, then the tensors, wider types first, by name.
"""

import json
import math
import struct
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from mobilellm_pro.model.stored_parameters import ParameterKind

_NAMES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_ALIGNMENT = 8


def write_safetensors_file(path: Path, kinds: Mapping[str, ParameterKind], compute: Callable[[str], Tensor]) -> None:
    """Writes one file.

    Args:
        path: of the file; what is there is overwritten.
        kinds: name -> shape and type of every tensor, floating point.
        compute: name -> the tensor, of that shape and type; asked for one after another.

    Raises:
        ValueError: a type that is none of float64, float32, float16 and bfloat16.
    """
    names = sorted(kinds, key=lambda name: (-kinds[name].dtype.itemsize, name))
    with path.open("wb") as file:
        file.write(_header(names, kinds))
        for name in names:
            tensor = compute(name).detach().cpu().contiguous()
            assert (tuple(tensor.shape), tensor.dtype) == (kinds[name].shape, kinds[name].dtype), name
            file.write(tensor.flatten().view(torch.uint8).numpy().data)
            del tensor  # before the next one is computed


def _header(names: list[str], kinds: Mapping[str, ParameterKind]) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name in names:
        shape, dtype = kinds[name]
        if dtype not in _NAMES:
            raise ValueError(f"{name}: {dtype}; expected one of {', '.join(map(str, _NAMES))}")
        size = math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [position, position + size]}
        position += size
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return struct.pack("<Q", len(text)) + text

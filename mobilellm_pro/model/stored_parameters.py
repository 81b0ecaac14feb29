"""The parameters of a model in a DCP checkpoint, one in memory at a time, however many ranks wrote it."""

import math
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.planner import WriteItem


class ParameterKind(NamedTuple):
    """Shape and type of a parameter."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Of its values."""
        return math.prod(self.shape) * self.dtype.itemsize


class StoredParameters:
    """Tensors of a DCP folder `step-N`, read by name.

    The folder's metadata is read once; what an optimizer and a loader have left in it is not looked at.

    Args:
        folder: a complete checkpoint (`checkpoint_problems` says whether it is one, and of which model).
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._reader = FileSystemReader(str(folder))
        self._metadata = self._reader.read_metadata()
        self._reader.set_up_storage_reader(self._metadata, is_coordinator=True)

    def kind(self, name: str) -> ParameterKind:
        """Shape and type as stored.

        Raises:
            KeyError: there is no such tensor.
        """
        stored = self._metadata.state_dict_metadata[name]
        if not isinstance(stored, TensorStorageMetadata):
            raise KeyError(name)
        return ParameterKind(tuple(stored.size), stored.properties.dtype)

    def read(self, name: str) -> Tensor:
        """The whole tensor, on the CPU, put together from the parts that the ranks wrote; KeyError as `kind`."""
        kind = self.kind(name)
        tensor = torch.empty(kind.shape, dtype=kind.dtype)
        planner = DefaultLoadPlanner()
        planner.set_up_planner({name: tensor}, self._metadata, is_coordinator=True)
        plan = self._reader.prepare_local_plan(planner.create_local_plan())
        self._reader.read_data(planner.finish_plan(plan), planner).wait()
        return tensor


class _Computed(DefaultSavePlanner):
    """Saves tensors that do not exist before they are written."""

    def __init__(self, compute: Callable[[str], Tensor]) -> None:
        super().__init__()
        self._compute = compute

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        """The tensor that is written now."""
        return self._compute(write_item.index.fqn)


def write_parameters(folder: Path, kinds: Mapping[str, ParameterKind], compute: Callable[[str], Tensor]) -> None:
    """Writes a DCP checkpoint whose tensors are computed one at a time, as they are written.

    Args:
        folder: to write; nothing of it is complete before its `.metadata`, which is written last.
        kinds: name -> shape and type of every tensor.
        compute: name -> the tensor, of that shape and type, on the CPU.
    """
    whole = {name: torch.empty(kind.shape, dtype=kind.dtype, device="meta") for name, kind in kinds.items()}
    # torch keeps every tensor of a file until the file is closed: a file each, and one thread that writes them.
    writer = FileSystemWriter(str(folder), single_file_per_rank=False, thread_count=1)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")
        dcp.save(whole, storage_writer=writer, planner=_Computed(compute), no_dist=True)

"""How large the models are that phases have left, as they lie on the disk: checkpoints, folders, exported files."""

import math
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from mobilellm_pro.model.checkpoint import latest_checkpoint
from mobilellm_pro.model.tensor_files import stored_tensors
from mobilellm_pro.pipeline.phases import Phase

SMALLEST_SHARE = 0.01
"""Files of an export that are smaller than this share of its largest are no models."""

_OF_TRAINING = ("optimizer", "lr_scheduler", "dataloader", "train_state")
_TORCH_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I8": "int8", "U8": "uint8"}


def model_sizes(phase: Phase, output: Path) -> list[dict[str, Any]]:
    """The newest checkpoint of a phase, Hugging Face folders in it, and the files of an export.

    Args:
        phase: whatever it is.
        output: of the pipeline; paths are relative to it.

    Returns:
        for each: phase, what, path, parameters, dtypes (names), weight_bytes and disk_bytes: of a checkpoint with the
        optimizer, of a folder its safetensors. Parameters, dtypes and weights are None for exported files, whose format
        is theirs.

    Raises:
        ValueError: a checkpoint or a file of weights is damaged.
    """
    folder, found = phase.folder, []
    step = latest_checkpoint(folder / "checkpoint")
    if step is not None:
        found.append({"what": "checkpoint", "path": step, **_checkpoint_size(step)})
    for candidate in (folder, *sorted(path for path in folder.glob("*") if path.is_dir())):
        if (candidate / "config.json").is_file() and any(candidate.glob("*.safetensors")):
            found.append({"what": "Hugging Face", "path": candidate, **_folder_size(candidate)})
    if phase.kind == "export":
        found += _exported(folder)
    return [{"phase": phase.name, **size, "path": _relative(size["path"], output)} for size in found]


def _checkpoint_size(step: Path) -> dict[str, Any]:
    try:
        stored = FileSystemReader(str(step)).read_metadata().state_dict_metadata
    except Exception as error:  # a pickle: anything can come out of a damaged one
        raise ValueError(f"{step}/.metadata cannot be read ({error}); remove the folder") from None
    tensors = [
        (tensor.size.numel(), tensor.properties.dtype)
        for name, tensor in stored.items()
        if isinstance(tensor, TensorStorageMetadata) and name.partition(".")[0] not in _OF_TRAINING
    ]
    return {
        "parameters": sum(number for number, _ in tensors),
        "dtypes": sorted({_name(dtype) for _, dtype in tensors}),
        "weight_bytes": sum(number * dtype.itemsize for number, dtype in tensors),
        "disk_bytes": sum(path.stat().st_size for path in step.iterdir() if path.is_file()),
    }


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _folder_size(folder: Path) -> dict[str, Any]:
    tensors = stored_tensors(folder).values()
    return {
        "parameters": sum(math.prod(tensor.shape) for tensor in tensors),
        "dtypes": sorted({_TORCH_NAMES.get(tensor.dtype, tensor.dtype) for tensor in tensors}),
        "weight_bytes": sum(tensor.stop - tensor.start for tensor in tensors),
        "disk_bytes": sum(path.stat().st_size for path in folder.glob("*.safetensors")),
    }


def _exported(folder: Path) -> list[dict[str, Any]]:
    """Files that are large enough to be models, whatever their format; safetensors of a folder are counted there."""
    files = {path: path.stat().st_size for path in sorted(folder.rglob("*")) if path.is_file()}
    files = {path: size for path, size in files.items() if path.suffix != ".safetensors"}
    least = SMALLEST_SHARE * max(files.values(), default=0)
    nothing: dict[str, Any] = {"parameters": None, "dtypes": [], "weight_bytes": None}
    return [
        {"what": "exported file", "path": path, **nothing, "disk_bytes": size}
        for path, size in files.items()
        if size >= max(least, 1)
    ]


def _relative(path: Path, output: Path) -> str:
    return str(path.relative_to(output)) if path.is_relative_to(output) else str(path)

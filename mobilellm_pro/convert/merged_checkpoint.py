"""The average of several DCP checkpoints, as DCP and as a Hugging Face folder, with about one tensor in memory.

Nothing here holds a model: a parameter of each branch is read, added to the sum and forgotten, and the sum is written
before the next one is read.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torchtitan.config import TORCH_DTYPE_MAP

from mobilellm_pro.config import JobConfig
from mobilellm_pro.convert.conversion import write_computed_safetensors, write_description
from mobilellm_pro.merging.weighted_average import LayerGroups, weighted_average
from mobilellm_pro.model.checkpoint import LoadedModel
from mobilellm_pro.model.hugging_face import hugging_face_name
from mobilellm_pro.model.registry import model_on_meta
from mobilellm_pro.model.stored_parameters import ParameterKind, StoredParameters, write_parameters


class Branches:
    """The parameters of the models that are merged.

    Args:
        folders: DCP folders `step-N`, one a branch, of one architecture.
        names: of the parameters.
        memory_bytes: if all of them together are not larger, each is read from disk once and kept.
    """

    def __init__(self, folders: Sequence[Path], names: Sequence[str], memory_bytes: int = 0) -> None:
        self.names = list(names)
        self._stored = [StoredParameters(folder) for folder in folders]
        self.num_bytes = sum(stored.kind(name).num_bytes for stored in self._stored for name in self.names)
        self._kept: dict[tuple[int, str], Tensor] | None = {} if self.num_bytes <= memory_bytes else None

    def __len__(self) -> int:
        return len(self._stored)

    def read(self, branch: int, name: str) -> Tensor:
        """A parameter of a branch, on the CPU; it may be kept here, so it must not be changed."""
        if self._kept is None:
            return self._stored[branch].read(name)
        if (branch, name) not in self._kept:
            self._kept[branch, name] = self._stored[branch].read(name)
        return self._kept[branch, name]

    def average(self, name: str, weights: Sequence[float]) -> Tensor:
        """sum_b w_b theta_b of a parameter, in float32; branches of weight 0 are not read."""
        used = [(branch, float(weight)) for branch, weight in enumerate(weights) if weight != 0]
        return weighted_average((self.read(branch, name) for branch, _ in used), [weight for _, weight in used])


def write_merged(
    folder: Path, config: JobConfig, branches: Branches, weights: np.ndarray, groups: LayerGroups, dtype: str
) -> None:
    """Writes sum_b w_b theta_b as a DCP checkpoint, tensor by tensor.

    Args:
        folder: to write, empty or absent.
        config: of a run of the branches' architecture.
        branches: the models.
        weights: [groups, branches].
        groups: which row of the weights a parameter takes.
        dtype: "float32" or "bfloat16", of the written tensors; sums are float32.
    """
    kinds = _kinds(config, TORCH_DTYPE_MAP[dtype])
    write_parameters(
        folder, kinds, lambda name: branches.average(name, weights[groups.of(name)]).to(TORCH_DTYPE_MAP[dtype])
    )


def write_hugging_face_copy(folder: Path, config: JobConfig, step: Path, dtype: str) -> None:
    """What `convert` writes of a DCP checkpoint, tensor by tensor.

    Args:
        folder: to write, empty.
        config: of the run that the checkpoint is from.
        step: the DCP folder.
        dtype: "float32" or "bfloat16".
    """
    stored = StoredParameters(step)
    kinds = _kinds(config, TORCH_DTYPE_MAP[dtype])
    ours = {hugging_face_name(name): name for name in kinds}
    write_description(LoadedModel(model_on_meta(config), config.data.tokenizer, config.training.seq_len), folder, dtype)
    renamed = {theirs: kinds[name] for theirs, name in ours.items()}
    write_computed_safetensors(renamed, lambda name: stored.read(ours[name]).to(TORCH_DTYPE_MAP[dtype]), folder)


def _kinds(config: JobConfig, dtype: torch.dtype) -> dict[str, ParameterKind]:
    state = model_on_meta(config).state_dict()
    return {name: ParameterKind(tuple(tensor.shape), dtype) for name, tensor in state.items()}

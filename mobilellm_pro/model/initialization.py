"""Random initial weights that do not depend on the layout.

A sharded parameter cannot simply draw its own shard: on a CPU, DTensor has no offset random generator and every rank
would draw the same numbers. So each parameter draws its full tensor from a generator seeded by its name, and keeps its
shard. One rank and a thousand start from the same weights.
"""

import zlib
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor


@torch.no_grad()
def init_normal(named_parameters: Iterable[tuple[str, nn.Parameter]], std: float, num_layers: int) -> None:
    """Fills matrices from N(0, std²) truncated at 3 std, and norms with one.

    Matrices that write into the residual stream (`o_proj`, `down_proj`) get std / sqrt(2 · num_layers), so that the
    stream's variance at the start does not grow with depth (GPT-2's rule).
    """
    for wrapped_name, parameter in named_parameters:
        name = _plain_name(wrapped_name)
        if parameter.ndim < 2:
            parameter.fill_(1.0)
            continue
        scale = std / (2 * num_layers) ** 0.5 if "o_proj" in name or "down_proj" in name else std
        _fill(parameter, name, scale)


def _plain_name(name: str) -> str:
    """Without the path elements that activation checkpointing and torch.compile insert."""
    return name.replace("_checkpoint_wrapped_module.", "").replace("_orig_mod.", "")


def _fill(parameter: nn.Parameter, name: str, std: float) -> None:
    generator = torch.Generator(device=parameter.device)
    generator.manual_seed((torch.initial_seed() + zlib.crc32(name.encode())) % 2**63)
    full = torch.empty(parameter.shape, device=parameter.device, dtype=torch.float32)
    nn.init.trunc_normal_(full, std=std, a=-3 * std, b=3 * std, generator=generator)
    target: Tensor = parameter
    full = full.to(parameter.dtype)
    if isinstance(target, DTensor):
        full = distribute_tensor(full, target.device_mesh, target.placements, src_data_rank=None)
    target.copy_(full)

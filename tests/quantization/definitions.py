"""The paper's two equations in fp64, each in ten lines, with nothing of the implementation."""

import numpy as np
import torch
from torch import Tensor


def weights_by_definition(weight: Tensor, group: int, bits: int = 4) -> tuple[Tensor, Tensor]:
    """Eq. 4: integers [R, C] and the scales, which are stored as bfloat16, [R, C / group]."""
    w = weight.double().numpy().reshape(weight.shape[0], -1, group)
    exact = np.maximum(-w.min(-1), w.max(-1)) / ((2**bits - 1) / 2)
    scales = torch.from_numpy(exact).to(torch.bfloat16)
    s = scales.double().numpy()[..., None]
    with np.errstate(divide="ignore", invalid="ignore"):
        q = np.where(s > 0, np.clip(np.rint(w / s), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1), 0)
    return torch.from_numpy(q.reshape(weight.shape).astype(np.int8)), scales


def tokens_by_definition(x: Tensor, bits: int = 8) -> tuple[Tensor, Tensor]:
    """Eq. 3: integers and what they stand for, in x's type; the range is stored as fp32."""
    v = x.double().numpy()
    low, high = v.min(-1, keepdims=True), v.max(-1, keepdims=True)
    s = ((high - low) / (2**bits - 1)).astype(np.float32).astype(np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        q = np.where(s > 0, np.clip(np.rint((v - low) / s), 0, 2**bits - 1), 0)
    return torch.from_numpy(q.astype(np.uint8)), torch.from_numpy(s * q + low).to(x.dtype)

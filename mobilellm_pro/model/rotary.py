"""Rotary position embeddings of both models.

The student rotates the two halves of a head (Hugging Face's layout, stock SmolLM3); Llama 4 rotates interleaved pairs
in fp32 and stretches the slow frequencies (llama3 scaling). Angles are made from positions in every forward pass, once
for all layers: a model has no buffer that a checkpoint or a meta device could get wrong.

Shapes: B rows, S tokens, H heads, W head width.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class FrequencyScaling:
    """llama3 scaling: frequencies whose wavelength exceeds the original context are divided by `factor`.

    Between `original / high` and `original / low` tokens of wavelength the division is faded in. With low = high, as
    Scout has it, the fade has no width and the formula of the ramp is 0/0, so it is a hard threshold.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def apply(self, frequencies: Tensor) -> Tensor:
        """[W/2] -> [W/2], radians a token."""
        wavelengths = 2 * math.pi / frequencies
        longest = self.original_max_position_embeddings / self.low_freq_factor
        scaled = torch.where(wavelengths > longest, frequencies / self.factor, frequencies)
        if self.low_freq_factor == self.high_freq_factor:
            return scaled
        turns = self.original_max_position_embeddings / wavelengths
        blend = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        faded = (1 - blend) * frequencies / self.factor + blend * frequencies
        return torch.where((blend >= 0) & (blend <= 1), faded, scaled)


def angles(positions: Tensor, head_width: int, base: float, scaling: FrequencyScaling | None = None) -> Tensor:
    """Rotation of every pair: position · base^(-2i/W), [B, S] -> [B, S, W/2] in fp32 radians."""
    exponents = torch.arange(0, head_width, 2, device=positions.device, dtype=torch.float32) / head_width
    frequencies = 1.0 / base**exponents
    if scaling is not None:
        frequencies = scaling.apply(frequencies)
    return positions.unsqueeze(-1).float() * frequencies


def half_tables(rotation: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin for `rotate_halves`, [B, S, W/2] -> two of [B, 1, S, W]."""
    doubled = torch.cat((rotation, rotation), dim=-1).unsqueeze(1)
    return doubled.cos().to(dtype), doubled.sin().to(dtype)


def rotate_halves(x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    """Rotates (x_i, x_{i + W/2}); [B, H, S, W] -> [B, H, S, W]."""
    cos, sin = tables
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-second, first), dim=-1) * sin).type_as(x)


def pair_tables(rotation: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin for `rotate_pairs`, [B, S, W/2] -> two of [B, 1, S, W/2] in fp32."""
    return rotation.cos().unsqueeze(1), rotation.sin().unsqueeze(1)


def rotate_pairs(x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    """Rotates (x_{2i}, x_{2i+1}) in fp32; [B, H, S, W] -> [B, H, S, W]."""
    cos, sin = tables
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).type_as(x)

"""The frozen teacher's weights in FP8: half the memory of bfloat16, computed in the teacher's own data type.

Weights of the attention, of dense and shared feed-forward layers and of the experts become torchao's `Float8Tensor`:
e4m3 with one scale for each output channel. A product first restores its weight, so activations are not rounded.
The router, norms, embedding and head stay as they are: they are small, or decide which expert a token visits.
"""

import torch
from torch import nn

from mobilellm_pro.model.experts import Experts, MoE
from mobilellm_pro.model.teacher import TeacherLayer


class Float8Experts(Experts):
    """Experts whose weights are restored for each product, one matrix of all experts at a time."""

    def weight(self, name: str) -> torch.Tensor:
        """[L, in, out] in the data type that it had before."""
        return getattr(self, name).dequantize()


@torch.no_grad()
def quantize_layer(layer: TeacherLayer) -> None:
    """Replaces the weights of a loaded, unsharded layer.

    Raises:
        ModuleNotFoundError: torchao is not installed.
    """
    for name, module in layer.named_modules():
        if isinstance(module, nn.Linear) and not name.endswith("router"):
            module.weight = _float8(module.weight, input_dim=1)
    if isinstance(layer.feed_forward, MoE):
        plain = layer.feed_forward.experts
        num_experts, width, both_widths = plain.gate_up_proj.shape
        with torch.device("meta"):
            experts = Float8Experts(num_experts, width, both_widths // 2)
        for name, weight in plain.named_parameters():
            setattr(experts, name, _float8(weight, input_dim=1))
        layer.feed_forward.experts = experts


def _float8(weight: torch.Tensor, input_dim: int) -> nn.Parameter:
    """A scale for each index of the other dims: those sum over `input_dim` only."""
    from torchao.quantization import Float8Tensor, PerRow

    quantized = Float8Tensor.from_hp(weight.detach(), torch.float8_e4m3fn, PerRow(dim=input_dim))
    return nn.Parameter(quantized, requires_grad=False)

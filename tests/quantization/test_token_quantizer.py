"""Activations: equal to the definition to the bit; how far the integer kernels' ranges are from it."""

import torch
from torch import Tensor

from mobilellm_pro.quantization.token_quantizer import dequantize_tokens, fake_quantize_tokens, quantize_tokens
from tests.quantization.definitions import tokens_by_definition


def drawn(seed: int) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    width = (1, 3, 24, 96)[seed % 4]
    x = torch.randn(2, 3, width, generator=draw) * 10.0 ** int(torch.randint(-40, 37, (), generator=draw))
    if seed % 6 == 0:
        x[0] = 0
    elif seed % 6 == 1:
        x[:] = x[0, 0, 0]
    elif seed % 6 == 2:
        x = torch.randint(-127, 129, x.shape, generator=draw) * 0.5  # ties
    elif seed % 6 == 3:
        x = x.abs() + x.abs().amax()  # zero is not in the range
    return x.to(torch.bfloat16) if seed % 5 == 0 else x


def test_equal_to_the_definition_to_the_bit() -> None:
    for seed in range(1000):
        x = drawn(seed)
        integers, values = tokens_by_definition(x)
        assert torch.equal(quantize_tokens(x)[0], integers), seed
        assert torch.equal(fake_quantize_tokens(x), values), seed
        assert torch.equal(dequantize_tokens(*quantize_tokens(x), x.dtype), values), seed


def test_the_gradient_passes_straight_through() -> None:
    x = torch.randn(4, 8, requires_grad=True)
    gradient = torch.randn(4, 8)
    fake_quantize_tokens(x).backward(gradient)
    assert torch.equal(x.grad, gradient)


def test_an_integer_zero_point_costs_a_step_at_most_where_zero_is_in_the_range() -> None:
    x = torch.randn(64, 96)
    step = (x.amax(-1, keepdim=True) - x.amin(-1, keepdim=True)) / 255
    exact, integer = (fake_quantize_tokens(x, zero_point=kind) for kind in ("exact", "integer"))
    assert ((exact - integer).abs() <= step * 1.001).all() and not torch.equal(exact, integer)
    assert torch.equal(fake_quantize_tokens(torch.zeros(2, 4), zero_point="integer"), torch.zeros(2, 4))
    shifted = torch.randn(64, 96) + 100
    wide = fake_quantize_tokens(shifted, zero_point="integer")
    assert (wide - shifted).abs().max() > (fake_quantize_tokens(shifted) - shifted).abs().max() * 5


def test_not_a_number_stays_one() -> None:
    assert fake_quantize_tokens(torch.tensor([[1.0, torch.nan]])).isnan().all()

"""Weights: equal to the definition to the bit, and to torchao's where both mean the same; what is refused."""

import pytest
import torch
from torch import Tensor
from torchao.quantization.granularity import PerAxis, PerGroup
from torchao.quantization.qat import IntxFakeQuantizeConfig
from torchao.quantization.qat.fake_quantizer import IntxFakeQuantizer
from torchao.quantization.quant_primitives import MappingType, choose_qparams_affine, quantize_affine

from mobilellm_pro.quantization.packed_int4 import pack, unpack
from mobilellm_pro.quantization.scheme import SCHEMES, WeightScheme
from mobilellm_pro.quantization.weight_quantizer import (
    choose_scales,
    dequantize,
    fake_quantize,
    fake_quantize_learned,
    quantize,
    refuse_non_finite,
    stored_scales,
)
from tests.quantization.definitions import weights_by_definition

SCHEME = WeightScheme()


def drawn(seed: int) -> tuple[Tensor, int]:
    """Weights of some shape, type, size and oddity, and a group."""
    draw = torch.Generator().manual_seed(seed)
    group = (1, 2, 32, 64)[seed % 4]
    rows, width = int(torch.randint(1, 6, (), generator=draw)), group * int(torch.randint(1, 5, (), generator=draw))
    weight = torch.randn(rows, width, generator=draw) * 10.0 ** int(torch.randint(-44, 38, (), generator=draw))
    oddity = seed % 7
    if oddity == 0:
        weight[0] = 0
    elif oddity == 1:
        weight[:] = weight[0, 0]
    elif oddity == 2:  # on a grid whose ties are many
        weight = torch.randint(-15, 16, weight.shape, generator=draw) * 0.25
    elif oddity == 3:  # next to ties
        weight = torch.randint(-15, 16, weight.shape, generator=draw) * 0.5
        weight = torch.nextafter(weight, torch.full_like(weight, float(torch.randn((), generator=draw))))
    return (weight.to(torch.bfloat16) if seed % 5 == 0 else weight), group


def test_equal_to_the_definition_to_the_bit() -> None:
    for seed in range(1000):
        weight, group = drawn(seed)
        scheme = WeightScheme(group=group)
        integers, scales = weights_by_definition(weight, group)
        ours = choose_scales(weight, scheme)
        assert torch.equal(ours, scales), seed
        assert torch.equal(quantize(weight, ours, scheme), integers), seed
        exact = (integers.double().unflatten(1, (-1, group)) * scales.double().unsqueeze(-1)).flatten(1)
        assert torch.equal(fake_quantize(weight, scheme), exact.to(weight.dtype)), seed


@pytest.mark.parametrize("scheme", [scheme.weights for scheme in SCHEMES.values()], ids=list(SCHEMES))
def test_what_is_packed_is_what_was_trained(scheme: WeightScheme) -> None:
    for seed in range(1000):
        draw = torch.Generator().manual_seed(seed)
        weight = torch.randn(4, 64, generator=draw)
        scales = choose_scales(weight, scheme)
        if scheme.learned:
            scales = stored_scales(scales.float() * torch.empty(scales.shape).uniform_(0.3, 1.5, generator=draw))
            trained = fake_quantize_learned(weight, scales.float(), scheme)
        else:
            trained = fake_quantize(weight, scheme)
        assert torch.equal(dequantize(unpack(pack(quantize(weight, scales, scheme))), scales), trained)


def test_the_gradient_passes_straight_through() -> None:
    weight = torch.randn(3, 64, requires_grad=True)
    gradient = torch.randn(3, 64)
    fake_quantize(weight, SCHEME).backward(gradient)
    assert torch.equal(weight.grad, gradient)


@pytest.mark.parametrize("group", [None, 32])
def test_values_and_gradients_of_learned_ranges_are_torchaos(group: int | None) -> None:
    """With scales that bfloat16 holds: torchao keeps them in fp32."""
    weight = torch.randn(8, 64)
    scheme = WeightScheme(group=group, learned=True)
    scales = (choose_scales(weight, scheme).float() * 0.6).to(torch.bfloat16).float()  # so that some are clipped
    granularity = PerAxis(0) if group is None else PerGroup(group)
    config = IntxFakeQuantizeConfig(torch.int4, granularity, is_dynamic=False, range_learning=True)
    theirs = IntxFakeQuantizer(config)
    theirs.scale, theirs.zero_point = torch.nn.Parameter(scales.clone()), torch.zeros_like(scales)
    w1, w2 = (weight.clone().requires_grad_() for _ in range(2))
    s = scales.clone().requires_grad_()
    gradient = torch.randn_like(weight)
    expected, ours = theirs(w1), fake_quantize_learned(w2, s, scheme)
    expected.backward(gradient)
    ours.backward(gradient)
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(w2.grad, w1.grad)
    torch.testing.assert_close(s.grad, theirs.scale.grad, rtol=1e-4, atol=1e-5)


def test_computed_ranges_are_torchaos_symmetric_mapping() -> None:
    weight = torch.randn(16, 128)
    scales = choose_scales(weight, SCHEME)
    settings = {"target_dtype": torch.int8, "quant_min": -8, "quant_max": 7}
    theirs, zero_points = choose_qparams_affine(
        weight, MappingType.SYMMETRIC, (1, 32), scale_dtype=torch.bfloat16, **settings
    )
    assert torch.equal(theirs, scales) and not zero_points.any()
    wide = quantize_affine(
        weight,
        (1, 32),
        scales.float(),
        zero_points,
        settings["target_dtype"],
        settings["quant_min"],
        settings["quant_max"],
    )
    assert torch.equal(wide, quantize(weight, scales, SCHEME))


def test_torchaos_training_with_bfloat16_scales_differs_near_ties() -> None:
    """It multiplies by the reciprocal, rounded to bfloat16; ours divides exactly."""
    weight = torch.randn(64, 128)
    theirs = IntxFakeQuantizer(IntxFakeQuantizeConfig(torch.int4, PerGroup(32), scale_precision=torch.bfloat16))
    steps = choose_scales(weight, SCHEME).float().repeat_interleave(32, 1)
    difference = (fake_quantize(weight, SCHEME) - theirs(weight)) / steps
    assert 0 < (difference.abs() > 0.5).float().mean() < 0.02 and difference.abs().max() < 1.01


def test_learned_scales_stay_positive() -> None:
    assert (stored_scales(torch.tensor([-1.0, 0.0, 1e-45])) > 0).all()


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match=r"layers\.3\.mlp: rows of 48 weights do not divide into groups of 32"):
        choose_scales(torch.ones(2, 48), SCHEME, "layers.3.mlp")
    for bad in (torch.nan, torch.inf, -torch.inf):
        with pytest.raises(ValueError, match=r"norm: 1 of 4 numbers are NaN or infinite, the first at \[1, 0\]"):
            refuse_non_finite("norm", torch.tensor([[1.0, 2.0], [bad, 0.0]]))
    with pytest.raises(ValueError, match="four bits hold -8 to 7"):
        pack(torch.tensor([[8, 0]], dtype=torch.int8))
    with pytest.raises(ValueError, match="rows of 3 integers"):
        pack(torch.zeros(1, 3, dtype=torch.int8))
    with pytest.raises(ValueError, match="weights of 9 bits"):
        WeightScheme(bits=9)
    with pytest.raises(ValueError, match="groups of 0"):
        WeightScheme(group=0)

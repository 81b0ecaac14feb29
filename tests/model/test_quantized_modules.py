"""Quantized modules: the arithmetic of the stored model, one table for lookup and head, equal on split columns."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from mobilellm_pro.model import quantized_modules
from mobilellm_pro.model.parallelize import _apply_tensor_parallel
from mobilellm_pro.model.quantized_modules import StudentQuantization, is_range, quantize_modules
from mobilellm_pro.model.student import FLAVORS, Student
from mobilellm_pro.quantization.quantized_weight import quantize_weight
from mobilellm_pro.quantization.scheme import SCHEMES
from tests.ranks import run_ranks

ARGS = replace(FLAVORS["debug"], head_dim=32, vocab_size=80, num_hidden_layers=2, global_layers=(0,), sliding_window=8)
TOKENS = torch.arange(24).view(2, 12)


def drawn() -> Student:
    torch.manual_seed(5)
    student = Student(ARGS)
    student.init_weights()
    return student


def gradients(student: Student) -> tuple[Tensor, dict[str, Tensor]]:
    """A loss and its gradients, whole."""

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        if isinstance(hidden, DTensor):
            hidden, weight = hidden.full_tensor(), weight.full_tensor()
        return torch.nn.functional.linear(hidden, weight).logsumexp(-1).mean()

    value = student(TOKENS, head=loss)
    value.backward()
    found = {name: parameter.grad for name, parameter in student.named_parameters()}
    return value.detach(), {k: g.full_tensor() if isinstance(g, DTensor) else g for k, g in found.items()}


def on_two_ranks(scheme: str) -> tuple[float, dict[str, list[list[float]]]]:
    student = drawn()
    quantize_modules(student, StudentQuantization(scheme))
    _apply_tensor_parallel(student, init_device_mesh("cpu", (2,), mesh_dim_names=("tp",)))
    value, found = gradients(student)
    return float(value), {name: gradient.tolist() for name, gradient in found.items()}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_split_columns_and_rows_equal_whole_ones(scheme: str) -> None:
    student = drawn()
    quantize_modules(student, StudentQuantization(scheme))
    value, wanted = gradients(student)
    assert any(is_range(name) for name in wanted) == (scheme == "accelerator")
    for theirs, found in run_ranks(on_two_ranks, 2, scheme):
        assert theirs == pytest.approx(float(value), abs=1e-5)
        for name, gradient in wanted.items():
            largest = gradient.abs().max()
            torch.testing.assert_close(
                torch.tensor(found[name]) / largest, gradient / largest, atol=2e-2, rtol=0, msg=name
            )


@pytest.mark.parametrize("scheme", SCHEMES)
def test_computes_with_what_is_stored(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same numbers from a student whose weights are the stored integers times their scales."""
    quantized, stored = drawn(), drawn()
    quantize_modules(quantized, StudentQuantization(scheme))
    weights = SCHEMES[scheme].weights
    with torch.no_grad():
        for name, parameter in stored.named_parameters():
            if parameter.ndim == 2:
                scales = dict(quantized.named_parameters()).get(name.replace("weight", "weight_scales"))
                parameter.copy_(quantize_weight(name, parameter, weights, scales).dequantize())
    ours = quantized(TOKENS)
    quantize_modules(stored, StudentQuantization(scheme))  # for activations and cache; its weights are rounded already
    monkeypatch.setattr(quantized_modules, "_as_stored", lambda weight, *rest: weight)
    assert torch.equal(ours, stored(TOKENS))
    monkeypatch.undo()
    assert (quantized(TOKENS) - drawn()(TOKENS)).abs().max() > 1e-3


def test_the_shared_table_is_quantized_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    plain = quantized_modules.fake_quantize

    def spy(weight: Tensor, *rest: object) -> Tensor:
        made.append(weight.shape[0])
        return plain(weight, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(quantized_modules, "fake_quantize", spy)
    student = drawn()
    quantize_modules(student, StudentQuantization("cpu"))
    seen: list[Tensor] = []
    student(TOKENS, head=lambda hidden, weight: seen.append(weight))
    assert made.count(ARGS.vocab_size) == 1 and student.embed_tokens._table is None
    assert (seen[0].detach() != student.embed_tokens.weight).any()


def test_two_tables_have_their_own_ranges() -> None:
    student = drawn()
    quantize_modules(student, StudentQuantization("accelerator"))
    with torch.no_grad():
        before = student(TOKENS)
        student.embed_tokens.head_scales *= 0.5
        assert not torch.equal(student(TOKENS), before)


def test_mixed_precision_rounds_weights_first() -> None:
    student, half = drawn(), drawn()
    half.to(torch.bfloat16).float()
    for model in (student, half):
        quantize_modules(model, StudentQuantization("cpu", param_dtype=torch.bfloat16))
    assert torch.equal(student(TOKENS), half(TOKENS)), "in fp32, with the weights of bfloat16"
    table = student.embed_tokens(TOKENS)
    assert table.dtype == torch.float32 and torch.equal(table.to(torch.bfloat16).float(), table)


def test_what_cannot_be_quantized_is_named() -> None:
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.o_proj: rows of 40 weights"):
        quantize_modules(Student(replace(ARGS, head_dim=10)), StudentQuantization("cpu"))
    student = drawn()
    quantize_modules(student, StudentQuantization("cpu"))
    with pytest.raises(ValueError, match="quantized already"):
        quantize_modules(student, StudentQuantization("cpu"))

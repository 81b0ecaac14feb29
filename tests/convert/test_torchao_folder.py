"""Stock transformers and torchao load what is written, with our integers and scales, and compute the same."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torchao.quantization import Int8DynamicActivationIntxWeightConfig, IntxUnpackedToInt8Tensor, IntxWeightOnlyConfig
from transformers import AutoModelForCausalLM

from mobilellm_pro.convert.export_sizes import torchao_bytes
from mobilellm_pro.convert.quantized_model import QuantizedModel, quantize_student
from mobilellm_pro.convert.torchao_folder import check_torchao, write_torchao
from mobilellm_pro.convert.unpacked_student import unpacked_student
from mobilellm_pro.quantization.quantized_weight import QuantizedWeight
from mobilellm_pro.quantization.scheme import SCHEMES
from tests.convert.quantized_students import ARGS, TOKENIZER, full_student, quantized_student, tokens


def model_of(scheme: str, trained: bool = True) -> QuantizedModel:
    return quantize_student(quantized_student(scheme) if trained else full_student(), scheme, TOKENIZER, 128)


def parts(tensor: Tensor) -> tuple[Tensor, Tensor]:
    assert isinstance(tensor, IntxUnpackedToInt8Tensor) and not tensor.zero_point.any()
    return tensor.qdata, tensor.scale


@pytest.mark.parametrize("scheme", SCHEMES)
def test_integers_and_scales_are_ours(scheme: str, tmp_path: Path) -> None:
    model = model_of(scheme)
    write_torchao(model, tmp_path / "torchao")
    theirs, report = AutoModelForCausalLM.from_pretrained(tmp_path / "torchao", output_loading_info=True)
    assert not any(report.values()), report
    for name, weight in model.weights.items():
        parent = theirs if name == "lm_head.weight" else theirs.model
        assert all(map(torch.equal, parts(parent.get_parameter(name)), weight))
        assert torch.equal(parent.get_parameter(name).dequantize(), weight.dequantize(theirs.dtype))
    assert all(torch.equal(theirs.model.get_parameter(n), norm.to(theirs.dtype)) for n, norm in model.norms.items())
    shared = theirs.lm_head.weight is theirs.model.embed_tokens.weight
    assert shared is model.scheme.shared_table is theirs.config.tie_word_embeddings
    assert theirs.dtype is (torch.float32 if scheme == "cpu" else torch.bfloat16)
    kind = theirs.config.quantization_config.quant_type
    assert isinstance(kind, Int8DynamicActivationIntxWeightConfig if scheme == "cpu" else IntxWeightOnlyConfig)


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "rounded"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_logits(scheme: str, trained: bool, tmp_path: Path) -> None:
    """In float32 the same as ours, with torchao's rounding of activations; under training's, off by a small part."""
    model = model_of(scheme, trained)
    write_torchao(model, tmp_path / "torchao", dtype="float32")
    measured = check_torchao(tmp_path / "torchao", model, tokens())
    assert measured.logits > 0.3
    if scheme == "cpu":
        # Commonly 0; an activation between two integers may go another way, and moves all tokens after it.
        assert measured.arithmetic < 0.5 * measured.training
        # Off by what the zero point and the cache do, which is far less than rounding weights does.
        full = full_student()(tokens())
        by_rounding = (unpacked_student(model)(tokens()) - full).square().mean().sqrt()
        assert 1e-3 * measured.logits < measured.training < 0.2 * by_rounding
        assert measured.same_tokens > 0.9
    else:
        assert measured.training == measured.arithmetic < 1e-5 * measured.logits


def test_bfloat16_is_as_near_to_the_truth_as_ours(tmp_path: Path) -> None:
    model = model_of("accelerator")
    write_torchao(model, tmp_path / "torchao")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "torchao").eval()
    truth, ours = unpacked_student(model, dtype="float32")(tokens()), unpacked_student(model)(tokens())
    with torch.no_grad():
        errors = [(logits.float() - truth).square().mean().sqrt() for logits in (theirs(tokens()).logits, ours)]
    assert errors[0] <= 1.1 * errors[1] and errors[1] < 0.02 * truth.square().mean().sqrt()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_bytes_are_those_of_the_arithmetic(scheme: str, tmp_path: Path) -> None:
    write_torchao(model_of(scheme), tmp_path / "torchao")
    tensors = load_file(tmp_path / "torchao/model.safetensors")
    assert sum(tensor.nbytes for tensor in tensors.values()) == torchao_bytes(ARGS, SCHEMES[scheme]).total


def test_other_numbers_are_noticed(tmp_path: Path) -> None:
    model, name = model_of("cpu"), "layers.1.mlp.up_proj.weight"
    write_torchao(model, tmp_path / "torchao")
    integers, scales = model.weights[name]
    other = QuantizedWeight(integers.clone(), scales)
    other.integers[3, 5] ^= 1
    with pytest.raises(ValueError, match=f"transformers has another qdata of {name}"):
        check_torchao(tmp_path / "torchao", replace(model, weights={**model.weights, name: other}), tokens())
    norms = {**model.norms, "norm.weight": model.norms["norm.weight"] * 1.01}
    with pytest.raises(ValueError, match=r"transformers has another norm\.weight"):
        check_torchao(tmp_path / "torchao", replace(model, norms=norms), tokens())


def test_what_torchao_cannot_express(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("cpu")
    with pytest.raises(ValueError, match="activations of 4 bits; torchao's tensors know 8"):
        write_torchao(replace(model, scheme=replace(model.scheme, activation_bits=4)), tmp_path / "torchao")
    monkeypatch.setattr("mobilellm_pro.convert.torchao_folder.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"torchao not installed; pip install 'mobilellm-pro\[export,hf\]'"):
        write_torchao(model, tmp_path / "torchao")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_there(tmp_path: Path) -> None:
    write_torchao(model_of("cpu"), tmp_path / "torchao")
    with pytest.raises(ValueError, match="exists already"):
        write_torchao(model_of("accelerator"), tmp_path / "torchao")
    write_torchao(model_of("accelerator"), tmp_path / "torchao", overwrite=True)
    assert json.loads((tmp_path / "torchao/config.json").read_text())["tie_word_embeddings"] is False

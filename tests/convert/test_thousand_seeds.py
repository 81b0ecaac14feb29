"""What was trained is what ships, element for element in every format, for rows of weights of thousands of seeds."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from mobilellm_pro.convert.executorch_export import decoder_of
from mobilellm_pro.convert.executorch_lowering import write_program
from mobilellm_pro.convert.executorch_runtime import DATA_FILE
from mobilellm_pro.convert.packed_folder import read_packed, write_packed
from mobilellm_pro.convert.quantized_model import QuantizedModel, quantize_student
from mobilellm_pro.convert.torchao_folder import write_torchao
from mobilellm_pro.model.quantized_modules import StudentQuantization, is_range, quantize_modules
from mobilellm_pro.model.student import Student
from mobilellm_pro.quantization.scheme import SCHEMES
from tests.convert.quantized_students import ARGS as DEEPER
from tests.convert.quantized_students import TOKENIZER, full_student, multiplied_by, xnnpack_parts

SEEDS = 1000
ARGS = replace(DEEPER, num_hidden_layers=1, intermediate_size=512, global_layers=(0,))
"""Enough rows in one layer: each layer more takes ExecuTorch half a minute."""


def row_of(seed: int, width: int) -> Tensor:
    """Weights of any size, some of them odd."""
    draw = torch.Generator().manual_seed(seed)
    row = torch.randn(width, generator=draw) * 10.0 ** int(torch.randint(-30, 30, (), generator=draw))
    match seed % 8:
        case 0:
            row[:32] = 0
        case 1:
            row[:] = row[0]
        case 2:  # on a grid whose ties are many
            row = torch.randint(-15, 16, (width,), generator=draw) * 0.25
        case 3:  # next to ties
            row = torch.randint(-15, 16, (width,), generator=draw) * 0.5
            row = torch.nextafter(row, torch.full_like(row, float(torch.randn((), generator=draw))))
    return row


@torch.no_grad()
def prepared(scheme: str, learned: bool) -> Student:
    """As training leaves a student, a seed for each row of weights: over SEEDS in linear layers and in the table."""
    student, seed = full_student(args=ARGS), 0
    matrices = {name: parameter for name, parameter in student.named_parameters() if parameter.ndim == 2}
    for matrix in matrices.values():
        for row in matrix:
            row.copy_(row_of(seed := seed + 1, len(row)))
    rows_of_table = len(matrices["embed_tokens.weight"])
    assert min(rows_of_table, seed - rows_of_table) >= SEEDS
    dtype = torch.float32 if scheme == "cpu" else torch.bfloat16
    quantize_modules(student, StudentQuantization(scheme, learned, param_dtype=dtype))
    draw = torch.Generator().manual_seed(0)
    ranges = [parameter for name, parameter in student.named_parameters() if is_range(name)]
    for scales in ranges:
        scales.mul_(torch.empty_like(scales).uniform_(0.3, 1.5, generator=draw))
    assert (sum(map(len, ranges)) >= SEEDS) is learned
    return student.requires_grad_(False).eval()


Case = tuple[QuantizedModel, dict[str, Tensor]]


@pytest.fixture(scope="module", params=[(scheme, learned) for scheme in SCHEMES for learned in (False, True)], ids=str)
def case(request: pytest.FixtureRequest) -> Case:
    """The quantized model, and by name what training multiplied by."""
    scheme, learned = request.param
    student = prepared(scheme, learned)
    return quantize_student(student, scheme, TOKENIZER, 128), multiplied_by(student)


def count_differing(weights: dict[str, Tensor], trained: dict[str, Tensor]) -> int:
    assert weights.keys() == trained.keys()
    return sum(int((weights[name] != trained[name]).sum()) for name in trained)


def test_packed(case: Case, tmp_path: Path) -> None:
    model, trained = case
    write_packed(model, tmp_path / "packed")
    read = read_packed(tmp_path / "packed").weights
    dtype = trained["embed_tokens.weight"].dtype
    assert count_differing({name: weight.dequantize(dtype) for name, weight in read.items()}, trained) == 0


def test_torchao(case: Case, tmp_path: Path) -> None:
    model, trained = case
    write_torchao(model, tmp_path / "torchao")
    theirs = dict(AutoModelForCausalLM.from_pretrained(tmp_path / "torchao").named_parameters(remove_duplicate=False))
    head = theirs.pop("lm_head.weight").dequantize()
    restored = {name.removeprefix("model."): tensor for name, tensor in theirs.items() if tensor.ndim == 2}
    restored = {name: tensor.dequantize() for name, tensor in restored.items()}
    if model.scheme.shared_table:
        assert torch.equal(head, restored["embed_tokens.weight"])
    else:
        restored["lm_head.weight"] = head
    assert count_differing(restored, trained) == 0


@pytest.mark.parametrize("case", [("cpu", False), ("cpu", True)], ids=str, indirect=True)
def test_executorch(case: Case, tmp_path: Path) -> None:
    """The bytes of all integers and scales lie in the file, once each: of the one scheme that it has kernels for."""
    model, trained = case
    write_program(decoder_of(model, 64), tmp_path)
    data = (tmp_path / DATA_FILE).read_bytes()
    for name, weight in model.weights.items():
        assert [data.count(part) for part in xnnpack_parts(name, weight)] == [1, 1], name
    assert count_differing({name: weight.dequantize() for name, weight in model.weights.items()}, trained) == 0

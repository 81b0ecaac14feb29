"""What trains is what ships: integers and scales of a packed folder are those of the student, and so are its logits."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from mobilellm_pro.convert.export_sizes import packed_bytes, plain_bytes
from mobilellm_pro.convert.packed_folder import load_packed_student, read_packed, write_packed
from mobilellm_pro.convert.quantized_model import QuantizedModel, quantize_student
from mobilellm_pro.convert.unpacked_student import unpacked_student
from mobilellm_pro.data.tokenizer import Tokenizer
from mobilellm_pro.model.generation import continue_tokens
from mobilellm_pro.model.quantized_modules import StudentQuantization, quantize_modules
from mobilellm_pro.model.student import FLAVORS
from mobilellm_pro.quantization.quantized_weight import QuantizedWeight
from mobilellm_pro.quantization.scheme import SCHEMES, Scheme, WeightScheme
from tests.convert.quantized_students import ARGS, TOKENIZER, full_student, multiplied_by, quantized_student, tokens

Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


def packed(folder: Path, scheme: str = "accelerator") -> Path:
    write_packed(quantize_student(quantized_student(scheme), scheme, TOKENIZER, 128), folder)
    return folder


def numbers(model: QuantizedModel) -> Iterator[Tensor]:
    for weight in model.weights.values():
        yield from weight
    yield from model.norms.values()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_what_trains_is_what_ships(scheme: str, dtype: torch.dtype, tmp_path: Path) -> None:
    student = quantized_student(scheme, dtype=dtype)
    model = quantize_student(student, scheme, TOKENIZER, 128)
    write_packed(model, tmp_path / "packed")
    read = read_packed(tmp_path / "packed")
    assert read.weights.keys() == model.weights.keys() and read.norms.keys() == model.norms.keys()
    assert all(map(torch.equal, numbers(read), numbers(model)))
    assert (read.args, read.scheme, read.scheme_name, read.trained) == (ARGS, SCHEMES[scheme], scheme, True)
    multiplied = multiplied_by(student)
    assert multiplied.keys() == read.weights.keys()
    assert all(torch.equal(weight.dequantize(dtype), multiplied[name]) for name, weight in read.weights.items())
    loaded = load_packed_student(tmp_path / "packed", dtype=str(dtype).removeprefix("torch."))
    assert torch.equal(loaded.model(tokens()), student.to(dtype)(tokens()))
    assert (loaded.tokenizer, loaded.max_tokens) == (str(tmp_path / "packed/tokenizer.model"), 128)


@pytest.mark.parametrize(("scheme", "learned"), [("cpu", True), ("accelerator", False)])
def test_ranges_of_the_other_kind(scheme: str, learned: bool, tmp_path: Path) -> None:
    student = quantized_student(scheme, learned_ranges=learned)
    write_packed(quantize_student(student, scheme, TOKENIZER, 128), tmp_path / "packed")
    read = read_packed(tmp_path / "packed")
    assert read.scheme.weights.learned is learned
    assert torch.equal(unpacked_student(read, dtype="float32")(tokens()), student(tokens()))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_generation_from_an_int8_cache(scheme: str) -> None:
    student = quantized_student(scheme)
    model = unpacked_student(quantize_student(student, scheme, TOKENIZER, 128), dtype="float32")
    prompt = tokens(30)
    assert torch.equal(continue_tokens(model, prompt, 10), continue_tokens(student, prompt, 10))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_full_precision_is_rounded_to_nearest(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of rows give what a whole weight gives, and computed ranges what quantized modules begin with."""
    monkeypatch.setattr("mobilellm_pro.convert.quantized_model._BLOCK_WEIGHTS", 1000)
    student = full_student()
    model = quantize_student(student, scheme, TOKENIZER, 128)
    quantize_modules(student, StudentQuantization(scheme))
    assert not model.trained
    assert torch.equal(unpacked_student(model, dtype="float32")(tokens()), student(tokens()))
    whole = quantize_student(student, scheme, TOKENIZER, 128)
    assert whole.trained and all(map(torch.equal, numbers(model), numbers(whole)))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_bytes_are_those_of_the_arithmetic(scheme: str, tmp_path: Path) -> None:
    file = packed(tmp_path / "packed", scheme) / "model.safetensors"
    header = int.from_bytes(file.read_bytes()[:8], "little") + 8
    assert file.stat().st_size - header == packed_bytes(ARGS, SCHEMES[scheme]).total


def test_bytes_of_the_1b() -> None:
    args, rows = FLAVORS["1b"], WeightScheme(group=None)
    accelerator = packed_bytes(args, SCHEMES["accelerator"])
    sizes = [
        plain_bytes(args, torch.bfloat16).total,
        packed_bytes(args, SCHEMES["cpu"]).weights,
        accelerator.weights,
        packed_bytes(args, SCHEMES["cpu"]).total,
        accelerator.total - accelerator.norms // 2,  # counted there with norms in bfloat16
    ]
    assert [round(size / 1e6, 1) for size in sizes] == [2168.9, 542.2, 671.5, 610.3, 673.5]
    assert round(packed_bytes(args, SCHEMES["cpu"], table=rows).total / 1e6) == 594 + 1


def test_the_folder_is_like_hugging_faces(tmp_path: Path) -> None:
    folder = packed(tmp_path / "packed")
    text = "The river keeps the garden 7."
    assert AutoTokenizer.from_pretrained(folder)(text)["input_ids"] == Tokenizer.load(TOKENIZER).encode(text, bos=True)
    config = json.loads((folder / "config.json").read_text())
    assert config["tie_word_embeddings"] is False and config["vocab_size"] == 4096
    assert config["quantization_config"]["weights"] == {"bits": 4, "group": None, "learned": True}
    with pytest.raises(ValueError, match="mobilellm_pro_int4"):  # a method that it does not know it only warns of
        AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(ValueError, match="exists already"):
        packed(folder)
    assert not list(tmp_path.glob(".*"))


def damaged(folder: Path, name: str, tensor: Tensor | None) -> Path:
    tensors = load_file(folder / "model.safetensors")
    tensors.pop(name, None)
    save_file(tensors | ({} if tensor is None else {name: tensor}), folder / "model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("name", "tensor", "said"),
    [
        (f"{Q_PROJ}.scales", None, f"tensor {Q_PROJ}.scales is missing"),
        (f"{Q_PROJ}.int4", None, f"tensor {Q_PROJ}.int4 is missing"),
        (f"{Q_PROJ}.scales", torch.ones(96, 2).bfloat16(), r"BF16 \[96, 2\], expected BF16 \[96, 1\]"),
        (f"{Q_PROJ}.scales", torch.ones(96, 1), r"is F32 \[96, 1\], expected BF16"),
        (f"{Q_PROJ}.scales", torch.full((96, 1), torch.nan).bfloat16(), f"{Q_PROJ}.scales: 96 of 96 numbers are NaN"),
        ("model.norm.weight", torch.full((96,), torch.inf), "model.norm.weight: 96 of 96"),
        ("lm_head.weight.scales", None, "lm_head.weight.scales is missing"),
        ("model.other.weight", torch.ones(1), "model.other.weight has no place in the model"),
    ],
)
def test_damaged_tensors_are_named(name: str, tensor: Tensor | None, said: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=said):
        read_packed(damaged(packed(tmp_path / "packed"), name, tensor))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"version": 2}, "version 2; this program reads 1"),
        ({"packing": None}, "packing is None"),
        ({"scheme": "tpu"}, "scheme is 'tpu'; expected one of cpu, accelerator"),
        ({"weights": {"bits": 4, "group": 64, "learned": True}}, "weights is .*'group': 64"),
        ({"packing": "odd first"}, "packing is 'odd first'"),
        ({"shared_table": True}, "shared_table is True"),
        ({"trained": None}, "trained is None"),
    ],
)
def test_other_records_are_refused(changes: dict, said: str, tmp_path: Path) -> None:
    path = packed(tmp_path / "packed") / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"quantization_config": config["quantization_config"] | changes}))
    with pytest.raises(ValueError, match=said):
        read_packed(path.parent)


def test_a_folder_of_another_kind(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="config.json"):
        read_packed(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match='model_type is None; expected "mobilellm_pro_int4"'):
        read_packed(tmp_path)


def test_students_that_cannot_be_exported() -> None:
    with pytest.raises(ValueError, match='scheme "tpu"; expected one of cpu, accelerator'):
        quantize_student(full_student(), "tpu", TOKENIZER, 128)
    with pytest.raises(ValueError, match='trained with the quantization scheme "cpu"'):
        quantize_student(quantized_student("cpu"), "accelerator", TOKENIZER, 128)
    bad = full_student()
    bad.layers["1"].mlp.up_proj.weight[3, 5] = torch.nan
    with pytest.raises(ValueError, match=r"layers.1.mlp.up_proj.weight: 1 of .* the first at \[3, 5\]"):
        quantize_student(bad, "cpu", TOKENIZER, 128)
    bad = quantized_student("accelerator")
    bad.embed_tokens.head_scales[7] = torch.inf
    with pytest.raises(ValueError, match="embed_tokens.head_scales: 1 of"):
        quantize_student(bad, "accelerator", TOKENIZER, 128)
    bad.embed_tokens.head_scales = nn.Parameter(torch.ones(4096, 3))
    with pytest.raises(ValueError, match=r"learned ranges \[4096, 3\]; lm_head.weight needs \[4096, 1\]"):
        quantize_student(bad, "accelerator", TOKENIZER, 128)
    bad.embed_tokens.head_scales = None
    with pytest.raises(ValueError, match="lacks learned ranges: embed_tokens.head_scales"):
        quantize_student(bad, "accelerator", TOKENIZER, 128)
    bad = quantized_student("accelerator")
    bad.quantization = replace(bad.quantization, learned_ranges=False)
    with pytest.raises(ValueError, match="no place for embed_tokens.head_scales, "):
        quantize_student(bad, "accelerator", TOKENIZER, 128)
    twice = unpacked_student(quantize_student(full_student(), "cpu", TOKENIZER, 128))
    with pytest.raises(ValueError, match="rounded twice"):
        quantize_student(twice, "cpu", TOKENIZER, 128)


def test_more_bits_than_four(tmp_path: Path) -> None:
    model = quantize_student(full_student(), "cpu", TOKENIZER, 128)
    with pytest.raises(ValueError, match="weights of 5 bits; a packed folder holds four"):
        write_packed(replace(model, scheme=Scheme(WeightScheme(bits=5))), tmp_path / "packed")
    name, weight = next(iter(model.weights.items()))
    outside = {name: QuantizedWeight(weight.integers + 8, weight.scales)}
    with pytest.raises(ValueError, match="four bits hold -8 to 7"):
        write_packed(replace(model, weights={**model.weights, **outside}), tmp_path / "packed")
    assert not list(tmp_path.iterdir())  # nothing of the folder is left

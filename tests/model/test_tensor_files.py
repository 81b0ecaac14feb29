"""A folder's headers say what is wrong with it, and its fingerprint which weights it holds."""

import json
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file

from mobilellm_pro.model.hugging_face import PrefixAdapter, read_config, teacher_args
from mobilellm_pro.model.teacher import Teacher
from mobilellm_pro.model.tensor_files import fingerprint, stored_tensors, tensor_problems
from tests.model.folders import SMALL_TEACHER, write_config, write_stock_teachers


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_stock_teachers(tmp_path_factory.mktemp("stock"))


def edited(source: Path, folder: Path, name: str, element: int) -> Path:
    """A copy of a folder of one file with another value in one place of one tensor."""
    tensors = load_file(source / "model.safetensors")
    tensors[name].view(-1)[element] += 1
    write_config(folder, read_config(source))
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_the_fingerprint_is_of_the_text_model_however_it_is_stored(stock: dict[str, Path]) -> None:
    names = set(stored_tensors(stock["multimodal"]))
    assert "language_model.lm_head.weight" in names and "language_model.model.norm.weight" in names
    assert any(name.startswith("vision_model.") for name in names)
    prints = {name: fingerprint(folder) for name, folder in stock.items()}
    assert len(set(prints.values())) == 1, prints
    assert len(prints["text"]) == 16 and int(prints["text"], 16)


def test_the_fingerprint_sees_weights_and_architecture(stock: dict[str, Path], tmp_path: Path) -> None:
    large = "model.embed_tokens.weight"  # 150 · 64 · 4 bytes: samples of 4 KiB leave gaps
    prints = {"same": fingerprint(stock["text"])}
    for place in (0, 4800, 150 * 64 - 1):
        prints[f"at {place}"] = fingerprint(edited(stock["text"], tmp_path / f"at{place}", large, place))
    prints["norm"] = fingerprint(edited(stock["text"], tmp_path / "norm", "model.norm.weight", 7))
    for key, value in {"floor_scale": 3, "rope_parameters": {"rope_type": "default", "rope_theta": 9.0}}.items():
        folder = edited(stock["text"], tmp_path / key, large, 2000)
        write_config(folder, read_config(folder) | {key: value})
        prints[key] = fingerprint(folder)
    assert len(set(prints.values())) == len(prints), prints


def test_the_fingerprint_does_not_see_between_its_samples(stock: dict[str, Path], tmp_path: Path) -> None:
    """Known and documented: what it costs to be read in seconds."""
    folder = edited(stock["text"], tmp_path / "gap", "model.embed_tokens.weight", 2000)
    assert fingerprint(folder) == fingerprint(stock["text"])


def test_the_fingerprint_knows_the_data_type(stock: dict[str, Path], tmp_path: Path) -> None:
    write_config(tmp_path, read_config(stock["text"]))
    tensors = load_file(stock["text"] / "model.safetensors")
    save_file({name: tensor.bfloat16() for name, tensor in tensors.items()}, tmp_path / "model.safetensors")
    assert fingerprint(tmp_path) != fingerprint(stock["text"])


@pytest.mark.parametrize("kind", ["text", "shards", "multimodal"])
def test_torchtitan_reads_every_kind_through_the_adapter(stock: dict[str, Path], kind: str) -> None:
    """As its checkpointer does it for `checkpoint.initial_load_in_hf`."""
    teacher = Teacher(teacher_args(read_config(stock[kind]), stock[kind]))
    adapter = PrefixAdapter(teacher.model_args, None)
    state = adapter.to_hf(teacher.state_dict())
    dcp.load(state, storage_reader=adapter.get_hf_storage_reader(str(stock[kind])), no_dist=True)
    teacher.load_state_dict(adapter.from_hf(state))
    stored = load_file(stock["text"] / "model.safetensors")
    for name, tensor in teacher.state_dict().items():
        assert torch.equal(tensor, stored[name if name == "lm_head.weight" else f"model.{name}"]), name


def test_the_adapter_takes_a_multimodal_state(stock: dict[str, Path]) -> None:
    names = stored_tensors(stock["multimodal"])
    with torch.device("meta"):
        wanted = set(Teacher(SMALL_TEACHER).state_dict())
    assert set(PrefixAdapter(SMALL_TEACHER, None).from_hf(dict.fromkeys(names))) == wanted


def test_problems_of_parts_and_of_some_tensors(tmp_path: Path) -> None:
    tensors = {"model.a": torch.zeros(8, 6), "model.b": torch.zeros(4, 6), "model.more": torch.zeros(1)}
    save_file(tensors, tmp_path / "model.safetensors")
    model = torch.nn.Module()
    for name, shape in {"a": (4, 6), "b": (4, 5), "c": (2,)}.items():
        model.register_parameter(name, torch.nn.Parameter(torch.empty(shape, device="meta")))
    assert len(tensor_problems(model, tmp_path)) == 4
    inside, outside = {0: ((2, 4), (6, 8))}, {0: ((2, 4), (7, 9))}
    assert tensor_problems(model, tmp_path, names={"a"}, slices={"a": inside}) == []
    (problem,) = tensor_problems(model, tmp_path, names={"a"}, slices={"a": outside})
    assert "model.a has shape [8, 6], expected [4, 6], of which [0] is [(2, 4), (7, 9)]" in problem
    (problem,) = tensor_problems(model, tmp_path, names={"b"}, slices={"b": {0: ((0, 4),)}})
    assert "model.b has shape [4, 6], expected [4, 5]" in problem
    assert tensor_problems(model, tmp_path, names={"c"}) == [f"{tmp_path}: tensor model.c is missing"]


def test_quantized_weights_are_refused(tmp_path: Path) -> None:
    save_file({"model.weight": torch.zeros(4, 4, dtype=torch.float8_e4m3fn)}, tmp_path / "model.safetensors")
    (problem,) = tensor_problems(torch.nn.Linear(4, 4, bias=False, device="meta"), tmp_path)
    assert "model.weight has data type F8_E4M3, expected one of F64, F32, F16, BF16; convert" in problem


def test_a_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    save_file({"model.a": torch.zeros(2)}, tmp_path / "model.safetensors")
    save_file({"model.a": torch.ones(2)}, tmp_path / "model-00001-of-00001.safetensors")
    with pytest.raises(ValueError, match=r"model\.a is in model-00001-of-00001\.safetensors too; remove"):
        stored_tensors(tmp_path)


@pytest.mark.parametrize("content", ["[]", "{}", "not json", '{"weight_map": 3}'])
def test_a_damaged_index_is_named(tmp_path: Path, content: str) -> None:
    save_file({"model.a": torch.zeros(2)}, tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ValueError, match=r"index\.json: not an index"):
        stored_tensors(tmp_path)


@pytest.mark.parametrize(
    "header",
    [[], {"a": 1}, {"a": {"dtype": "F32"}}, {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}],
    ids=["list", "number", "incomplete", "contradictory"],
)
def test_a_damaged_header_is_named(tmp_path: Path, header: object) -> None:
    encoded = json.dumps(header).encode()
    file = tmp_path / "model.safetensors"
    file.write_bytes(len(encoded).to_bytes(8, "little") + encoded + bytes(64))
    with pytest.raises(ValueError, match=r"model\.safetensors: not a safetensors file \(its header is damaged\)"):
        stored_tensors(tmp_path)

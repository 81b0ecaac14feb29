"""DCP and Hugging Face hold the same numbers, both ways, to the bit; others can read what is written."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from mobilellm_pro.convert.conversion import convert, write_safetensors
from mobilellm_pro.data.tokenizer import Tokenizer
from mobilellm_pro.evaluation.generate import generate
from mobilellm_pro.model.checkpoint import load_model
from tests.data.synthetic import DEBUG_TOKENIZER
from tests.training.small_world import SmallWorld

SAVING = ("--checkpoint.enable", "--checkpoint.interval", "10", "--checkpoint.no_last_save_model_only")


@pytest.fixture(scope="module")
def student_run(world: SmallWorld) -> Path:
    return world.run("convert/student", 2, *SAVING, "--training.local_batch_size", "2", "--optimizer.lr", "1e-2")


@pytest.fixture(scope="module")
def exported(student_run: Path) -> Path:
    folder = student_run.parent / "student_hugging_face"
    convert(str(student_run), str(folder))
    return folder


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_there_and_back_again(student_run: Path, exported: Path, tmp_path: Path) -> None:
    weights = load_model(student_run).model.state_dict()
    assert same(load_model(exported).model.state_dict(), weights)
    convert(str(exported), str(tmp_path / "checkpoint/step-0"))
    (tmp_path / "config.toml").write_text((student_run / "config.toml").read_text())
    assert same(load_model(tmp_path).model.state_dict(), weights)


def test_stock_transformers_reads_model_and_tokenizer(student_run: Path, exported: Path) -> None:
    theirs = AutoModelForCausalLM.from_pretrained(exported).eval()
    text = "The river keeps the garden 7."
    ids = AutoTokenizer.from_pretrained(exported)(text)["input_ids"]
    assert ids == Tokenizer.load(str(DEBUG_TOKENIZER)).encode(text, bos=True)
    ours = load_model(student_run)
    with torch.no_grad():
        torch.testing.assert_close(
            ours.model(torch.tensor([ids])), theirs(torch.tensor([ids])).logits, atol=1e-5, rtol=0
        )
    assert theirs.config.sliding_window == 16 and theirs.config.max_position_embeddings == 64


def test_a_run_may_start_from_either(world: SmallWorld, student_run: Path, exported: Path) -> None:
    """The first loss of the next phase is the same from DCP, from Hugging Face, and from DCP made of Hugging Face."""
    again = world.folder / "convert/from_hugging_face"
    convert(str(exported), str(again))
    first = {}
    for name, extra in {
        "dcp": ("--checkpoint.initial_load_path", str(student_run / "checkpoint/step-3")),
        "hf": ("--checkpoint.initial_load_path", str(exported), "--checkpoint.initial_load_in_hf"),
        "again": ("--checkpoint.initial_load_path", str(again)),
    }.items():
        folder = world.run(f"convert/next_{name}", 1, *SAVING, "--training.steps", "1", *extra)
        first[name] = (folder / "metrics.jsonl").read_text().split('"grad_norm": ')[1].split(",")[0]
    fresh = world.run("convert/next_fresh", 1, *SAVING, "--training.steps", "1")
    assert len(set(first.values())) == 1
    assert first["dcp"] not in (fresh / "metrics.jsonl").read_text()


def test_teacher_goes_to_hugging_face(world: SmallWorld) -> None:
    extra = ("--model.name", "llama4_text", "--distill.objective", "ce")
    run = world.run("convert/teacher", 1, *SAVING, *extra)
    folder = world.folder / "convert/teacher_hugging_face"
    convert(str(run), str(folder))
    theirs = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    tokens = torch.arange(60).view(1, 60)
    with torch.no_grad():
        torch.testing.assert_close(load_model(run).model(tokens), theirs(tokens).logits, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="only students have a KV cache"):
        generate(str(folder))


def test_bf16(student_run: Path, tmp_path: Path) -> None:
    convert(str(student_run), str(tmp_path / "half"), dtype="bfloat16")
    written = load_file(tmp_path / "half/model.safetensors")
    weights = load_model(student_run).model.state_dict()
    assert all(torch.equal(t, weights[name.removeprefix("model.")].bfloat16()) for name, t in written.items())


def test_large_models_are_written_in_shards(exported: Path, tmp_path: Path) -> None:
    tensors = load_file(exported / "model.safetensors")
    write_safetensors(tensors, tmp_path, shard_bytes=500_000)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    (tmp_path / "config.json").write_bytes((exported / "config.json").read_bytes())
    assert same(load_model(tmp_path).model.state_dict(), load_model(exported).model.state_dict())
    stock = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(stock.model.embed_tokens.weight, tensors["model.embed_tokens.weight"])


def test_generate_from_both(student_run: Path, exported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = [generate(str(folder), prompt="The river", max_new_tokens=12) for folder in (student_run, exported)]
    assert texts[0] == texts[1] and texts[0]
    assert capsys.readouterr().out.startswith("The river" + texts[0])
    sampled = [generate(str(exported), prompt="The", max_new_tokens=12, temperature=1.0, seed=s) for s in (1, 1, 2)]
    assert sampled[0] == sampled[1] != sampled[2]


def test_what_cannot_be_converted_is_named(student_run: Path, exported: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="expected a Hugging Face folder"):
        convert(str(tmp_path), str(tmp_path / "out"))
    with pytest.raises(ValueError, match="exists already"):
        convert(str(student_run), str(exported))
    assert not list(tmp_path.glob("*tmp*"))

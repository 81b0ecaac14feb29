"""Bits per byte of held-out documents: as a plain forward pass gives them, and of the text that was asked for."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mobilellm_pro.__main__ import main
from mobilellm_pro.config import load
from mobilellm_pro.config.job_config import Dataset
from mobilellm_pro.convert.conversion import convert
from mobilellm_pro.data.shards import Corpus
from mobilellm_pro.data.tokenizer import Tokenizer
from mobilellm_pro.evaluation import held_out as held_out_module
from mobilellm_pro.evaluation.held_out import held_out, held_out_documents, held_out_settings
from mobilellm_pro.model.checkpoint import load_model
from mobilellm_pro.model.student import Student
from tests.data.shard_files import write_labels_of
from tests.data.synthetic import DEBUG_TOKENIZER, make_corpora
from tests.evaluation.test_needle import write_student
from tests.training.small_world import SmallWorld

READ = ("--validation.enable", "--validation.steps", "4", "--validation.local_batch_size", "2",
        "--validation.seq_len", "100")  # fmt: skip


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_student(tmp_path_factory.mktemp("student") / "tiny")


def expected(student: Path, world: SmallWorld) -> tuple[float, int, int]:
    """Nats, tokens and bytes by whole forward passes: 560 and 240 tokens of two corpora, documents cut at 100."""
    model, tokenizer = load_model(student).model, Tokenizer.load(str(DEBUG_TOKENIZER))
    assert isinstance(model, Student)
    nats, tokens, num_bytes = 0.0, 0, 0
    for name, budget in (("a", 560), ("b", 240)):
        corpus = Corpus.open(world.folder / "tokens" / name, "valid")
        for document in range(corpus.num_documents):
            length = min(int(corpus.lengths(document, document + 1)[0]), 100, budget)
            if length < 2:
                continue
            ids = torch.from_numpy(np.asarray(corpus.tokens(document, 0, length)).astype(np.int64))
            with torch.no_grad():
                nats += float(F.cross_entropy(model(ids[None])[0, :-1].double(), ids[1:], reduction="sum"))
            num_bytes += sum(int(tokenizer.token_bytes[i]) for i in ids[1:].tolist())
            tokens, budget = tokens + length - 1, budget - length
    return nats, tokens, num_bytes


@pytest.mark.parametrize("chunk", [2048, 7])
def test_it_is_a_plain_forward_pass(
    student: Path, world: SmallWorld, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr(held_out_module, "CHUNK_TOKENS", chunk)
    result = held_out(str(student), load(world.job, READ))
    assert result is not None
    nats, tokens, num_bytes = expected(student, world)
    assert result["tokens"] == tokens and 700 < tokens < 800
    assert result["ce"] == pytest.approx(nats / tokens, rel=1e-5)
    assert result["bits_per_byte"] == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-5)
    assert set(result["by_corpus"]) == {"a", "b"}


def test_masks_and_packing_of_the_job_do_not_matter(student: Path, world: SmallWorld) -> None:
    plain = held_out(str(student), load(world.job, READ))
    other = ("--attention.student_mask", "causal", "--data.max_document_tokens", "20", "--data.packing", "best_fit",
             "--training.seq_len", "32", "--attention.positions", "reset")  # fmt: skip
    assert held_out(str(student), load(world.job, [*READ, *other])) == plain


def test_clusters_and_the_dev_split(student: Path, world: SmallWorld, tmp_path: Path) -> None:
    """Only the documents of the clusters that the job names, of the split that is asked for."""
    folders = make_corpora(tmp_path, ("c",), dev=0.2)
    corpus, dev = (Corpus.open(folders["c"], split) for split in ("valid", "dev"))
    write_labels_of(folders["c"], [number % 2 for number in range(dev.num_documents)], 2, "dev")
    config = load(world.job, READ)
    config.data.datasets = [Dataset("odd", str(folders["c"]), 1.0, clusters=[1])]
    tokenizer = Tokenizer.load(str(DEBUG_TOKENIZER))
    settings = held_out_settings(config, "dev")
    found = list(held_out_documents(settings, tokenizer))
    lengths = dev.lengths(0, dev.num_documents).tolist()
    expected = [dev.tokens(number, 0, min(lengths[number], 100)).tolist() for number in range(1, dev.num_documents, 2)]
    assert [name for name, _ in found] == ["odd"] * len(expected) and [ids.tolist() for _, ids in found] == expected
    result = held_out(str(student), config, split="dev")
    assert result is not None and result["documents"] == len(expected) and result["settings"] == settings
    config.data.datasets[0].clusters = None
    assert "clusters" not in held_out_settings(config) and "split" not in held_out_settings(config)
    whole = [ids for _, ids in held_out_documents(held_out_settings(config), tokenizer)]
    assert sum(map(len, whole)) == min(800, int(corpus.lengths(0, corpus.num_documents).clip(max=100).sum()))
    with pytest.raises(ValueError, match="the split 'dev' does not exist"):
        held_out(str(student), load(world.job, READ), split="dev")


def test_the_command_line(
    student: Path,
    world: SmallWorld,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    convert(str(student), str(tmp_path / "run/checkpoint/step-2"))
    (tmp_path / "run/config.toml").write_text(world.job.read_text())
    out = tmp_path / "new/held_out.json"
    assert main(["held-out", str(tmp_path / "run"), str(world.job), *READ, "--output", str(out)]) == 0
    result = json.loads(out.read_text())
    assert f"{result['bits_per_byte']:.4f} bits/byte" in capsys.readouterr().out
    assert result == json.loads(json.dumps({**(held_out(str(student), load(world.job, READ)) or {}),
                                            "checkpoint": str(tmp_path / "run")}))  # fmt: skip
    monkeypatch.setenv("RANK", "1")
    assert held_out(str(student), load(world.job, READ)) is None


def test_mistakes_are_named(student: Path, world: SmallWorld, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="validation.enable = false: the job does not say how much to read"):
        held_out(str(student), load(world.job))
    with pytest.raises(ValueError, match="a teacher; only students"):
        held_out(str(world.folder / "teacher"), load(world.job, READ))
    with pytest.raises(FileNotFoundError, match="expected a Hugging Face folder"):
        held_out(str(tmp_path), load(world.job, READ))
    lines = DEBUG_TOKENIZER.read_bytes().splitlines(keepends=True)
    (tmp_path / "shorter.model").write_bytes(b"".join(lines[:-1]))
    with pytest.raises(ValueError, match="4095 ids, .* has 4096"):
        held_out(str(student), load(world.job, [*READ, "--data.tokenizer", str(tmp_path / "shorter.model")]))

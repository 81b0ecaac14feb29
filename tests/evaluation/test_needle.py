"""The needle verb: scores, files, resumption and ranks."""

import base64
import json
import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor

from mobilellm_pro import __main__ as command_line
from mobilellm_pro.convert.conversion import convert, write_safetensors
from mobilellm_pro.data.tokenizer import Tokenizer
from mobilellm_pro.evaluation import needle as needle_module
from mobilellm_pro.evaluation.needle import greedy, needle, needle_score, run_cells
from mobilellm_pro.evaluation.needle_grid import Grid
from mobilellm_pro.evaluation.needle_haystack import Filler
from mobilellm_pro.evaluation.needle_results import summary, table
from mobilellm_pro.model.checkpoint import load_model
from mobilellm_pro.model.hugging_face import hugging_face_name, student_config
from mobilellm_pro.model.student import FLAVORS, Student
from mobilellm_pro.model.teacher import Teacher
from tests.data.synthetic import DEBUG_TOKENIZER, make_corpora
from tests.model.folders import SMALL_TEACHER, write_config
from tests.ranks import Ranks, run_ranks
from tests.training.small_world import JOB, write_teacher

TOKENIZER = Tokenizer.load(str(DEBUG_TOKENIZER))
SMALL: dict[str, Any] = {"lengths": [200, 320], "depths": 3, "needles": 2}


def write_student(folder: Path, seed: int = 0, *, max_tokens: int = 400) -> Path:
    """A debug student with random weights as a Hugging Face folder; its window is that of `JOB`."""
    torch.manual_seed(seed)
    student = Student(replace(FLAVORS["debug"], sliding_window=16))
    student.init_weights()
    write_config(
        folder,
        student_config(
            student.model_args, max_position_embeddings=max_tokens, bos_id=1, eos_id=2, pad_id=3, dtype="float32"
        ),
    )
    write_safetensors({hugging_face_name(name): tensor for name, tensor in student.state_dict().items()}, folder)
    (folder / "tokenizer.model").write_bytes(DEBUG_TOKENIZER.read_bytes())
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_student(tmp_path_factory.mktemp("student") / "tiny")


def test_the_command_line_end_to_end(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    words = ["needle", str(folder), "--lengths", "200", "320", "--depths", "3", "--needles", "2", "--batch", "3"]
    assert command_line.main([*words, "--output", str(out), "--prefill-tokens", "100"]) == 0
    printed = capsys.readouterr()
    result = json.loads((out / "needle.json").read_text())
    assert result["total"] == 12 and table(result) in printed.out and f"/12 = {result['score']:.2f} %" in printed.out
    assert printed.err.count("needle, rank 0, ") == 12 and "12/12: 320 tokens" in printed.err
    assert {cell["length"] for cell in result["cells"]} == {200, 320}
    assert all(len(cell["value"]) == 7 and 0 < cell["prompt_tokens"] <= cell["length"] - 16 for cell in result["cells"])
    assert result["settings"]["haystack"] == "generated" and (out / "needle.png").is_file()
    # The answers are those of the model without a cache and without batches.
    student = load_model(folder).model
    grid = Grid(lengths=(200, 320), num_depths=3, num_needles=2)

    def whole(prompts: torch.Tensor, count: int) -> torch.Tensor:
        tokens = prompts
        for _ in range(count):
            tokens = torch.cat((tokens, student(tokens)[:, -1:].argmax(-1)), dim=1)
        return tokens[:, prompts.shape[1] :]

    with torch.no_grad():
        plain = summary(grid, list(run_cells(whole, TOKENIZER, grid, grid.cells(), Filler())))
    assert plain["cells"] == result["cells"]


def test_a_run_folder_a_step_and_a_corpus(folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    convert(str(folder), str(run / "checkpoint/step-2"))
    (run / "config.toml").write_text(JOB.format(folder=tmp_path, tokenizer=DEBUG_TOKENIZER))
    corpus = make_corpora(tmp_path / "text", ("a",), documents=300)["a"]
    results = [
        needle(str(source), **SMALL, haystack=str(corpus), output=str(tmp_path / source.name), allow_longer=True)
        for source in (run, run / "checkpoint/step-2", folder)
    ]
    assert results[0] is not None and results[0]["settings"]["haystack"].startswith("a ")
    for result in results[1:]:
        assert result is not None
        assert result["cells"] == results[0]["cells"] and result["settings"] == results[0]["settings"]
    with pytest.raises(ValueError, match=r"lengths: 320 tokens are more than the 64 that .*run was trained on"):
        needle(str(run), **SMALL, output=str(tmp_path / "no"))
    assert not (tmp_path / "no").exists()


def test_the_default_folder_is_named_by_the_checkpoint(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    convert(str(folder), "run/checkpoint/step-2")
    (tmp_path / "run/config.toml").write_text(JOB.format(folder=tmp_path, tokenizer=DEBUG_TOKENIZER))
    options: dict[str, Any] = {"lengths": [200], "depths": 1, "needles": 1, "allow_longer": True}
    for source in (folder, Path("run"), Path("run/checkpoint/step-2")):
        needle(str(source), **options)
    assert sorted(path.name for path in (tmp_path / "outputs/needle").iterdir()) == ["run", "run_step-2", "tiny"]


def needle_on_rank(folder: str, output: str, pause_seconds: float = 0.0) -> Any:
    """One rank's part, as torchrun starts it."""
    plain = needle_module.continue_tokens

    def slow(*args: Any, **options: Any) -> torch.Tensor:
        time.sleep(pause_seconds)
        return plain(*args, **options)

    needle_module.continue_tokens = slow
    return needle(folder, **SMALL, output=output)


def test_ranks_share_the_cells(folder: Path, tmp_path: Path) -> None:
    alone = needle(str(folder), **SMALL, output=str(tmp_path / "alone"))
    answers = run_ranks(needle_on_rank, 2, str(folder), str(tmp_path / "two"))
    assert alone in answers
    assert (tmp_path / "two/needle.json").read_bytes() == (tmp_path / "alone/needle.json").read_bytes()
    per_rank = [(tmp_path / f"two/cells-rank{rank}.jsonl").read_text().splitlines() for rank in range(2)]
    assert [len(lines) for lines in per_rank] == [6, 6]
    assert sorted(json.loads(line)["cell"] for lines in per_rank for line in lines) == list(range(12))
    assert not list((tmp_path / "two").glob("*tmp*"))


def test_after_a_kill_the_rest_is_run(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed with -9 in the middle, a line cut short, and started again on another number of ranks."""
    out = tmp_path / "out"
    ranks = Ranks(needle_on_rank, 2, str(folder), str(out), 0.3)
    files = [out / f"cells-rank{rank}.jsonl" for rank in range(2)]
    deadline = time.monotonic() + 60
    while not all(file.is_file() and file.read_text().count("\n") >= 2 for file in files):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    for process in ranks.processes:
        os.kill(process.pid, signal.SIGKILL)
    ranks.stop()
    assert not (out / "needle.json").exists()
    lines = files[0].read_bytes().splitlines(keepends=True)
    files[0].write_bytes(b"".join(lines[:-1]) + lines[-1][:20])
    done = sum(file.read_text().count("\n") for file in files)
    asked = []
    plain = needle_module.continue_tokens
    monkeypatch.setattr(
        needle_module, "continue_tokens", lambda *args, **more: asked.append(args[1]) or plain(*args, **more)
    )
    result = needle(str(folder), **SMALL, output=str(out))
    assert len(asked) == 12 - done and 3 <= done < 12
    assert result == needle(str(folder), **SMALL, output=str(tmp_path / "whole"))
    asked.clear()
    assert needle(str(folder), **SMALL, output=str(out)) == result and not asked


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "seed: 0 there, 1 now"),
        ({"needles": 3}, "num_needles: 2 there, 3 now"),
        ({"lengths": [200]}, r"lengths: \[200, 320\] there, \[200\] now"),
        ({"cache_dtype": "int8"}, "cache_dtype: 'model' there, 'int8' now"),
        ({"dtype": "bfloat16"}, "dtype: 'float32' there, 'bfloat16' now"),
    ],
)
def test_other_settings_are_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr(needle_module, "continue_tokens", lambda model, prompts, *_, **__: prompts[:, -1:])
    out = str(tmp_path / "out")
    needle(str(folder), **SMALL, output=out)
    before = (tmp_path / "out/needle.json").read_bytes()
    with pytest.raises(ValueError, match=f"(?s)made with other settings.*{message}.*choose another --output"):
        needle(str(folder), **{**SMALL, **change}, output=out)
    assert (tmp_path / "out/needle.json").read_bytes() == before


def test_another_model_corpus_or_tokenizer_is_refused(folder: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    options: dict[str, Any] = {"lengths": [200], "depths": 1, "needles": 1, "output": out}
    needle(str(folder), **options)
    with pytest.raises(ValueError, match="model: '[0-9a-f]{64}' there"):
        needle(str(write_student(tmp_path / "other", seed=1)), **options)
    corpus = make_corpora(tmp_path / "text", ("a",))["a"]
    with pytest.raises(ValueError, match="haystack: 'generated' there, 'a [0-9a-f]{8}' now"):
        needle(str(folder), **options, haystack=str(corpus))
    lines = DEBUG_TOKENIZER.read_bytes().splitlines(keepends=True)
    (tmp_path / "shorter.model").write_bytes(b"".join(lines[:-1]))
    with pytest.raises(ValueError, match="tokenizer: '[0-9a-f]{64}' there"):
        needle(str(folder), **options, tokenizer=str(tmp_path / "shorter.model"))


def test_mistakes_are_named_before_anything_is_written(folder: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    for options, message in (
        ({"lengths": [500]}, "lengths: 500 tokens are more than the 400 that"),
        ({"lengths": [50, 300]}, "lengths: 50 tokens do not hold the question"),
        ({"lengths": [300], "batch": 0}, "batch = 0"),
        ({"lengths": [300], "prefill_tokens": 0}, "prefill_tokens = 0"),
        ({"lengths": [300], "depths": 0}, "depths: 0"),
    ):
        with pytest.raises(ValueError, match=message):
            needle(str(folder), **options, output=out)
    write_teacher(Teacher(SMALL_TEACHER), tmp_path / "teacher")
    larger = {f"{DEBUG_TOKENIZER.read_text()}{base64.b64encode(b'zqzqzq').decode()} 4077\n"}
    (tmp_path / "larger.model").write_text("".join(larger))
    with pytest.raises(ValueError, match=r"larger.model: 4097 ids, but .*tiny knows 4096"):
        needle(str(folder), lengths=[300], tokenizer=str(tmp_path / "larger.model"), output=out)
    with pytest.raises(ValueError, match="a teacher; only students have a KV cache"):
        needle(str(tmp_path / "teacher"), output=out)
    with pytest.raises(FileNotFoundError, match="expected a Hugging Face folder"):
        needle(str(tmp_path), output=out)
    corpus = make_corpora(tmp_path / "text", ("a",), documents=12, holdout=0.0)["a"]
    with pytest.raises(ValueError, match=r"its \d+ tokens do not fill a prompt of 4000"):
        needle(str(folder), lengths=[130, 4000], haystack=str(corpus), output=out, allow_longer=True)
    with pytest.raises(FileNotFoundError, match="manifest"):
        needle(str(folder), lengths=[300], haystack=str(tmp_path), output=out)
    assert not (tmp_path / "out").exists()


def test_a_model_in_memory_is_scored(folder: Path) -> None:
    """As a trainer calls it: nothing is written, the mode stays, gradients are not touched."""
    student = load_model(folder).model.train().requires_grad_(True)
    grid = Grid(lengths=(200, 320), num_depths=3, num_needles=2)
    scores = needle_score(student, TOKENIZER, grid=grid, batch=4)
    assert scores == summary(grid, list(run_cells(greedy(student, TOKENIZER), TOKENIZER, grid, grid.cells(), Filler())))
    assert student.training and all(p.grad is None and p.requires_grad for p in student.parameters())


def score_sharded(folder: str) -> str:
    """One rank: a student with a sharded matrix."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    student = load_model(folder).model
    mesh = init_device_mesh("cpu", (1,))
    matrix = distribute_tensor(student.norm.weight.data, mesh, [Shard(0)])
    student.norm.weight = torch.nn.Parameter(matrix)
    assert isinstance(student.norm.weight, DTensor)
    with pytest.raises(ValueError) as error:
        needle_score(student, TOKENIZER)
    torch.distributed.destroy_process_group()
    return str(error.value)


def test_a_sharded_model_is_refused(folder: Path) -> None:
    assert "1 parameters are sharded (norm.weight" in run_ranks(score_sharded, 1, str(folder))[0]

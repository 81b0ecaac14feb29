"""The needle test while a model trains: the same score on every layout, and a training that does not notice."""

import json
import random
import re
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mobilellm_pro.config import load, resolved_toml
from mobilellm_pro.data.tokenizer import Tokenizer
from mobilellm_pro.evaluation import needle as needle_module
from mobilellm_pro.evaluation.needle import needle_score
from mobilellm_pro.evaluation.needle_grid import Grid
from mobilellm_pro.model.checkpoint import load_model
from mobilellm_pro.model.student import FLAVORS, Student
from mobilellm_pro.pipeline.train_job import online_evaluations
from mobilellm_pro.training.online_evaluation import undisturbed_randomness, whole_copy
from mobilellm_pro.training.preflight import problems
from mobilellm_pro.training.run import is_finished
from mobilellm_pro.training.run_folder import read_metrics
from tests.data.synthetic import DEBUG_TOKENIZER, make_corpora
from tests.ranks import run_ranks
from tests.training.small_world import SmallWorld, losses, train_job

NEEDLE = ("--needle.enable", "--needle.freq", "2", "--needle.lengths", "200,260", "--needle.depths", "2",
          "--needle.needles", "2", "--needle.allow_longer")  # fmt: skip
GRID = Grid(lengths=(200, 260), num_depths=2, num_needles=2)
SAVED = ("--checkpoint.enable", "--checkpoint.interval", "1", "--checkpoint.keep_latest_k", "0",
         "--checkpoint.no_last_save_model_only")  # fmt: skip
TP2 = ("--parallelism.tensor_parallel_degree", "2")
CP2 = ("--parallelism.context_parallel_degree", "2")


def answers(folder: Path, step: int) -> list[str]:
    """What the student said in each cell."""
    return [cell["answer"] for cell in json.loads((folder / f"needle/step-{step}.json").read_text())["cells"]]


@pytest.fixture(scope="module")
def tested(world: SmallWorld) -> Path:
    """One rank, three steps, tested after steps 2 and 3."""
    return world.run("online/one", 1, *NEEDLE, *SAVED)


def test_a_checkpoint_gives_what_its_step_gave(tested: Path) -> None:
    assert [record["step"] for record in read_metrics(tested, "needle")] == [2, 3]
    assert sorted(path.name for path in (tested / "needle").iterdir()) == ["step-2.json", "step-3.json"]
    tokenizer = Tokenizer.load(str(DEBUG_TOKENIZER))
    for record in read_metrics(tested, "needle"):
        step = record["step"]
        model = load_model(tested / f"checkpoint/step-{step}").model
        assert isinstance(model, Student)
        scores = needle_score(model, tokenizer, grid=GRID)
        written = json.loads((tested / f"needle/step-{step}.json").read_text())
        assert written == {"step": step, "haystack": "generated", **json.loads(json.dumps(scores))}
        assert len(scores["cells"]) == 8 and any(cell["answer"] for cell in scores["cells"])
        expected = dict(zip(("length_200", "length_260"), scores["by_length"], strict=True))
        assert record == {"kind": "needle", "step": step, "score": scores["score"], **expected}
    assert answers(tested, 2) != answers(tested, 3)
    done = json.loads((tested / "DONE").read_text())
    assert done["needle"]["step"] == 3 and done["validation"] is None


def test_it_is_in_tensorboard(world: SmallWorld) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = world.run("online/tb", 1, *NEEDLE, "--metrics.enable_tensorboard")
    events = EventAccumulator(str(next((folder / "tb").rglob("events*")).parent))
    events.Reload()
    assert {"needle/score", "needle/length_200", "needle/length_260"} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("needle/score")] == [2, 3]


def test_training_does_not_notice(world: SmallWorld, tested: Path) -> None:
    """Losses, gradients and weights to the bit, with a validation that shares the model in between."""
    plain = world.run("online/plain", 1, *SAVED)
    for key in ("loss", "grad_norm", "distill/kl"):
        assert losses(tested, key) == losses(plain, key) and len(losses(plain, key)) == 3
    expected = load_model(plain).model.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in load_model(tested).model.state_dict().items())
    validation = ("--validation.enable", "--validation.seq_len", "64", "--validation.steps", "1", "--validation.freq")
    split = ("--training.local_batch_size", "2")
    both = [world.run(f"online/two{len(more)}", 2, *split, *validation, "1", *more) for more in ((), NEEDLE)]
    assert losses(both[0]) == losses(both[1])
    assert read_metrics(both[0], "validation") == read_metrics(both[1], "validation")


@pytest.mark.parametrize(
    ("ranks", "layout"),
    [
        (2, ("--training.local_batch_size", "2")),
        (2, CP2),
        (2, TP2),
        (4, (*TP2, "--training.local_batch_size", "2", "--activation_checkpoint.mode", "full")),
    ],
    ids=["FSDP2", "CP2", "TP2", "FSDP2xTP2+checkpointing"],
)
def test_every_layout_says_the_same(world: SmallWorld, tested: Path, ranks: int, layout: tuple[str, ...]) -> None:
    """Cell by cell, not only the score, which is zero for a model of this size."""
    folder = world.run(f"online/{ranks}{''.join(layout)}", ranks, *NEEDLE, *layout)
    for step in (2, 3):
        assert answers(folder, step) == answers(tested, step)
    assert read_metrics(folder, "needle") == read_metrics(tested, "needle")


def test_resumed_between_and_after_the_steps(world: SmallWorld, tested: Path) -> None:
    """Stopped after a checkpoint and before or after the test of its step: tests are done once, none is left out."""
    for steps, was_tested in ((2, False), (2, True), (3, False)):
        folder = world.folder / f"online/resumed{steps}{was_tested}"
        last = 2 if was_tested else steps - 1  # tests before it were stopped
        missing = [f"step-{step}.json" for step in (2, 3) if step > last]
        shutil.copytree(tested, folder, ignore=shutil.ignore_patterns("DONE", *missing, *(["step-3"] * (steps == 2))))
        lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
        records = [(json.loads(line), line) for line in lines]
        kept = [line for record, line in records if record["kind"] != "needle" or record["step"] <= last]
        (folder / "metrics.jsonl").write_text("".join(kept))
        world.run(folder.relative_to(world.folder), 1, *NEEDLE, *SAVED)
        assert read_metrics(folder, "needle") == read_metrics(tested, "needle")
        assert [answers(folder, step) for step in (2, 3)] == [answers(tested, step) for step in (2, 3)]
        assert (folder / "DONE").is_file() and losses(folder) == losses(tested)


def prompts_and_type(job: str, folder: str, overrides: list[str]) -> tuple[int, str]:
    """One rank of a run; how many prompts it has answered, and with weights of which type."""
    asked, types, plain = [], set(), needle_module.continue_tokens

    def noted(model: Student, prompts: torch.Tensor, count: int, **options: Any) -> torch.Tensor:
        asked.append(len(prompts))
        types.update(str(tensor.dtype) for tensor in model.state_dict().values())
        return plain(model, prompts, count, **options)

    needle_module.continue_tokens = noted
    train_job(job, folder, overrides)
    (dtype,) = types
    return sum(asked), dtype


def test_ranks_share_the_cells_in_the_type_of_the_forward_pass(world: SmallWorld) -> None:
    words = [*NEEDLE, "--training.steps", "1", "--training.local_batch_size", "2"]
    words += ["--training.mixed_precision_param", "bfloat16"]
    answered = run_ranks(prompts_and_type, 2, str(world.job), str(world.folder / "online/shared"), words)
    assert answered == [(4, "torch.bfloat16")] * 2


def test_randomness_is_put_back() -> None:
    def draw() -> tuple[float, ...]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    expected = draw()
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])
    with undisturbed_randomness(torch.device("cpu")):
        random.seed(0)
        np.random.seed(0)
        torch.manual_seed(0)
        draw()
    assert draw() == expected


def test_a_copy_shares_nothing_with_the_model() -> None:
    model = Student(replace(FLAVORS["debug"], num_hidden_layers=1, global_layers=(0,))).train()
    model.init_weights()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    copy = whole_copy(model, torch.float32, torch.device("cpu"))
    assert not copy.training and model.training and not any(p.requires_grad for p in copy.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in copy.state_dict().items())
    for tensor in copy.state_dict().values():
        tensor.zero_()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="a copy onto a GPU, and its random generator")
def test_a_copy_on_a_gpu_and_its_randomness() -> None:
    device = torch.device("cuda:0")
    model = Student(replace(FLAVORS["debug"], num_hidden_layers=1, global_layers=(0,)))
    model.init_weights()
    state = torch.cuda.get_rng_state(device)
    expected = torch.rand(3, device=device)
    torch.cuda.set_rng_state(state, device)
    with undisturbed_randomness(device):
        torch.manual_seed(0)
        copy = whole_copy(model, torch.bfloat16, device)
        torch.rand(3, device=device)
    assert torch.equal(torch.rand(3, device=device), expected)
    for name, tensor in copy.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name].to(device=device, dtype=torch.bfloat16)), name


def without_needle(text: str) -> str:
    """A resolved configuration without this section: it ends at an empty line."""
    kept, found = re.subn(r"(?m)^\[needle\]\n(?:.+\n)*", "", text)
    assert found == 1
    return kept


def test_a_run_that_is_older_than_the_section_is_still_done(tested: Path, tmp_path: Path) -> None:
    """A key that config.toml does not know had its default."""
    shutil.copytree(tested, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoint"))
    older = without_needle((tested / "config.toml").read_text())
    assert "lengths = [200, 260]" not in older and "[data]" in older
    (tmp_path / "run/config.toml").write_text(older)
    config = load(tmp_path / "run/config.toml", ["--job.dump_folder", str(tmp_path / "run")])
    with pytest.raises(ValueError, match="other values of job.dump_folder is DONE"):
        is_finished(config)
    (tmp_path / "run/config.toml").write_text(without_needle(resolved_toml(config)))
    assert is_finished(config)
    needle = load(tmp_path / "run/config.toml", NEEDLE)
    with pytest.raises(ValueError, match=r"other values of needle.allow_longer, .*needle.lengths, .* is DONE here"):
        is_finished(needle)


def found(world: SmallWorld, *overrides: str) -> str:
    """What preflight says about the small world's job with a needle test."""
    config = load(world.job, ["--needle.enable", "--needle.lengths", "200", "--needle.allow_longer", *overrides])
    return "\n".join(problems(config, 1, online_evaluations(config)))


def test_bad_input_is_named_before_anything_runs(world: SmallWorld, tmp_path: Path) -> None:
    assert found(world) == ""
    assert "[needle]: lengths: 60 tokens do not hold the question" in found(world, "--needle.lengths", "60,200")
    assert "manifest" in found(world, "--needle.haystack", str(tmp_path))
    small = make_corpora(tmp_path / "few", ("a",), documents=12, holdout=0.0)["a"]
    text = found(world, "--needle.haystack", str(small), "--needle.lengths", "4000")
    assert "do not fill a prompt of 4000" in text
    lines = DEBUG_TOKENIZER.read_bytes().splitlines(keepends=True)
    (tmp_path / "shorter.model").write_bytes(b"".join(lines[:-1]))
    text = found(world, "--needle.haystack", str(small), "--data.tokenizer", str(tmp_path / "shorter.model"))
    assert f"{small}" in text and "tokenizer" in text
    assert found(world, "--data.tokenizer", "nowhere.model").count("nowhere.model") == 1


def test_the_run_and_validate_say_it_too(world: SmallWorld, capsys: pytest.CaptureFixture[str]) -> None:
    from mobilellm_pro.__main__ import main

    words: Mapping[str, str] = {"--needle.lengths": "60", "--needle.allow_longer": "true", "--needle.enable": "true"}
    flat = [word for pair in words.items() for word in pair]
    for verb in ("validate", "train"):
        assert main([verb, str(world.job), *flat, "--job.dump_folder", str(world.folder / "online/no")]) == 2
        assert "60 tokens do not hold the question" in capsys.readouterr().err
    assert not (world.folder / "online/no").exists()

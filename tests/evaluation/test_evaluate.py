"""The `evaluate` verb: real tasks from local files, stopped, over ranks, of checkpoints of every format."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import lm_eval
import lm_eval.tasks
import nltk
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mobilellm_pro import __main__ as command_line
from mobilellm_pro.config import ConfigError, load
from mobilellm_pro.convert.packed_folder import write_packed
from mobilellm_pro.convert.quantized_model import quantize_student
from mobilellm_pro.evaluation import evaluate as evaluate_module
from mobilellm_pro.evaluation.evaluate import evaluate
from mobilellm_pro.evaluation.harness_model import CheckpointModel
from mobilellm_pro.evaluation.suite import load_suite
from mobilellm_pro.evaluation.text_model import StudentModel
from mobilellm_pro.model.checkpoint import load_model
from mobilellm_pro.model.student import Student
from mobilellm_pro.pipeline.train_job import online_evaluations
from mobilellm_pro.training.run_folder import read_metrics
from tests.data.synthetic import DEBUG_TOKENIZER
from tests.evaluation.harness_world import few_tasks, write_sharp_student
from tests.training.small_world import SmallWorld, losses

ROOT = Path(__file__).parents[2]
DATA = ROOT / "tests/assets/evaluation_data"
TASKS = ["boolq", "piqa", "social_iqa", "openbookqa", "nq_open", "ifeval", "niah_single_1"]
SUITE = f"""
name = "base"
data = "{DATA}"
limit = 6
[[column]]
task = "piqa"
name = "PIQA"
metric = "acc_norm"
shots = 1
[[column]]
task = "nq_open"
name = "Natural Questions"
metric = "exact_match"
shots = 0
[[column]]
task = "openbookqa"
name = "OBQA"
metric = "acc"
[[average]]
name = "both"
columns = ["piqa", "openbookqa"]
"""
NEEDLE = """
[[column]]
task = "needle"
name = "Needle"
metric = "found"
[needle]
lengths = [200, 300]
depths = 2
needles = 1
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sharp_student(tmp_path_factory.mktemp("student") / "tiny")


@pytest.fixture(autouse=True)
def few_definitions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", partial(few_tasks, *TASKS))


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    path = tmp_path / "suite.toml"
    path.write_text(SUITE)
    return path


def without_time(path: Path) -> dict:
    results = json.loads((path / "results.json").read_text())
    return {key: value for key, value in results.items() if key not in ("seconds", "environment")}


def test_the_command_line_end_to_end(
    folder: Path, suite: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    suite.write_text(SUITE + NEEDLE)
    words = ["evaluate", str(suite), str(folder), str(tmp_path / "out")]
    assert command_line.main(words) == 0
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert list(results["columns"]) == ["piqa", "nq_open", "openbookqa", "needle"]
    assert results["columns"]["piqa"] == {
        "name": "PIQA", "metric": "acc_norm,none", "shots": 1, "documents": 6,
        "score": results["results"]["piqa"]["acc_norm,none"],
        "stderr": results["results"]["piqa"]["acc_norm_stderr,none"],
    }  # fmt: skip
    for task, column in results["columns"].items():
        lines = [json.loads(line) for line in (tmp_path / f"out/samples/{task}.jsonl").read_text().splitlines()]
        assert len(lines) == column["documents"] == (4 if task == "needle" else 6)
        assert sum(line["score"] for line in lines) / len(lines) == pytest.approx(column["score"])
    assert "dresser" in (tmp_path / "out/samples/piqa.jsonl").read_text()
    both = results["averages"]["both"]
    assert both["score"] == pytest.approx(sum(results["columns"][task]["score"] for task in both["columns"]) / 2)
    assert results["environment"]["versions"]["lm-eval"] == lm_eval.__version__
    table = (tmp_path / "out/results.md").read_text()
    assert table in capsys.readouterr().out and "| PIQA | acc_norm,none | 1 | 6 |" in table
    # Nothing is run again, and nothing else is written into the folder.
    monkeypatch.setattr(StudentModel, "scores", None)
    assert command_line.main(words) == 0
    assert command_line.main([*words, "--limit", "5"]) == 2
    assert "limit: 6 there, 5 now" in capsys.readouterr().err
    assert not (tmp_path / "out/responses").exists()


@pytest.mark.parametrize("stop", [3, 8, 15])
def test_a_stopped_evaluation_goes_on(
    folder: Path, suite: Path, tmp_path: Path, stop: int, monkeypatch: pytest.MonkeyPatch
):
    evaluate(str(suite), str(folder), str(tmp_path / "whole"))
    computed: list[int] = []
    original = StudentModel.scores

    def limited(self: StudentModel, endings: list) -> object:
        for item in original(self, endings):
            if len(computed) == stop:
                raise KeyboardInterrupt
            computed.append(1)
            yield item

    monkeypatch.setattr(StudentModel, "scores", limited)
    out = tmp_path / "stopped"
    with pytest.raises(KeyboardInterrupt):
        evaluate(str(suite), str(folder), str(out))
    assert not (out / "results.json").exists() and (out / "tasks/piqa.json").exists() == (stop > 12)
    before, stop = len(computed), 10**6
    evaluate(str(suite), str(folder), str(out))
    assert len(computed) - before == 6 * 2 + 6 * 4 - before, "only what was missing"
    assert without_time(out) == without_time(tmp_path / "whole")
    for path in (out / "samples").iterdir():
        found, expected = (
            [json.loads(line) for line in folder.joinpath("samples", path.name).read_text().splitlines()]
            for folder in (out, tmp_path / "whole")
        )
        # What is left over goes through the model in other company, so sums end in other decimals.
        answers = [[line.pop("answer") for line in lines] for lines in (found, expected)]
        assert found == expected
        if path.stem != "nq_open":
            for one, other in zip(*answers, strict=True):
                assert [a[0] for a in one] == pytest.approx([b[0] for b in other], abs=1e-4)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("piqa", "pika"), "task pika: lm-eval .* has none of that name"),
        (('metric = "acc"', 'metric = "f1"'), 'task openbookqa: metric "f1" is none of its acc,none, acc_norm,none'),
        ((f'"{DATA}"', '"no/such/folder"'), "no/such/folder: no such folder of evaluation data"),
        ((f'"{DATA}"', '"."'), "hf download --repo-type dataset baber/piqa"),
        (('task = "piqa"', 'task = "humaneval_sandboxed"'), "--allow-code"),
        (("limit = 6", "limit = 6\nmax_length = 16"), "nq_open asks for 256 new tokens of a model of 16"),
        (('task = "piqa"', 'task = "needle"'), "needle.lengths: 131072 tokens for a model of"),
    ],
)
def test_mistakes(folder: Path, suite: Path, tmp_path: Path, change: tuple[str, str], said: str):
    suite.write_text(SUITE.replace(*change).replace('["pika"', '["piqa"').replace('["piqa", ', "["))
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        evaluate(str(suite), str(folder), str(tmp_path / "out"))
    if "none of" not in said:
        assert not (tmp_path / "out").exists(), "it may be started again with a better suite"


def test_rulers_needles_and_instructions(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Tasks that make their own data with the model's tokenizer, and those whose answers a program judges."""
    monkeypatch.setattr(nltk, "download", lambda name: False)  # both ask for a splitter that these tests do not use
    (tmp_path / "suite.toml").write_text(f"""
name = "own"
data = "{DATA}"
limit = 3
max_length = 1600
[ruler]
lengths = [300]
[[column]]
task = "niah_single_1"
name = "RULER single 1"
metric = "300"
[[column]]
task = "ifeval"
name = "IFEval"
metric = "prompt_level_strict_acc"
""")
    results = evaluate(str(tmp_path / "suite.toml"), str(folder), str(tmp_path / "out"))
    assert results is not None
    assert {task: column["documents"] for task, column in results["columns"].items()} == {
        "niah_single_1": 3, "ifeval": 3
    }  # fmt: skip
    needles = [json.loads(line) for line in (tmp_path / "out/samples/niah_single_1.jsonl").read_text().splitlines()]
    assert all("special magic" in line["text"] and len(line["text"]) > 300 for line in needles)
    assert 0 <= results["columns"]["ifeval"]["score"] <= 1


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("name = 3", r"name: found 3 \(an integer\)"),
        ('name = "a"', "column: found nothing"),
        (SUITE.replace('name = "OBQA"', 'name = "PIQA"'), '"PIQA" a second time'),
        (SUITE.replace('["piqa", "openbookqa"]', '["piqua"]'), r"average\[0\].columns.*piqua.*piqa"),
        (SUITE.replace("limit = 6", "limit = -1"), "limit: found -1"),
        (SUITE.replace("shots = 1", "shots = -1"), r"column\[0\].shots"),
        (f'base = "nowhere.toml"\n{SUITE}', "nowhere.toml"),
    ],
)
def test_mistakes_of_a_suite(tmp_path: Path, text: str, said: str):
    (tmp_path / "suite.toml").write_text(text)
    with pytest.raises(ValueError, match=said):
        load_suite(tmp_path / "suite.toml")


def test_suites_of_this_project_can_be_read():
    for path in [*ROOT.glob("train_configs/suites/*.toml"), *ROOT.glob("train_configs/*/5_evaluate.toml")]:
        suite = load_suite(path)
        assert suite.columns and suite.averages, path
    assert len(load_suite(ROOT / "train_configs/mobilellm_pro_1b/5_evaluate.toml").columns) == 10


def test_a_file_changes_its_base(tmp_path: Path):
    (tmp_path / "base.toml").write_text(SUITE)
    (tmp_path / "own.toml").write_text('base = "base.toml"\nlimit = 3\nonly = ["openbookqa"]\n')
    suite = load_suite(tmp_path / "own.toml")
    assert (suite.name, suite.limit, [column.task for column in suite.columns]) == ("base", 3, ["openbookqa"])
    assert [(average.name, average.columns) for average in suite.averages] == [("columns above", ["openbookqa"])]


@pytest.mark.parametrize("scheme", ["cpu", "accelerator"])
def test_packed_integers_score_as_the_rounded_student(folder: Path, suite: Path, tmp_path: Path, scheme: str):
    model, tokenizer, max_tokens = load_model(folder)
    assert isinstance(model, Student)
    write_packed(quantize_student(model, scheme, tokenizer, max_tokens), tmp_path / "packed")
    dtype = "float32" if scheme == "cpu" else "bfloat16"
    rounded = evaluate(str(suite), str(folder), str(tmp_path / "a"), quantize=scheme, dtype=dtype)  # type: ignore[arg-type]
    packed = evaluate(str(suite), str(tmp_path / "packed"), str(tmp_path / "b"))
    whole = evaluate(str(suite), str(folder), str(tmp_path / "c"))
    assert rounded is not None and packed is not None and whole is not None
    assert rounded["results"] == packed["results"]
    answers = [(tmp_path / name / "samples/openbookqa.jsonl").read_text() for name in "abc"]
    assert answers[0] == answers[1] != answers[2]


def test_ranks_share_the_documents(folder: Path, tmp_path: Path):
    program = f"""
import json, sys
from lm_eval import simple_evaluate
from mobilellm_pro.evaluation.harness_model import CheckpointModel
from mobilellm_pro.evaluation.local_datasets import local_datasets
from tests.evaluation.harness_world import few_tasks
manager = few_tasks("piqa", "nq_open")
model = CheckpointModel({str(folder)!r})
with local_datasets({str(DATA)!r}):
    found = simple_evaluate(
        model, tasks=["piqa", "nq_open"], num_fewshot=2, limit=7, task_manager=manager, bootstrap_iters=0
    )
if found is not None:
    prompts = [[sample["arguments"] for sample in samples] for samples in found["samples"].values()]
    print(json.dumps([found["results"], prompts], default=str), file=open(sys.argv[1], "w"))
"""
    (tmp_path / "program.py").write_text(program)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for name, prefix in (("one", [sys.executable]), ("two", torchrun)):
        command = [*prefix, str(tmp_path / "program.py"), str(tmp_path / name)]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
        assert done.returncode == 0, done.stderr[-2000:]
    one, two = (json.loads((tmp_path / name).read_text()) for name in ("one", "two"))
    assert one == two


def test_without_lm_eval(folder: Path, suite: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(evaluate_module, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'mobilellm-pro\[eval\]'"):
        evaluate(str(suite), str(folder), str(tmp_path / "out"))


def test_a_tokenizer_of_another_model(folder: Path, tmp_path: Path):
    (tmp_path / "other.model").write_bytes(b"\n".join(DEBUG_TOKENIZER.read_bytes().splitlines()[:300]) + b"\n")
    with pytest.raises(ValueError, match="319 ids, the model has 4096"):
        CheckpointModel(str(folder), tokenizer=str(tmp_path / "other.model"))


def test_while_a_model_trains(world: SmallWorld, tmp_path: Path, suite: Path, monkeypatch: pytest.MonkeyPatch):
    suite.write_text(f"max_length = 320\n{SUITE}")  # rows of this world are shorter than an answer may be
    words = ["--evaluation.suite", str(suite), "--evaluation.freq", "2", "--metrics.enable_tensorboard"]
    words += ["--checkpoint.enable", "--checkpoint.interval", "2", "--checkpoint.keep_latest_k", "0"]
    plain = world.run("suite/plain", 1)
    tested = world.run("suite/tested", 1, *words)
    assert losses(tested) == losses(plain), "the training does not notice"
    records = read_metrics(tested, "eval")
    assert [record["step"] for record in records] == [2, 3]
    alone = evaluate(str(suite), str(tested / "checkpoint/step-2"), str(tmp_path / "alone"))
    assert alone is not None
    assert records[0]["piqa"] == pytest.approx(100 * alone["columns"]["piqa"]["score"])
    assert records[0]["both"] == pytest.approx(100 * alone["averages"]["both"]["score"])
    online = json.loads((tested / "eval/step-2/results.json").read_text())
    assert online["results"] == alone["results"]
    events = EventAccumulator(str(next((tested / "tb").rglob("events*")).parent))
    events.Reload()
    assert {"eval/piqa", "eval/nq_open", "eval/both"} <= set(events.Tags()["scalars"])


def test_problems_of_a_suite_are_said_before_a_training(world: SmallWorld, suite: Path):
    suite.write_text(SUITE.replace('task = "piqa"', 'task = "pika"').replace('"piqa", ', ""))
    words = ["--evaluation.suite", str(suite)]
    found = [problem for test in online_evaluations(load(world.job, words)) for problem in test.problems()]
    assert len(found) == 1 and "[evaluation]" in found[0] and "pika" in found[0]
    with pytest.raises(ConfigError, match="evaluation.freq: found 0"):
        load(world.job, [*words, "--evaluation.freq", "0"])

"""The runner: what is run, in which order, once; what a changed file, a failure, a kill and a stop lead to."""

import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mobilellm_pro.config import JobError
from mobilellm_pro.data.prepare import prepare
from mobilellm_pro.model.checkpoint import latest_checkpoint
from mobilellm_pro.pipeline import ledger as ledgers
from mobilellm_pro.pipeline.ledger import Ledger, Record
from mobilellm_pro.pipeline.phase_kinds import KINDS
from mobilellm_pro.pipeline.phase_process import set_aside
from mobilellm_pro.pipeline.phases import load_pipeline
from mobilellm_pro.pipeline.pipeline_status import duration, status
from mobilellm_pro.pipeline.run_command import CommandFailed
from mobilellm_pro.pipeline.runner import STOPPED_STATUS, run
from tests.ranks import Ranks
from tests.training.small_world import SmallWorld

STAND_IN = Path(__file__).with_name("stand_in_training.py")
PIPELINE = """
output = "{folder}/out"
nproc = 1
[[phase]]
name = "first"
kind = "train"
config = "{job}"
overrides.training.steps = 3
[[phase]]
name = "left"
kind = "train"
config = "{job}"
initial_checkpoint = "phase:first"
overrides.training.steps = 4
[[phase]]
name = "right"
kind = "train"
config = "{job}"
initial_checkpoint = "phase:first"
overrides.training.steps = 5
[[phase]]
name = "last"
kind = "train"
config = "{job}"
needs = ["right"]
initial_checkpoint = "phase:left"
overrides.training.steps = 6
"""


@pytest.fixture(scope="module")
def checkpoint(world: SmallWorld) -> Path:
    """A real one, so that what begins with it can be checked."""
    words = ("--checkpoint.enable", "--checkpoint.interval", "1", "--training.steps", "1")
    found = latest_checkpoint(world.run("runner", 1, *words, "--checkpoint.no_last_save_model_only") / "checkpoint")
    assert found is not None
    return found


@pytest.fixture
def pipeline(world: SmallWorld, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Four phases, two of which may run side by side."""
    monkeypatch.setenv("TRAIN_COMMAND", f"{sys.executable} -S {STAND_IN}")
    monkeypatch.setenv("STAND_IN_CHECKPOINT", str(checkpoint))
    monkeypatch.setattr(ledgers, "LOCK_SECONDS", 10.0)
    job, path = tmp_path / "job.toml", tmp_path / "pipeline.toml"
    job.write_text(f"{world.job.read_text()}\n[checkpoint]\nenable = true\nlast_save_model_only = false\n")
    path.write_text(PIPELINE.format(folder=tmp_path, job=job))
    return path


def state_of(folder: Path) -> dict[str, list[str]]:
    """What all phases have done."""
    return {path.parent.name: json.loads(path.read_text()) for path in sorted(folder.glob("*/state.json"))}


def starts(folder: Path, name: str) -> int:
    path = folder / name / "starts"
    return len(path.read_text().splitlines()) if path.is_file() else 0


def wait_until(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_checkpoints_flow_by_name_and_nothing_runs_twice(pipeline: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = pipeline.parent / "out"
    run(str(pipeline), only=["first"])
    assert set(state_of(out)) == {"first"}
    run(str(pipeline), overrides=["--job.description", "another"])
    begun_with = {name: state[0] for name, state in state_of(out).items()}
    first = f"{out}/first/checkpoint/step-3"
    assert begun_with == {"first": "nothing", "left": first, "right": first, "last": f"{out}/left/checkpoint/step-4"}
    printed = capfd.readouterr().out
    assert "training of right with 1 processes" in printed and "== last: done after" in printed
    assert "training of right" in (out / "logs/right.log").read_text()
    run(str(pipeline))
    assert "training of" not in capfd.readouterr().out and all(starts(out, name) == 1 for name in begun_with)
    record = Ledger(out).read("last")
    assert record is not None and record.product == f"{out}/last/checkpoint/step-6"
    assert record.settings["training.steps"] == 6 and record.settings["checkpoint.initial_load_path"] == "phase:left"
    assert set(record.inputs) == {"first", "left", "right"} and record.environment["versions"]["torch"]


def test_a_changed_setting_of_a_finished_phase_names_its_keys(pipeline: Path) -> None:
    out = pipeline.parent / "out"
    run(str(pipeline))
    pipeline.write_text(pipeline.read_text().replace("steps = 4", "steps = 7"))
    with pytest.raises(JobError, match=r"left: done with .* training.steps \(4 then, 7 now\).*--from left "):
        run(str(pipeline))
    assert starts(out, "left") == 1
    run(str(pipeline), from_="left")
    assert {name: len(state) - 1 for name, state in state_of(out).items()} == {
        "first": 3, "left": 7, "right": 5, "last": 6,
    }  # fmt: skip
    assert state_of(out)["last"][0] == f"{out}/left/checkpoint/step-7"
    assert state_of(out / "replaced/left.1")["left"][-1] == "step 4", "nothing is lost"
    assert (out / "replaced/last.1/record.json").is_file() and starts(out, "right") == 1


def test_a_phase_whose_input_is_another_is_not_passed_over(pipeline: Path) -> None:
    run(str(pipeline))
    text = pipeline.read_text()
    pipeline.write_text(text.replace("steps = 4", "steps = 7"))
    (pipeline.parent / "out/ledger/left.json").unlink()  # by hand: --from would do `last` again too
    shutil.rmtree(pipeline.parent / "out/left")
    run(str(pipeline), only=["left"])
    with pytest.raises(JobError, match=r"last: done with other settings: left \(another one now\)"):
        run(str(pipeline))


def test_what_is_gone_is_missed(pipeline: Path) -> None:
    run(str(pipeline), only=["first"])
    (pipeline.parent / "out/first/DONE").unlink()
    with pytest.raises(JobError, match="first: done, but what it made is gone"):
        run(str(pipeline))


def test_only_needs_what_it_needs(pipeline: Path) -> None:
    with pytest.raises(JobError, match="last: needs first, left, right, which are not done"):
        run(str(pipeline), only=["last"])
    with pytest.raises(ValueError, match="--only rigth: .* has the phases first, .*; did you mean right?"):
        run(str(pipeline), only=["rigth"])
    with pytest.raises(ValueError, match="--from nowhere"):
        run(str(pipeline), from_="nowhere")


def test_all_phases_are_checked_before_the_first_is_started(pipeline: Path) -> None:
    text = pipeline.read_text().replace("overrides.training.steps = 6", "overrides.model.flavor = '3b'")
    pipeline.write_text(text.replace("overrides.training.steps = 5", "overrides.data.tokenizer = 'nowhere.model'"))
    with pytest.raises(JobError) as caught:
        run(str(pipeline))
    assert "right: " in str(caught.value) and "nowhere.model does not exist" in str(caught.value)
    assert "last: model.flavor = '3b'" in str(caught.value)
    assert not (pipeline.parent / "out").exists()


def test_a_failure_ends_the_run_and_the_next_one_goes_on(pipeline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = pipeline.parent / "out"
    monkeypatch.setenv("STAND_IN_FAILS", "right")
    with pytest.raises(CommandFailed, match=r'(?s)phase "right": ended with status 3; its log is .*out of luck'):
        run(str(pipeline))
    record = Ledger(out).read("right")
    assert record is not None and record.state == "failed" and set(state_of(out)) == {"first", "left"}
    monkeypatch.delenv("STAND_IN_FAILS")
    run(str(pipeline))
    record = Ledger(out).read("right")
    assert record is not None and (record.state, record.starts) == ("done", 2) and starts(out, "left") == 1


def test_a_training_that_somebody_stops_is_no_failure(pipeline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = pipeline.parent / "out"
    monkeypatch.setenv("STAND_IN_STOPS", "right")
    with pytest.raises(SystemExit, match=str(STOPPED_STATUS)):
        run(str(pipeline))
    record = Ledger(out).read("right")
    assert record is not None and record.state == "stopped"
    monkeypatch.delenv("STAND_IN_STOPS")
    run(str(pipeline))
    assert starts(out, "right") == 2 and starts(out, "left") == 1 and len(state_of(out)["right"]) == 6


def test_a_begun_training_does_not_go_on_with_other_settings(pipeline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STAND_IN_STOPS", "right")
    with pytest.raises(SystemExit):
        run(str(pipeline))
    (pipeline.parent / "out/right/checkpoint").mkdir()
    with pytest.raises(JobError, match=r"right: begun with other settings: optimizer.lr \(0.003 then, 0.1 now\)"):
        run(str(pipeline), only=["right"], overrides=["--optimizer.lr", "0.1"])


def test_side_by_side(pipeline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of two waits for the other's first step."""
    out = pipeline.parent / "out"
    monkeypatch.setenv("STAND_IN_SECONDS", "0.3")
    run(str(pipeline), parallel=2)
    begun = {name: (out / name / "starts").stat().st_mtime for name in ("left", "right")}
    ended = {name: (out / name / "DONE").stat().st_mtime for name in ("left", "right")}
    assert max(begun.values()) < min(ended.values())
    assert state_of(out)["last"][0] == f"{out}/left/checkpoint/step-4"


def start_runner(pipeline: Path) -> Ranks:
    return Ranks(run_slowly, 1, str(pipeline), dict(os.environ))


def run_slowly(pipeline: str, environment: dict[str, str]) -> None:
    """In a process of its own."""
    os.environ |= {**environment, "STAND_IN_SECONDS": "0.5"}
    run(pipeline)


def test_a_killed_runner_takes_its_phase_with_it(pipeline: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = pipeline.parent / "out"
    runner = start_runner(pipeline)
    wait_until(lambda: "first" in state_of(out))
    status(str(pipeline))
    assert "first  train  running  1/3" in capsys.readouterr().out
    runner.processes[0].kill()
    runner.processes[0].join()
    child = int((out / "first/starts").read_text())
    wait_until(lambda: not Path(f"/proc/{child}").exists(), 20)
    status(str(pipeline))
    assert "first  train  killed" in capsys.readouterr().out
    run(str(pipeline))
    assert len(state_of(out)["first"]) == 4 and starts(out, "first") == 2
    capsys.readouterr()
    status(str(pipeline))
    assert capsys.readouterr().out.count(" done ") == 4


def test_a_stop_that_is_asked_for(pipeline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = pipeline.parent / "out"
    runner = start_runner(pipeline)
    wait_until(lambda: "first" in state_of(out))
    monkeypatch.setattr(ledgers, "LOCK_SECONDS", 0.0)
    with pytest.raises(ValueError, match="another process runs this phase"):
        run(str(pipeline), only=["first"])
    assert runner.processes[0].pid is not None
    os.kill(runner.processes[0].pid, signal.SIGUSR1)
    with pytest.raises(AssertionError, match=f"SystemExit: {STOPPED_STATUS}"):
        runner.results(60)
    record = Ledger(out).read("first")
    assert record is not None and record.state == "stopped" and len(state_of(out)["first"]) < 4
    run(str(pipeline))
    assert starts(out, "first") == 2 and (out / "last/DONE").is_file()


def test_a_plan_starts_nothing(pipeline: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(str(pipeline), dry_run=True)
    printed = capsys.readouterr().out
    assert "first  train  to run  1      768" in printed and "--checkpoint.initial_load_path=phase:left" in printed
    assert not (pipeline.parent / "out").exists()
    run(str(pipeline), only=["first"])
    run(str(pipeline), dry_run=True, only=["left"])
    assert "about" in capsys.readouterr().out, "as fast as the first"


def test_an_hour_is_said_as_one() -> None:
    assert [duration(seconds) for seconds in (59.4, 61, 3661, 86_400 * 2.55)] == [
        "59 s", "1 min 1 s", "1 h 1 min", "2.5 days",
    ]  # fmt: skip


def test_corpora_count_as_made_when_all_are_there_and_are_set_aside_beside_themselves(tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    (tmp_path / "text/a.txt").write_text("a document of some words " * 20)
    datasets = 'tokenizer = "tests/assets/debug_tokenizer.model"\noutput = "{0}/tokens"\n[[dataset]]\nname = "a"\n'
    datasets += 'format = "folder"\nsource = "{0}/text"\nholdout = 0.0\n'
    (tmp_path / "datasets.toml").write_text(datasets.format(tmp_path))
    prepare_phase = '[[phase]]\nname = "tokens"\nkind = "prepare"\nconfig = "datasets.toml"\n'
    (tmp_path / "pipeline.toml").write_text(f'output = "{tmp_path}/out"\n{prepare_phase}')
    phase, ledger = load_pipeline(tmp_path / "pipeline.toml")["tokens"], Ledger(tmp_path / "out")
    assert KINDS["prepare"].product(phase) is None
    prepare(tmp_path / "datasets.toml", workers=0)
    ledger.write(Record("tokens", "prepare"))
    assert KINDS["prepare"].product(phase) == tmp_path / "tokens"
    assert set_aside(phase, ledger, tmp_path / "out/replaced") == tmp_path / "out/replaced/tokens.1"
    assert (tmp_path / "tokens.replaced.1/a/manifest.json").is_file() and not (tmp_path / "tokens").exists()
    assert ledger.read("tokens") is None and (tmp_path / "out/replaced/tokens.1/record.json").is_file()

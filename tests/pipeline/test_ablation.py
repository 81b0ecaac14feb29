"""The grid as processes: trainings, tests of their last checkpoints, one table; and what stops it."""

import json
import struct
import sys
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

from mobilellm_pro.__main__ import main
from mobilellm_pro.config import JobError
from mobilellm_pro.evaluation.held_out import held_out
from mobilellm_pro.pipeline import ablation
from mobilellm_pro.pipeline.ablation import ablate
from mobilellm_pro.pipeline.ablation_grid import Variant, load_grid
from mobilellm_pro.pipeline.run_command import CommandFailed
from tests.pipeline.test_ablation_grid import GOOD, write_grid
from tests.training.small_world import SmallWorld

SAVED = ("--checkpoint.enable", "--checkpoint.interval", "3", "--checkpoint.no_last_save_model_only")


@pytest.fixture(scope="module")
def grid(world: SmallWorld, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A grid whose job begins with a run of three steps."""
    folder = tmp_path_factory.mktemp("ablation")
    path = write_grid(folder, world)
    world.run(str(folder / "phase_1"), 1, *SAVED)
    return path


@pytest.fixture(autouse=True)
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRAIN_COMMAND", f"{sys.executable} -m mobilellm_pro train")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="module")
def ablated(grid: Path) -> tuple[list[dict[str, Any]], str]:
    """The rows of the table after two starts, the first for a part of the variants, and what the second printed."""
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(StringIO()) as printed:
        patch.setenv("TRAIN_COMMAND", f"{sys.executable} -m mobilellm_pro train")
        patch.setenv("OMP_NUM_THREADS", "1")
        ablate(str(grid), only=["plain", "before"])
        assert (
            "| labels | `distill.objective = ce`, `attention.rope_base = 500` | - | - | - | - |" in printed.getvalue()
        )
        printed.truncate(0)
        rows = ablate(str(grid))
    assert rows is not None
    return rows, printed.getvalue()


@pytest.mark.slow
def test_from_the_grid_to_the_table(grid: Path, ablated: tuple[list[dict[str, Any]], str]) -> None:
    folder, (rows, printed) = grid.parent / "outputs/ablations/grid", ablated
    assert [row["name"] for row in rows] == ["plain", "before", "labels"]
    assert "plain (DONE)" in printed and "labels: train took" in printed and "plain: train" not in printed
    table = (folder / "grid.md").read_text()
    assert table.strip() in printed and json.loads((folder / "grid.json").read_text())["variants"] == rows
    header = (folder / "grid.png").read_bytes()[:24]
    assert header.startswith(b"\x89PNG") and min(struct.unpack(">II", header[16:])) > 300
    # What the table says is what the runs and the tests say.
    plan = load_grid(grid)
    for row, variant in zip(rows, plan.variants, strict=True):
        assert (row["steps"], row["tokens"]) == ((2, 2 * 4 * 256) if variant.train else (0, 0))
        assert (row["needle"]["total"], row["needle"]["lengths"]) == (4, [200, 240])
        result = held_out(row["checkpoint"], plan.base)
        assert result is not None and row["bits_per_byte"] == result["bits_per_byte"]
        assert (
            f"| {row['steps']:,} | {row['tokens']:,} | {row['bits_per_byte']:.4f} | {row['needle']['score']:.2f} |"
            in table
        )
    assert len({row["bits_per_byte"] for row in rows}) == 3
    assert rows[1]["checkpoint"].endswith("phase_1/checkpoint/step-3") and not (folder / "before/checkpoint").exists()


@pytest.mark.slow
def test_what_is_there_is_not_done_again(
    grid: Path, ablated: tuple[list[dict[str, Any]], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is missing, or of other documents, is done by the user's command."""
    folder = grid.parent / "outputs/ablations/grid"
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.json*")}
    started: list[str] = []

    def run(plan: object, variant: Variant, kind: str, command: list[str]) -> None:
        started.append(f"{variant.name} {kind}")
        assert command[0] == "the-program" and main(command[1:]) == 0

    monkeypatch.setenv("EVALUATE_COMMAND", "the-program")
    monkeypatch.setattr(ablation, "_run", run)
    rows = ablated[0]
    assert ablate(str(grid)) == rows and not started and all(row["needle"] for row in rows)
    changed = [path for path, time in before.items() if path.stat().st_mtime_ns != time]
    assert [path.name for path in changed] == ["grid.json"]
    (needle_result,) = (folder / "before/evaluation/step-3").glob("needle_*/needle.json")
    needle_result.unlink()
    grid.write_text(GOOD.replace("training.steps = 2", "training.steps = 2\nvalidation.steps = 2"))
    with pytest.raises(JobError, match="other values of validation.steps is DONE here"):
        ablate(str(grid), only=["plain"])
    again = ablate(str(grid), only=["before"])
    assert started == ["before needle", "before held-out"] and again is not None
    assert again[1]["needle"] == rows[1]["needle"] and again[1]["bits_per_byte"] != rows[1]["bits_per_byte"]
    assert again[0]["bits_per_byte"] is None  # of other documents
    started.clear()
    grid.write_text(GOOD.replace("[200, 240]", "[200, 250]"))  # another test beside the first, nothing trained
    other = ablate(str(grid), only=["plain"])
    assert started == ["plain needle"] and other is not None and other[2]["needle"] is None
    assert other[0]["needle"]["lengths"] == [200, 250]
    grid.write_text(GOOD)
    assert ablate(str(grid)) == rows and started == ["plain needle"]


def test_a_dry_run_starts_nothing(grid: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
                                  monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.delenv("TRAIN_COMMAND")
    monkeypatch.setenv("NPROC", "2")
    monkeypatch.setenv("EVALUATE_COMMAND", "torchrun --nproc-per-node 2 -m mobilellm_pro")
    assert main(["ablate", str(grid), "--dry-run", "--only", "labels", "before", "--output", str(tmp_path / "x")]) == 0
    printed = capsys.readouterr().out
    assert "2 of 3 variants" in printed and "processes of a run: 2" in printed and "plain" not in printed
    assert "before (not trained): Where it starts." in printed
    words = "--training.steps=2 --training.seq_len=256 --distill.objective=ce --attention.rope_base=500"
    assert f"bash launch/train.sh {grid.parent}/job.toml {words} --job.dump_folder={tmp_path}/x/labels" in printed
    evaluate = "torchrun --nproc-per-node 2 -m mobilellm_pro"
    assert f"{evaluate} needle {tmp_path}/x/labels/checkpoint/step-2 --output" in printed
    assert f"{evaluate} held-out {grid.parent}/phase_1/checkpoint/step-3 {grid.parent}/job.toml --training" in printed
    assert printed.count("--allow-longer") == 1 and not (tmp_path / "x").exists()


def test_the_first_failure_ends_it_and_names_its_log(
    grid: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "train.sh"
    program.write_text('echo "trains $*"\necho "out of luck" >&2\nexit 3\n')
    monkeypatch.setenv("TRAIN_COMMAND", f"bash {program}")
    with pytest.raises(CommandFailed) as error:
        ablate(str(grid), output=str(tmp_path / "out"))
    log = tmp_path / "out/logs/plain_train.log"
    text = str(error.value)
    assert 'variant "plain": train ended with status 3' in text and str(log) in text and "out of luck" in text
    assert log.read_text().startswith(f"$ bash {program} {grid.parent}/job.toml --training.steps=2")
    assert [path.name for path in log.parent.iterdir()] == ["plain_train.log"]
    monkeypatch.setenv("TRAIN_COMMAND", "no-such-program")
    with pytest.raises(CommandFailed, match="no-such-program: no such program; correct TRAIN_COMMAND"):
        ablate(str(grid), output=str(tmp_path / "out"))


def test_what_cannot_run_is_named_before_anything_runs(
    grid: Path, world: SmallWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ablation, "_run", lambda *_: pytest.fail("started"))
    text = GOOD.replace("[200, 240]", "[60, 240]").replace(
        "training.steps = 2", "training.steps = 2\ndata.tokenizer = ''"
    )
    with pytest.raises(ValueError, match="data.tokenizer"):
        ablate(str(write_grid(tmp_path / "a", world, text)))
    path = write_grid(tmp_path / "b", world, GOOD.replace("[200, 240]", "[60, 240]"))
    with pytest.raises(JobError) as error:
        ablate(str(path))
    text = str(error.value)
    assert "[needle]: lengths: 60 tokens do not hold the question" in text
    assert "no such folder (variant plain, labels)" in text and "no complete checkpoint (variant before)" in text
    assert text.startswith("3 problems")
    path = write_grid(tmp_path / "c", world, GOOD.replace("training.steps = 2", "validation.enable = false"))
    with pytest.raises(JobError, match="validation.enable = false: it says how much"):
        ablate(str(path))

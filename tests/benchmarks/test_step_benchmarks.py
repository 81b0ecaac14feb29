"""The benchmarks of whole steps, at a size where their figures say nothing: that they measure what they say."""

import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="one of the compared trainers")
pytest.importorskip("accelerate", reason="its Trainer needs it")

ROOT = Path(__file__).parents[2]
SLOWER = """

def slower(self, batches, _quick=DistillTrainer.train_step):
    import time

    time.sleep(0.5)
    return _quick(self, batches)


DistillTrainer.train_step = slower
"""


def run(root: Path, script: str, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, root / "benchmarks" / script, "--seq-len", "256", *words]
    return subprocess.run(command, cwd=root, capture_output=True, text=True)


@pytest.mark.slow
def test_train_step(tmp_path: Path) -> None:
    ways, table = ("ce", "kl-cached", "torchtitan", "transformers"), tmp_path / "table.md"
    done = run(ROOT, "train_step.py", "--rounds", "2", "--ways", *ways, "--write", str(table))
    assert done.returncode == 0, done.stderr
    assert done.stdout == table.read_text()
    found = json.loads(table.with_suffix(".json").read_text())
    assert list(found) == list(ways)
    for name, way in found.items():
        row = next(line for line in done.stdout.splitlines() if line.startswith(f"| {way['name']} |"))
        assert f"| {256 / way['step']:,.0f} |" in row
        assert [len(turn) for turn in way["seconds"]] == [2, 2]
        assert way["step"] > 0 and way["memory"] > 100
        assert ("shares" in way) is (name in ("ce", "kl-cached"))
        assert math.isclose(sum(way.get("shares", {"all": 1}).values()), 1)
    sizes = {name: way["parameters"] for name, way in found.items()}
    assert sizes["ce"] == sizes["kl-cached"] == sizes["transformers"] < sizes["torchtitan"]
    # A cached teacher costs a product of its head with each token, and nothing of its layers.
    assert found["ce"]["flops_per_token"] < found["kl-cached"]["flops_per_token"]


@pytest.fixture(scope="module")
def two_commits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """This code in a repository of its own, and a commit that makes every step half a second longer."""
    root = tmp_path_factory.mktemp("two_commits") / "checkout"
    for folder in ("benchmarks", "mobilellm_pro", "tests"):
        shutil.copytree(ROOT / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__", "results"))
    git = ["git", "-C", str(root), "-c", "user.name=test", "-c", "user.email=test@localhost"]
    subprocess.run(["git", "init", "--quiet", root], check=True)
    for name in ("quick", "slow"):
        if name == "slow":
            with (root / "mobilellm_pro/training/distill_trainer.py").open("a") as module:
                module.write(SLOWER)
        subprocess.run([*git, "add", "--all"], check=True)
        subprocess.run([*git, "commit", "--quiet", "--message", name], check=True)
        subprocess.run([*git, "tag", name], check=True)
    return root


@pytest.mark.slow
def test_guard_tells_a_slower_commit(two_commits: Path) -> None:
    done = run(two_commits, "guard.py", "quick", "slow", "--turns", "3", "--fail-above", "1.1")
    assert done.returncode == 1, done.stderr
    found = re.search(r"takes ([\d.]+) of\n.*95 %: ([\d.]+) to ([\d.]+), 3 turns", done.stdout)
    assert found, done.stdout
    ratio, low, high = map(float, found.groups())
    assert 1.1 < low < ratio < high
    trees = subprocess.run(["git", "worktree", "list"], cwd=two_commits, check=True, capture_output=True, text=True)
    assert len(trees.stdout.splitlines()) == 1  # its own are gone


def test_guard_names_what_is_no_commit(two_commits: Path) -> None:
    done = run(two_commits, "guard.py", "quick", "no-such-commit")
    assert done.returncode == 1
    assert "cannot check out no-such-commit" in done.stderr


def test_guard_needs_two_turns(two_commits: Path) -> None:
    done = run(two_commits, "guard.py", "quick", "slow", "--turns", "1")
    assert done.returncode == 2
    assert "--turns: one turn has no interval; expected at least 2" in done.stderr

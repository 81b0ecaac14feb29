"""The commands of a user, as processes: torchrun starts training, errors end it before any process group."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.training.small_world import SmallWorld, losses

ROOT = Path(__file__).parents[2]


def command(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        words, cwd=ROOT, capture_output=True, text=True, timeout=150, env={**os.environ, **environment}
    )  # fmt: skip


def torchrun(ranks: int, *words: str) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={ranks}", "--rdzv_backend=c10d"]
    return command(
        *launcher, "--rdzv_endpoint=localhost:0", "-m", "mobilellm_pro", "train", *words, OMP_NUM_THREADS="1"
    )


@pytest.mark.slow
def test_torchrun_trains_like_forked_ranks(world: SmallWorld) -> None:
    expected = losses(world.run("torchrun/forked", 2, "--training.local_batch_size", "2"))
    folder = world.folder / "torchrun/real"
    done = torchrun(2, str(world.job), "--job.dump_folder", str(folder), "--training.local_batch_size", "2")
    assert done.returncode == 0, done.stderr[-3000:]
    assert losses(folder) == expected
    assert "teacher perplexity on the first batch" in done.stderr + done.stdout


@pytest.mark.slow
def test_an_error_is_said_once_and_before_any_process_group(world: SmallWorld) -> None:
    done = torchrun(2, str(world.job), "--model.flavor", "3b", "--data.tokenizer", "nowhere.model")
    assert done.returncode != 0
    assert done.stderr.count("model.flavor = '3b' is unknown; expected one of 1b, debug") == 1
    assert done.stderr.count("nowhere.model does not exist") == 1
    assert "Building device mesh" not in done.stderr + done.stdout


def test_one_process_needs_no_torchrun(world: SmallWorld) -> None:
    folder = world.folder / "torchrun/alone"
    words = ("train", str(world.job), "--job.dump_folder", str(folder), "--training.steps", "1")
    environment = {"OMP_NUM_THREADS": "1"}
    done = command(sys.executable, "-m", "mobilellm_pro", *words, **environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert losses(folder) == pytest.approx(losses(world.run("torchrun/one", 1, "--training.steps", "1")), rel=1e-6)

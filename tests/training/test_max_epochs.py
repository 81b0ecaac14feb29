"""A corpus that may be read only so often: refused before the start, or a run that ends early but in order."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from mobilellm_pro.config import load
from mobilellm_pro.model.checkpoint import load_model
from mobilellm_pro.training.preflight import problems
from mobilellm_pro.training.run_folder import read_metrics
from tests.training.small_world import SmallWorld, losses

SAVED = ("--checkpoint.enable", "--validation.enable", "--validation.steps", "1", "--validation.seq_len", "64",
         "--validation.local_batch_size", "2", "--validation.freq", "100")  # fmt: skip


@pytest.fixture(scope="module")
def limited(world: SmallWorld) -> SmallWorld:
    """Corpus b may be read for 4 of the 20 steps; of the 4 rows of a step, 1.2 are from b."""
    tokens = json.loads((world.folder / "tokens/b/manifest.json").read_text())["shards"]["train"]
    share = 4.5 * 1.2 * 64 / sum(shard["tokens"] for shard in tokens)
    job = world.folder / "limited.toml"
    text = world.job.read_text().replace("weight = 0.3", f"weight = 0.3\nmax_epochs = {share}")
    job.write_text(text.replace("steps = 3\n", "steps = 20\n"))
    return replace(world, job=job)


def test_refused_before_the_start(limited: SmallWorld) -> None:
    (problem,) = problems(load(limited.job, []), 1)
    assert "b passes its max_epochs after step 4 of 20" in problem and 'data.on_max_epochs = "stop"' in problem
    assert problems(load(limited.job, ["--data.on_max_epochs", "stop"]), 1) == []
    assert problems(load(limited.job, ["--training.steps", "4", "--lr_scheduler.warmup_steps", "1"]), 1) == []


def test_stopped_before_the_limit(limited: SmallWorld) -> None:
    folder = limited.run("limited", 1, "--data.on_max_epochs", "stop", *SAVED)
    done = json.loads((folder / "DONE").read_text())
    assert (done["steps"], done["configured_steps"]) == (4, 20)
    assert done["checkpoint"] == str(folder / "checkpoint/step-4") and load_model(folder).model is not None
    assert [record["step"] for record in read_metrics(folder, "validation")] == [4]
    epochs = losses(folder, "epochs/b")
    assert len(epochs) == 4 and epochs == sorted(epochs) and 0 < epochs[0]
    before = (folder / "metrics.jsonl").stat().st_mtime_ns
    limited.run("limited", 1, "--data.on_max_epochs", "stop", *SAVED)
    assert (folder / "metrics.jsonl").stat().st_mtime_ns == before


def test_a_run_says_what_it_reads(limited: SmallWorld) -> None:
    folder = limited.run("described", 1, "--data.on_max_epochs", "stop", "--data.packing", "best_fit")
    data = json.loads((folder / "data.json").read_text())
    assert "best_fit" in data["identity"]
    assert [(c["name"], c["weight"]) for c in data["corpora"]] == [("a", 0.7), ("b", 0.3)]
    assert all(Path(c["path"]).is_dir() and c["tokens"] and c["shards_sha256"] for c in data["corpora"])

"""Everything that a distillation run needs, small enough for seconds: corpora, a random teacher, a job file, and `run`.

A run happens in forked ranks (`tests.ranks`), through the same `train` function as the command line.
"""

import json
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from mobilellm_pro.convert.conversion import write_safetensors
from mobilellm_pro.model.hugging_face import hugging_face_name, teacher_config
from mobilellm_pro.model.teacher import FLAVORS, Teacher
from mobilellm_pro.training.run_folder import read_metrics
from tests.data.synthetic import DEBUG_TOKENIZER, make_corpora
from tests.ranks import run_ranks

JOB = """
[job]
dump_folder = "{folder}/run"
[model]
name = "mobilellm_pro"
flavor = "debug"
[attention]
window = 16
[teacher]
path = "{folder}/teacher"
dtype = "float32"
[data]
tokenizer = "{tokenizer}"
seed = 3
[[data.datasets]]
name = "a"
path = "{folder}/tokens/a"
weight = 0.7
[[data.datasets]]
name = "b"
path = "{folder}/tokens/b"
weight = 0.3
[training]
seq_len = 64
local_batch_size = 4
global_batch_size = 4
steps = 3
mixed_precision_param = "float32"
[optimizer]
lr = 3e-3
implementation = "foreach"
[lr_scheduler]
warmup_steps = 1
decay_type = "cosine"
[metrics]
log_freq = 1
[activation_checkpoint]
mode = "none"
[debug]
seed = 7
deterministic = true
"""


@dataclass(frozen=True)
class SmallWorld:
    """Where things are."""

    folder: Path
    job: Path

    def run(self, name: str, ranks: int = 1, *overrides: str) -> Path:
        """Trains in `folder/name` on so many ranks and returns that folder."""
        folder = self.folder / name
        run_ranks(train_job, ranks, str(self.job), str(folder), list(overrides))
        return folder


def train_job(job: str, dump_folder: str, overrides: list[str]) -> None:
    """One rank's part of a run, as the `train` verb does it."""
    from mobilellm_pro.config import load
    from mobilellm_pro.pipeline.train_job import train

    train(load(job, ["--job.dump_folder", dump_folder, *overrides]), job)


def make_small_world(folder: Path) -> SmallWorld:
    """Writes corpora, teacher and job file."""
    make_corpora(folder, ("a", "b"), documents=400)
    torch.manual_seed(11)
    args = replace(
        FLAVORS["debug"], num_hidden_layers=4, attention_chunk_size=24, floor_scale=16, initializer_range=0.1
    )
    write_teacher(Teacher(args), folder / "teacher")
    job = folder / "job.toml"
    job.write_text(JOB.format(folder=folder, tokenizer=DEBUG_TOKENIZER))
    return SmallWorld(folder, job)


def write_teacher(teacher: Teacher, folder: Path) -> None:
    """Random weights (unless initialised already) as a Hugging Face folder."""
    teacher.init_weights()
    folder.mkdir(parents=True)
    dtype = str(teacher.norm.weight.dtype).removeprefix("torch.")
    config = teacher_config(teacher.model_args, bos_id=1, eos_id=2, pad_id=3, dtype=dtype)
    (folder / "config.json").write_text(json.dumps(config))
    write_safetensors({hugging_face_name(k): v for k, v in teacher.state_dict().items()}, folder)


def losses(folder: Path, key: str = "loss") -> list[float]:
    """One number a step, in order."""
    return [record[key] for record in read_metrics(folder, "train")]


def wait_for_step(folder: Path, step: int) -> None:
    """Returns when a run has logged a step; AssertionError after a minute."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if (folder / "metrics.jsonl").is_file() and len(read_metrics(folder, "train")) >= step:
            return
        time.sleep(0.01)
    raise AssertionError(f"no step {step} within a minute")

"""A parent and two specialists on small corpora: real run folders (config.toml and DCP) after a few steps of AdamW."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed.checkpoint as dcp

from mobilellm_pro.config import load, resolved_toml
from mobilellm_pro.data.prepare import prepare
from mobilellm_pro.data.shards import Corpus
from mobilellm_pro.losses import linear_cross_entropy
from mobilellm_pro.model.checkpoint import empty_model, load_model
from mobilellm_pro.model.student import Student
from tests.data.synthetic import DEBUG_TOKENIZER, make_corpora, write_toml

DOMAINS = ("a", "b")

JOB = """
[job]
dump_folder = "{folder}/parent"
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
[[data.datasets]]
name = "a"
path = "{folder}/tokens/a"
weight = 0.5
[[data.datasets]]
name = "b"
path = "{folder}/tokens/b"
weight = 0.5
[training]
seq_len = 64
[checkpoint]
enable = true
[validation]
enable = true
seq_len = 64
local_batch_size = 4
steps = 4
"""

MERGE = """
output = "{folder}/merged"
job = "job.toml"
[[branch]]
name = "a"
checkpoint = "{folder}/branch_a"
[[branch]]
name = "b"
checkpoint = "{folder}/branch_b"
[search]
budget = 16
draws = 3
[warnings]
barrier_points = 2
"""


@dataclass(frozen=True)
class Specialists:
    """Where things are."""

    folder: Path
    merge: Path
    """3_merge.toml."""

    @property
    def words(self) -> list[str]:
        """The branches' checkpoints as words."""
        return [f"{name}={self.folder / f'branch_{name}'}/checkpoint/step-1" for name in DOMAINS]

    def file(self, path: Path, *changes: tuple[str, str]) -> Path:
        """A copy of the merge's file beside `job.toml`, with texts replaced."""
        text = self.merge.read_text()
        for old, new in changes:
            assert old in text
            text = text.replace(old, new)
        path.write_text(text)
        (path.parent / "job.toml").write_text((self.folder / "job.toml").read_text())
        return path


def make_specialists(folder: Path) -> Specialists:
    """Writes corpora with a dev part, a job, the runs of a parent and its branches, and a file that merges them."""
    make_corpora(folder / "first", DOMAINS, documents=300)
    (folder / "first/text").rename(folder / "text")
    prepare(write_toml(folder, DOMAINS, holdout=0.1, dev=0.1, shard_tokens=5_000), workers=0)
    job = folder / "job.toml"
    job.write_text(JOB.format(folder=folder, tokenizer=DEBUG_TOKENIZER))
    torch.manual_seed(5)
    parent = empty_model(load(job))
    parent.init_weights()
    _train(parent, folder, DOMAINS, 12)
    write_run(folder / "parent", job, parent)
    for name in DOMAINS:
        branch = load_model(folder / "parent").model
        _train(branch, folder, (name,), 8)
        write_run(folder / f"branch_{name}", job, branch, parent=folder / "parent/checkpoint/step-1")
    merge = folder / "3_merge.toml"
    merge.write_text(MERGE.format(folder=folder))
    return Specialists(folder, merge)


def write_run(folder: Path, job: Path, model: torch.nn.Module, parent: Path | None = None, *words: str) -> Path:
    """A run folder as `train` leaves it, at step 1."""
    initial = [] if parent is None else ["--checkpoint.initial_load_path", str(parent)]
    folder.mkdir(parents=True)
    config = load(job, ["--job.dump_folder", str(folder), *initial, *words])
    (folder / "config.toml").write_text(resolved_toml(config))
    dcp.save(model.state_dict(), checkpoint_id=str(folder / "checkpoint/step-1"), no_dist=True)
    return folder


def _train(model: torch.nn.Module, folder: Path, corpora: Sequence[str], steps: int) -> None:
    """A few steps on the first documents of the corpora, a row each."""
    assert isinstance(model, Student)
    model.requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    opened = [Corpus.open(folder / "tokens" / name) for name in corpora]
    for step in range(steps):
        optimizer.zero_grad()
        for corpus in opened:
            rows = _rows(corpus, step)
            loss = partial(linear_cross_entropy, labels=rows[:, 1:])
            head: Callable[..., torch.Tensor] = loss
            (model(rows[:, :-1], head=head) / rows[:, 1:].numel()).backward()
        optimizer.step()
    model.requires_grad_(False)


def _rows(corpus: Corpus, step: int, rows: int = 8, tokens: int = 65) -> torch.Tensor:
    """[rows, tokens] of the corpus read on and on."""
    ids = np.concatenate([corpus.tokens(d, 0, int(corpus.lengths(d, d + 1)[0])) for d in range(corpus.num_documents)])
    first = step * rows * tokens
    return torch.from_numpy(np.resize(ids, first + rows * tokens)[first:].astype(np.int64)).view(rows, tokens)

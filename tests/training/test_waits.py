"""Where a step waits for a GPU to tell a number: once to count the tokens that are trained on, once to judge the step.

On a CPU the operations that would wait are found by their names, all but reading a whole tensor, as the judge of the
step does; with a GPU, CUDA itself names them.
"""

import traceback
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mobilellm_pro.config import load
from mobilellm_pro.training.distill_trainer import DistillTrainer
from mobilellm_pro.training.train_spec import register
from tests.ranks import run_ranks
from tests.training.small_world import SmallWorld

aten = torch.ops.aten
WAITING = {
    aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten._unique2, aten.unique_dim, aten.unique_consecutive,
    aten.equal, aten.is_nonzero, aten.repeat_interleave,
}  # fmt: skip
WAITS = {"token_chunks.py": 1}
"""File -> waits of a step with one micro-batch."""


class Waits(TorchDispatchMode):
    """Counts operations whose results the host needs, by the file of this project or of torchtitan that asks."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in WAITING:
            stack = [frame for frame in traceback.extract_stack() if is_ours(frame.filename)]
            self.found[Path(stack[-1].filename).name] += 1
        return func(*args, **(kwargs or {}))


def is_ours(path: str) -> bool:
    return "mobilellm_pro" in path or "torchtitan" in path


def waits_of_a_step(job: Path, folder: Path, objective: str) -> dict[str, int]:
    """Of the fourth, which logs nothing."""
    register()
    words = ["--job.dump_folder", str(folder), "--training.steps", "8", "--metrics.log_freq", "8"]
    words += ["--optimizer.implementation", "fused"]  # the others read numbers that stay on the CPU
    trainer = DistillTrainer(load(job, [*words, "--distill.objective", objective]))
    batches = trainer.batch_generator(trainer.dataloader)
    for step in range(1, 5):
        trainer.step = step
        if step < 4:
            trainer.train_step(batches)
    if trainer.device.type == "cuda":
        return waits_by_cuda(trainer, batches)
    with Waits() as waits:
        trainer.train_step(batches)
    return dict(waits.found)


def waits_by_cuda(trainer: DistillTrainer, batches: Any) -> dict[str, int]:
    """What CUDA itself warns of, but copies of the rows, which are there before the GPU has anything to do."""
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        trainer.train_step(batches)
    torch.cuda.set_sync_debug_mode("default")
    names = [Path(warning.filename).name for warning in found if "synchroniz" in str(warning.message)]
    return dict(Counter(name for name in names if name != "train.py"))


@pytest.mark.parametrize("objective", ["ce", "kl"])
def test_a_step_waits_for_one_number_and_its_judgement(world: SmallWorld, tmp_path: Path, objective: str) -> None:
    (found,) = run_ranks(waits_of_a_step, 1, world.job, tmp_path, objective)
    assert found == WAITS


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_cuda_finds_no_other_waits(world: SmallWorld, tmp_path: Path) -> None:
    assert waits_of_a_step(world.job, tmp_path / "run", "kl") == WAITS | {"step_guard.py": 1}

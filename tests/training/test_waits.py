"""Where a step waits for a GPU to tell a number: once to count the tokens that are trained on, once to judge the step.

On a CPU the operations that would wait are found by their names; copies between host and device, as the one with which
the step is judged, are none there. With a GPU, CUDA itself names them.
"""

import linecache
import traceback
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torchtitan.train
from torch.utils._python_dispatch import TorchDispatchMode
from torchtitan.tools.utils import device_type

import mobilellm_pro
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
BY_INDEX = {aten.index, aten.index_put, aten.index_put_}
WAITS = {"token_chunks.py": 1}
"""File -> waits of a step with one micro-batch."""


class Waits(TorchDispatchMode):
    """Counts operations whose results the host needs, by the file of this project or of torchtitan that asks."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        by_mask = func.overloadpacket in BY_INDEX and any(i is not None and i.dtype == torch.bool for i in args[1])
        if func.overloadpacket in WAITING or by_mask:
            stack = [frame for frame in traceback.extract_stack() if is_ours(frame.filename)]
            self.found[Path(stack[-1].filename).name] += 1
        return func(*args, **(kwargs or {}))


def is_ours(path: str) -> bool:
    return any(Path(package.__file__).parent in Path(path).parents for package in (mobilellm_pro, torchtitan))


def waits_of_a_step(job: Path, folder: Path, objective: str) -> dict[str, int]:
    """Of the fourth, which logs nothing."""
    register()
    words = ["--job.dump_folder", str(folder), "--training.steps", "8", "--metrics.log_freq", "8"]
    words += ["--optimizer.implementation", "fused"]  # the others read numbers that stay on the CPU
    words += ["--teacher.dtype", "bfloat16"]  # the type of a GPU's grouped products
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
    """What CUDA itself warns of, but torchtitan's own copies of the rows, which come before the step's work."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            trainer.train_step(batches)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = [wait for wait in found if "synchroniz" in str(wait.message) and not copies_rows(wait)]
    return dict(Counter(Path(wait.filename).name for wait in waits))


def copies_rows(wait: warnings.WarningMessage) -> bool:
    line = linecache.getline(wait.filename, wait.lineno)
    return Path(wait.filename) == Path(torchtitan.train.__file__) and ".to(" in line


@pytest.mark.skipif(device_type != "cpu", reason="finds the operations of the CPU")
@pytest.mark.parametrize("objective", ["ce", "kl"])
def test_a_step_waits_for_one_number_and_its_judgement(world: SmallWorld, tmp_path: Path, objective: str) -> None:
    (found,) = run_ranks(waits_of_a_step, 1, world.job, tmp_path, objective)
    assert found == WAITS | {"problem.py": 1}, "where labels are looked at, on a CPU only"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("objective", ["ce", "kl"])
def test_cuda_finds_no_other_waits(world: SmallWorld, tmp_path: Path, objective: str) -> None:
    (found,) = run_ranks(waits_of_a_step, 1, world.job, tmp_path, objective)
    assert found == WAITS | {"step_guard.py": 1}

"""A training step over one row of 32,768 tokens on two ranks fits 4 GiB: no mask of queries × keys is made."""

import math
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torchtitan.distributed import ParallelDims

from mobilellm_pro.model import attention_mask
from mobilellm_pro.model.row_shard import own_shard
from tests.pipeline.measured_step import Step, load_step
from tests.ranks import run_ranks

NUM_TOKENS, RANKS = 32_768, 2
LIMIT_BYTES = 4 * 2**30
"""Of both ranks together."""


class StepOnRank(NamedTuple):
    """What one rank saw."""

    peak_bytes: int
    """Most that was resident in the step, the program included."""

    grown_bytes: int
    """Of these, what was not there before the step."""

    loss: float
    finite: bool
    """All gradients are, and none is missing or zero everywhere."""

    seconds: float
    """Of this rank's core."""


def train_one_step(num_tokens: int, dense_elements: float) -> StepOnRank:
    """Teacher, student, loss over the whole vocabulary, backward and optimizer on ranks that share a row.

    Args:
        num_tokens: of the row, over all ranks.
        dense_elements: of a mask that is made as a whole, at most.
    """
    attention_mask.DENSE_ELEMENTS = dense_elements  # type: ignore[assignment]
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    ranks = dist.get_world_size()
    sizes = ("--training.local_batch_size=1", f"--training.seq_len={num_tokens}")
    config, teacher = load_step("debug", *sizes, f"--parallelism.context_parallel_degree={ranks}")
    dims = ParallelDims(1, 1, cp=ranks, tp=1, pp=1, ep=1, etp=1, world_size=ranks)
    step = Step(config, teacher, dims)
    step.shard = own_shard(num_tokens, dims, config.attention.context_layout)
    step.tokens, step.labels = random_rows(step, num_tokens)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before, begin = resident_bytes("VmRSS"), time.process_time()
    for name in ("teacher", "student", "loss"):
        step.parts()[name]()
    loss = step.terms.loss.item()
    step.run_backward()
    step.run_optimizer()
    gradients = [parameter.grad for parameter in step.student.parameters()]
    return StepOnRank(
        peak_bytes=(peak := resident_bytes("VmHWM")),
        grown_bytes=peak - before,
        loss=loss,
        finite=all(bool(x is not None and x.isfinite().all() and x.any()) for x in map(local, gradients)),
        seconds=time.process_time() - begin,
    )


def random_rows(step: Step, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """This rank's tokens and labels of a row of five documents, the middle one of which lies on both ranks."""
    step.document_ids = torch.tensor([[0, 1, 1, 2, 2, 3, 3, 4]]).repeat_interleave(num_tokens // 8, dim=1)
    drawn = torch.randint(4096, (1, num_tokens + 1), generator=torch.Generator().manual_seed(0))
    return step.shard.take(drawn[:, :-1]), step.shard.take(drawn[:, 1:])


def local(gradient: torch.Tensor | DTensor | None) -> torch.Tensor | None:
    """This rank's part."""
    return gradient.to_local() if isinstance(gradient, DTensor) else gradient


def resident_bytes(field: str) -> int:
    """VmRSS or VmHWM of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024


def test_a_step_of_32_768_tokens_fits_4_gib() -> None:
    """Pages that the forked ranks share are counted for each of them."""
    ranks = run_ranks(train_one_step, RANKS, NUM_TOKENS, attention_mask.DENSE_ELEMENTS, timeout_seconds=240)
    assert sum(rank.peak_bytes for rank in ranks) < LIMIT_BYTES, ranks
    for rank in ranks:
        assert math.isfinite(rank.loss) and rank.finite, ranks


def test_dense_masks_would_not_fit() -> None:
    """At a quarter of the length, masks of queries × keys add a sixteenth of what they would at the whole."""
    length = NUM_TOKENS // 4
    grown = {
        limit: sum(rank.grown_bytes for rank in run_ranks(train_one_step, RANKS, length, limit, timeout_seconds=140))
        for limit in (attention_mask.DENSE_ELEMENTS, math.inf)
    }
    assert 16 * (grown[math.inf] - grown[attention_mask.DENSE_ELEMENTS]) > LIMIT_BYTES, grown

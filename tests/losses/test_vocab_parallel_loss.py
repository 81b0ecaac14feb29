"""A vocabulary split over ranks gives the loss and the gradients of one rank, with one small collective a chunk.

One launch of processes serves all cases of a world size: starting them costs more than the cases.

Shape suffixes: T tokens, V vocabulary, D student width, E teacher width.
"""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from loss_definition import Case, random_case, relative_error
from test_linear_distillation import run
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.debug import CommDebugMode

from mobilellm_pro.losses import DistillationLoss, linear_top_k_distillation, token_chunks

VOCABULARY = 67
# What the ranks' imports cost; only installed packages can be imported ahead, not modules of this folder.
PRELOADED = ["torch.distributed.tensor.debug", "torch.multiprocessing", "hypothesis.strategies", "pytest"]
SPLITS = {2: [(34, 33), (1, 66), (50, 17)], 4: [(17, 17, 17, 16), (1, 2, 3, 61), (40, 9, 9, 9)]}


def cases() -> list[Case]:
    settings = [
        {"temperature": 1.0},
        {"temperature": 2.0, "kl_weight": 0.6, "ce_weight": 0.4},
        {"temperature": 0.5, "logit_scale": 300.0, "ce_weight": 1.0},
        {"kl_weight": 0.0, "ce_weight": 1.0, "zero_weights": 1.0},
    ]
    return [random_case(11, VOCABULARY, 6, 9, dtype=torch.float32, seed=s, **kw) for s, kw in enumerate(settings)]


def run_top_k(case: Case, ids: torch.Tensor, log_probs: torch.Tensor, **keywords: object) -> DistillationLoss:
    arguments = case.student_hidden, case.student_head, ids, log_probs, case.labels
    return linear_top_k_distillation(*arguments, token_weights=case.weights, ce_weight=0.5, **keywords)


def compare_top_k_with_one_rank(rank: int, split: tuple[int, ...], group: object) -> None:
    rows = slice(sum(split[:rank]), sum(split[: rank + 1]))
    case = cases()[0]
    log_probs, ids = (case.teacher_hidden @ case.teacher_head.T).log_softmax(-1).topk(5)
    whole, part = case.leaves(), replace(case, student_head=case.student_head[rows]).leaves()
    expected = run_top_k(whole, ids, log_probs, chunk_tokens=4)
    got = run_top_k(part, ids, log_probs, chunk_tokens=4, vocab_group=group)
    expected.loss.backward()
    got.loss.backward()
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(part.student_hidden.grad, whole.student_hidden.grad, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(part.student_head.grad, whole.student_head.grad[rows], rtol=1e-5, atol=1e-5)


def compare_with_one_rank(rank: int, split: tuple[int, ...], group: object) -> None:
    begin, size = sum(split[:rank]), split[rank]
    rows = slice(begin, begin + size)
    for case in cases():
        whole = case.leaves()
        expected = run(whole, chunk_tokens=4)
        (expected.loss * 3).backward()
        part = replace(case, student_head=case.student_head[rows], teacher_head=case.teacher_head[rows]).leaves()
        with CommDebugMode() as communication:
            got = run(part, chunk_tokens=4, vocab_group=group)
            (got.loss * 3).backward()
        for a, b in zip(got, expected, strict=True):
            assert abs(a.item() - b.item()) <= 1e-5 * abs(b.item()) + 1e-5, (split, got, expected)
        assert relative_error(part.student_hidden.grad, whole.student_hidden.grad) < 1e-5
        assert relative_error(part.student_head.grad, whole.student_head.grad[rows]) < 1e-5 or size == 1
        num_chunks = math.ceil(int((case.weights != 0).sum()) / 4) or 1
        # One for the sizes of the slices, one a chunk, one for the gradient of the hidden states.
        assert communication.get_total_counts() <= num_chunks + 2, communication.get_comm_counts()


def choose_chunks_together(rank: int, split: tuple[int, ...], group: object) -> None:
    """Chunks chosen from a budget of bytes, with slices of different sizes: every rank must choose the same."""
    rows = slice(sum(split[:rank]), sum(split[: rank + 1]))
    case = random_case(64, VOCABULARY, 6, 9, dtype=torch.bfloat16)
    budget = token_chunks.LOGIT_BYTES["cpu"]
    token_chunks.LOGIT_BYTES["cpu"] = 16 * VOCABULARY * 4
    whole = case.leaves()
    part = replace(case, student_head=case.student_head[rows], teacher_head=case.teacher_head[rows]).leaves()
    expected, got = run(whole), run(part, vocab_group=group)
    expected.loss.backward()
    got.loss.backward()
    token_chunks.LOGIT_BYTES["cpu"] = budget
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-3)
    assert relative_error(part.student_hidden.grad, whole.student_hidden.grad) < 0.01
    assert relative_error(part.student_head.grad, whole.student_head.grad[rows]) < 0.01


def worker(rank: int, world_size: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",))
    for split in SPLITS[world_size]:
        compare_with_one_rank(rank, split, mesh.get_group())
        compare_top_k_with_one_rank(rank, split, mesh.get_group())
        choose_chunks_together(rank, split, mesh.get_group())
    compare_with_one_rank(rank, SPLITS[world_size][0], mesh["tp"])
    with pytest.raises(ValueError, match="one-rank reference"):
        run(cases()[0], impl="torch", vocab_group=mesh)
    (Path(folder) / f"compared_{rank}").write_text(str(len(SPLITS[world_size])))
    dist.destroy_process_group()


@pytest.mark.parametrize("world_size", [2, 4])
def test_split_vocabulary_equals_one_rank(world_size: int, tmp_path: Path):
    # A server that has imported torch once forks the ranks; fresh interpreters would each import it again.
    mp.get_context("forkserver").set_forkserver_preload(PRELOADED)
    mp.start_processes(worker, args=(world_size, str(tmp_path)), nprocs=world_size, start_method="forkserver")
    compared = [(tmp_path / f"compared_{rank}").read_text() for rank in range(world_size)]
    assert compared == [str(len(SPLITS[world_size]))] * world_size, "a rank ended before it had compared everything"

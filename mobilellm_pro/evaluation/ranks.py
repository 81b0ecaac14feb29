"""The ranks of an evaluation: each has a whole model and answers its share of the requests.

Every rank asks the same and gets all answers, so nothing that is asked depends on how many there are.
"""

import os
from collections.abc import Mapping, Sequence
from typing import TypeVar

import torch.distributed as dist

Answer = TypeVar("Answer")


def join_ranks() -> int:
    """Joins the ranks of torchrun, if there are several, and gives this one's number.

    They exchange results only, so gloo will do where models are on GPUs.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        dist.init_process_group("gloo")
    return rank()


def rank() -> int:
    """Of this process; 0 without others."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of ranks."""
    return dist.get_world_size() if dist.is_initialized() else 1


def wait_for_ranks() -> None:
    """Until every rank is here."""
    if dist.is_initialized():
        dist.barrier()


def share_of_rank(order: Sequence[int], costs: Mapping[int, int] | Sequence[int]) -> list[int]:
    """The part of a sequence of requests that this rank answers: neighbours, of about equal cost on every rank.

    Args:
        order: numbers of requests.
        costs: of each number.
    """
    total, before, own = sum(costs[number] for number in order), 0, []
    for number in order:
        if min(before * world_size() // max(1, total), world_size() - 1) == rank():
            own.append(number)
        before += costs[number]
    return own


def gathered(answers: Mapping[int, Answer]) -> dict[int, Answer]:
    """Answers of all ranks, by the number of the request; a collective."""
    if world_size() == 1:
        return dict(answers)
    parts: list[dict[int, Answer]] = [{}] * world_size()
    dist.all_gather_object(parts, dict(answers))
    return {number: answer for part in parts for number, answer in part.items()}

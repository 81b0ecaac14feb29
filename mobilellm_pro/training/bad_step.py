"""A step that is not finite, in words: which losses or gradients, on which rank, of which rows of which corpora.

All of it costs time and is done only for such a step. The ranks tell each other what they had, so that every one of
them can say it all: which rank's log a user sees is chance.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mobilellm_pro.data.mixture import Mixture

_LISTED = 8


class MicroBatch(NamedTuple):
    """One micro-batch of a step as this rank has seen it."""

    input_dict: dict[str, Tensor]
    labels: Tensor
    valid_tokens: Tensor | float
    """Of all ranks and micro-batches of the step: what the loss was divided by."""

    loss: Tensor


def bad_micro_batches(micro_batches: Sequence[MicroBatch]) -> list[int]:
    """Numbers, from 0, of the micro-batches whose loss is not finite on any rank; a collective of all ranks."""
    finite = torch.stack([micro_batch.loss for micro_batch in micro_batches]).isfinite().float()
    if dist.get_world_size() > 1:
        dist.all_reduce(finite, op=dist.ReduceOp.MIN)
    return [number for number, value in enumerate(finite.tolist()) if not value]


def report_bad_step(
    step: int,
    norm: float,
    micro_batches: Sequence[MicroBatch],
    mixture: Mixture,
    causes: Mapping[int, Sequence[str]] | None = None,
) -> str:
    """Says where a step is not finite, on what rows, and why where that is known; a collective of all ranks.

    Args:
        step: that is not finite.
        norm: of its gradients.
        micro_batches: of the step, on this rank.
        mixture: that its rows are from.
        causes: what this rank has found in micro-batches, by number.

    Returns:
        a line for each micro-batch and rank that is bad, the same on every rank.
    """
    rank, of, all_finite = dist.get_rank(), len(micro_batches), not bad_micro_batches(micro_batches)
    own: list[tuple[bool, str]] = []
    for number, micro_batch in enumerate(micro_batches):
        found, loss = "; ".join((causes or {}).get(number, [])), micro_batch.loss.item()
        what = f"gradient norm is {norm}, every loss is finite," if all_finite else f"loss is {loss}"
        where = f"at step {step} on rank {rank}, micro-batch {number + 1} of {of}"
        rows = rows_in_words(mixture, micro_batch.input_dict)
        # A bad loss makes gradients of other ranks bad too, which is no news.
        own.append(
            (
                bool(found) if all_finite else loss - loss != 0,
                "; ".join([f"{what} {where}", *[found] * bool(found), rows]),
            )
        )
    gathered: list[list[tuple[bool, str]]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, own)
    everything = [pair for pairs in gathered for pair in pairs]
    # Where no micro-batch is bad by itself, any may have had its part.
    lines = [line for bad, line in everything if bad] or [line for _, line in everything]
    more = [f"and {len(lines) - _LISTED} more"] if len(lines) > _LISTED else []
    return "\n".join(lines[:_LISTED] + more)


def rows_in_words(mixture: Mixture, input_dict: Mapping[str, Tensor]) -> str:
    """The rows of a micro-batch, by their numbers in their corpora, and the documents that they are of."""
    rows = []
    for corpus, row in zip(input_dict["corpus"].tolist(), input_dict["row"].tolist(), strict=True):
        documents = list(dict.fromkeys(map(int, mixture.streams[corpus].pieces(row).documents)))
        listed = ", ".join(map(str, documents[:_LISTED])) + ", ..." * (len(documents) > _LISTED)
        rows.append(f"row {row} of {mixture.names[corpus]} (document{'s' * (len(documents) > 1)} {listed})")
    return f"its rows: {', '.join(rows[:_LISTED])}" + f" and {len(rows) - _LISTED} more" * (len(rows) > _LISTED)


def non_finite_gradients(model: nn.Module) -> list[str]:
    """One line that names the parameters with gradients, in this rank's part, that are not finite; or none."""
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    names = [name for name, gradient in gradients.items() if not _local(gradient).isfinite().all()]
    more = f" and {len(names) - _LISTED} more" * (len(names) > _LISTED)
    return [f"it gives gradients that are not finite to {', '.join(names[:_LISTED])}{more}"] if names else []


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor

"""Section `ranks` of attention.py: what the layers of a row that several ranks share send, and what that takes."""

import argparse
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from attention_timing import (
    ARGS,
    DOCUMENTS,
    KEY_BYTES,
    LAYERS,
    SPANS,
    Cost,
    Layer,
    both_ways,
    document_ids,
    draw,
    median,
    ours,
    table,
    timed,
)
from machine import MIB
from torch import Tensor

from mobilellm_pro.model import key_exchange
from mobilellm_pro.model.attention_mask import AttentionMask, PackedRows
from mobilellm_pro.model.key_exchange import exchange_keys
from mobilellm_pro.model.row_shard import RowShard
from tests.pipeline.measured_step import allocated
from tests.ranks import run_ranks

LONG = 8192
"""Tokens of a row on two ranks that is run once; in longer ones a global layer without documents takes minutes."""


class Case(NamedTuple):
    """A layer on all ranks of a group."""

    size: int
    """Tokens of the whole row."""

    kind: str
    form: str
    """"contiguous", "head_tail" or "all-gather"."""

    documents: str = "documents of 1,000"
    repeats: int = 0
    """0: bytes alone."""


class OnRank(NamedTuple):
    """A rank's part of a case."""

    messages: list[tuple[int, int]]
    """Bytes (received, sent): keys and values out, then gradients back."""

    cost: Cost | None = None
    """None: only keys and gradients travelled."""


def on_ranks(cases: list[Case]) -> list[OnRank]:
    """Every case on this rank of a new group."""
    dist.init_process_group("gloo")
    plain = key_exchange._all_to_all

    def counted(sent: Tensor, *others: Any) -> Tensor:
        received = plain(sent, *others)
        MESSAGES.append((received.nbytes, sent.nbytes))
        return received

    key_exchange._all_to_all = counted
    return [_on_rank(case) for case in cases]


MESSAGES: list[tuple[int, int]] = []
"""Of this rank."""


def _on_rank(case: Case) -> OnRank:
    cpu = torch.device("cpu")
    shard = RowShard(case.size, dist.get_world_size(), dist.get_rank(), case.form == "head_tail")
    ids = document_ids(case.size, DOCUMENTS[case.documents], cpu)
    span = {case.kind: SPANS[case.kind]}
    mask = PackedRows(ids, "continue", shard).masks(span)[case.kind]
    attend, bring = ours(mask, dist.group.WORLD), partial(exchange_keys, exchange=mask.exchange, group=dist.group.WORLD)
    if case.form == "all-gather":
        whole = PackedRows(ids).masks(span)[case.kind]
        mask = AttentionMask(shard.take(whole.first), shard.take(whole.end), case.size)
        attend, bring = partial(gathered, attend=ours(mask)), gather_keys
    inputs = draw(case.size // shard.degree, case.size // shard.degree, cpu)
    MESSAGES.clear()
    if not case.repeats:
        brought = bring(*inputs[1:3])
        torch.autograd.grad(brought, inputs[1:3], list(brought))
        return OnRank(list(MESSAGES))
    run = partial(both_ways, attend, *inputs)
    dist.barrier()
    peak = allocated(run)[0]
    messages, spent = list(MESSAGES), []
    for _ in range(case.repeats):
        dist.barrier()
        spent.append(timed(run))
    return OnRank(messages, Cost(*median(spent), peak))


def gathered(query: Tensor, key: Tensor, value: Tensor, attend: Layer) -> Tensor:
    """The form to compare with: all keys and values of the row on every rank, whatever the kind of layer."""
    return attend(query, *gather_keys(key, value))


def gather_keys(key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """[B, G, S, W] of this rank -> [B, G, K, W] of all."""
    whole_key, whole_value = _Gather.apply(torch.stack((key, value))).unbind(0)
    return whole_key, whole_value


class _Gather(torch.autograd.Function):
    """[2, B, G, S, W] of this rank -> [2, B, G, K, W] of all; gradients of all are summed where the keys came from."""

    @staticmethod
    def forward(ctx: Any, own: Tensor) -> Tensor:
        by_token = own.movedim(-2, 0).contiguous()
        whole = by_token.new_empty(dist.get_world_size() * by_token.shape[0], *by_token.shape[1:])
        _gather_single(whole, by_token)
        MESSAGES.append((whole.nbytes - by_token.nbytes,) * 2)
        return whole.movedim(0, -2).contiguous()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        by_token = grad.movedim(-2, 0).contiguous()
        own = by_token.new_empty(by_token.shape[0] // dist.get_world_size(), *by_token.shape[1:])
        _scatter_single(own, by_token)
        MESSAGES.append((by_token.nbytes - own.nbytes,) * 2)
        return own.movedim(0, -2)


# The newer names; torch 2.11 has the older ones only.
_gather_single = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_scatter_single = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


def ranks(arguments: argparse.Namespace) -> list[str]:
    """Bytes on 2 and 4 ranks, time and memory on 2."""
    forms = ("contiguous", "head_tail", "all-gather")
    counted = [Case(size, kind, form) for size in arguments.sizes for kind in LAYERS for form in forms]
    lines = [
        "Bytes of one layer and step, KiB: most of any rank, and in parentheses the mean over ranks.",
        "",
    ]
    lines += table("ranks | tokens | layer | form | out: received | out: sent | back: received | back: sent | at most")
    totals = table("ranks | tokens | ours, contiguous MiB | ours, head_tail MiB | all-gather MiB")
    for degree in (4, 2):
        measured = dict(zip(counted, zip(*run_ranks(on_ranks, degree, counted), strict=True), strict=True))
        lines += [_bytes_line(case, found) for case, found in measured.items()]
        for size in arguments.sizes:
            sums = [_step_bytes({k: measured[Case(size, k, form)] for k in LAYERS}) / MIB for form in forms]
            totals.append(f"| {degree} | {size:,} | " + " | ".join(f"{x:,.1f}" for x in sums) + " |")
    lines += ["", "Received by the rank that receives most, out and back, thirty layers of a step:", "", *totals, ""]
    return lines + _times_on_ranks(arguments, measured)


def _bytes_line(case: Case, found: tuple[OnRank, ...]) -> str:
    """Out and back are two messages, each received and sent; a formula beside the most."""
    degree = len(found)
    cells = []
    for direction in range(2):
        for way in range(2):
            amounts = [rank.messages[direction][way] / 1024 for rank in found]
            cells.append(f"{max(amounts):,.0f} ({sum(amounts) / degree:,.0f})")
    borders = 2 if case.form == "head_tail" else 1
    others = case.size * (degree - 1) // degree
    if case.kind == "local" and case.form != "all-gather":
        window = ARGS.sliding_window
        formula = f"{borders} × {window - 1} × {KEY_BYTES} B = {borders * (window - 1) * KEY_BYTES / 1024:,.0f}"
    else:
        formula = f"{others:,} × {KEY_BYTES} B = {others * KEY_BYTES / 1024:,.0f}"
    return f"| {degree} | {case.size:,} | {case.kind} | {case.form} | " + " | ".join([*cells, formula]) + " |"


def _step_bytes(found: Mapping[str, tuple[OnRank, ...]]) -> int:
    """Kind -> ranks: bytes that the layers of a step bring to the rank with most."""
    degree = len(found["local"])
    return max(
        sum(LAYERS[kind] * received for kind in LAYERS for received, _ in found[kind][rank].messages)
        for rank in range(degree)
    )


def _times_on_ranks(arguments: argparse.Namespace, counted: Mapping[Case, tuple[OnRank, ...]]) -> list[str]:
    """Ours and the all-gather on 2 ranks."""
    cases = [
        Case(size, kind, form, documents, arguments.repeats if size < LONG else 1)
        for size in arguments.sizes
        for documents in DOCUMENTS
        for kind in LAYERS
        for form in ("contiguous", "all-gather")
        if size <= LONG or kind == "local" or documents != "plain causal"
    ]
    measured = dict(zip(cases, zip(*run_ranks(on_ranks, 2, cases, timeout_seconds=900), strict=True), strict=True))
    lines = ["Two ranks of one thread, the same tiles in both forms; the slower rank's time, the larger peak:", ""]
    times = "ours ms | all-gather ms | ours core ms | all-gather core ms"
    lines += table(f"mask | tokens | layer | {times} | ours MiB | all-gather MiB")
    for case, found in measured.items():
        alone = counted[Case(case.size, case.kind, case.form)]
        assert [rank.messages for rank in found] == [rank.messages for rank in alone], "a layer sends something else"
        if case.form != "all-gather":
            sides = [[rank.cost for rank in side] for side in (found, measured[case._replace(form="all-gather")])]
            wall, core, peak = zip(*([max(kind) for kind in zip(*side, strict=True)] for side in sides), strict=True)
            cells = [f"{x * 1e3:,.1f}" for x in (*wall, *core)] + [f"{x / MIB:,.0f}" for x in peak]
            lines.append(f"| {case.documents} | {case.size:,} | {case.kind} | " + " | ".join(cells) + " |")
    return lines

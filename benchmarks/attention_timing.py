"""What the sections on attention share: inputs, ways to run a layer, and how long and how much memory a pass takes."""

import argparse
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from machine import DEVICE, GPU, synchronize
from torch import Tensor

from mobilellm_pro.model.attention import Attend
from mobilellm_pro.model.attention_mask import AttentionMask
from mobilellm_pro.model.student import FLAVORS
from tests.pipeline.measured_step import allocated

DTYPE = torch.bfloat16 if GPU else torch.float32
ARGS = FLAVORS["1b"]
SPANS = ARGS.spans()
LAYERS = {kind: sum(ARGS.kind(i) == kind for i in range(ARGS.num_hidden_layers)) for kind in SPANS}
KEY_BYTES = 2 * ARGS.num_key_value_heads * ARGS.head_dim * DTYPE.itemsize
"""Key and value of a token."""

DOCUMENTS = {"plain causal": None, "documents of 1,000": 1000}
"""Tokens of a document; None: the row is one."""

Layer = Callable[[Tensor, Tensor, Tensor], Tensor]
Run = Callable[[], None]


class Spent(NamedTuple):
    """By one forward and backward pass."""

    seconds: float
    core_seconds: float
    """Of all this process' cores, which others disturb less; on a GPU the same as seconds."""


class Cost(NamedTuple):
    """Of a forward and a backward pass."""

    seconds: float
    """Median of the runs."""

    core_seconds: float
    peak_bytes: int


def document_ids(num_tokens: int, length: int | None, device: torch.device = DEVICE) -> Tensor:
    """[1, N] of one row."""
    index = torch.arange(num_tokens, device=device)
    return (torch.zeros_like(index) if length is None else index // length).unsqueeze(0)


def draw(num_queries: int, num_keys: int, device: torch.device = DEVICE) -> list[Tensor]:
    """Query, key, value and the gradient of the result."""
    heads = (ARGS.num_attention_heads, ARGS.num_key_value_heads, ARGS.num_key_value_heads, ARGS.num_attention_heads)
    lengths = (num_queries, num_keys, num_keys, num_queries)
    shapes = [(1, count, length, ARGS.head_dim) for count, length in zip(heads, lengths, strict=True)]
    tensors = [torch.randn(shape, device=device, dtype=DTYPE) for shape in shapes]
    return [tensor.requires_grad_() for tensor in tensors[:3]] + tensors[3:]


def both_ways(attend: Layer, query: Tensor, key: Tensor, value: Tensor, upstream: Tensor) -> None:
    """Forward and backward."""
    torch.autograd.grad(attend(query, key, value), (query, key, value), upstream)


def ours(mask: AttentionMask, group: Any = None) -> Layer:
    """The module of both models."""
    attend = Attend()
    attend.context_group = group
    return partial(attend, mask=mask)


def full_causal(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """All tokens before, and no mask."""
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)


def masked_whole(query: Tensor, key: Tensor, value: Tensor, visible: Tensor) -> Tensor:
    """Every query meets every key. With grouped heads no CUDA kernel takes a mask: they are repeated."""
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=visible)


def timed(run: Callable[[], object]) -> Spent:
    """One run."""
    synchronize()
    begin, core = time.perf_counter(), time.process_time()
    run()
    synchronize()
    seconds = time.perf_counter() - begin
    return Spent(seconds, seconds if GPU else time.process_time() - core)


def median(spent: Sequence[Spent]) -> Spent:
    """Of each kind of time."""
    return Spent(*(statistics.median(kind) for kind in zip(*spent, strict=True)))


def in_turns(runs: Mapping[str, Run], arguments: argparse.Namespace) -> dict[str, Cost]:
    """Each once under the profiler, for its memory; then, in turns, as often as the budget of seconds allows.

    What takes longer than the budget has the time of its first run.
    """
    peaks: dict[str, int] = {}
    times: dict[str, list[Spent]] = {}
    for name, run in runs.items():
        if GPU:
            run()  # compiles
        times[name] = [timed(lambda name=name, run=run: peaks.update({name: allocated(run)[0]}))]
    most = {name: min(arguments.repeats, int(arguments.budget / first.seconds)) for name, (first,) in times.items()}
    for number in range(arguments.repeats):
        for name, run in runs.items():
            if number < most[name]:
                times[name].append(timed(run))
    return {name: Cost(*median(spent[1:] or spent), peaks[name]) for name, spent in times.items()}


def table(header: str) -> list[str]:
    """First lines of a table; names between bars."""
    return [f"| {header} |", "|---" * (header.count("|") + 1) + "|"]

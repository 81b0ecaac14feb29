"""The attention of the 1B student, its thirty layers: time, memory, and what travels between ranks.

    bash launch/quickstart.sh                                  # teacher and checkpoint of `step`
    python benchmarks/attention.py --write benchmarks/results/attention_<hardware>_<yyyymm>.md
    python benchmarks/attention.py --only layer growth balance mask                  # on a GPU, up to 131,072 tokens

layer    one rank, forward and backward of one row: ours by kind of layer; the form that gathers all keys in every layer
         and masks all of them; causal attention with no mask in all thirty layers (SDPA's own kernel)
growth   a local layer at lengths that double: time a token, and the exponent of a power law through all of them
ranks    gloo ranks of one thread: bytes that a layer sends and receives, out and back, counted and by formula, and (2
         ranks) its time and memory, beside an all-gather of all keys on the same tiles
balance  a global layer on 4 ranks under a plain causal mask: the busiest rank's visible keys, and time at its shapes,
         for both layouts of a row
mask     making block masks of 131,072 tokens with 1,000 documents; torch's create_block_mask where that can be run
step     a training step of the debug job over 32,768 tokens on two ranks: memory of all processes together

Time of thirty layers is that of one layer of each kind times their number. A layer is the product of queries, keys and
values alone, without projections. Peaks are what the allocator gave out above queries, keys, values and the mask. What
takes longer than the budget is run once.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from machine import describe
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

import mobilellm_pro.config  # noqa: F401  (before torchtitan)
from mobilellm_pro.model import key_exchange
from mobilellm_pro.model.attention import Attend
from mobilellm_pro.model.attention_mask import AttentionMask, PackedRows, block_mask, dense_mask
from mobilellm_pro.model.key_exchange import exchange_keys
from mobilellm_pro.model.row_shard import RowShard, Span
from mobilellm_pro.model.student import FLAVORS
from mobilellm_pro.training.run_folder import read_metrics

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.pipeline.measured_step import allocated  # noqa: E402
from tests.ranks import run_ranks  # noqa: E402

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
DTYPE = torch.bfloat16 if GPU else torch.float32
ARGS = FLAVORS["1b"]
SPANS = ARGS.spans()
LAYERS = {kind: sum(ARGS.kind(i) == kind for i in range(ARGS.num_hidden_layers)) for kind in SPANS}
KEY_BYTES = 2 * ARGS.num_key_value_heads * ARGS.head_dim * DTYPE.itemsize
"""Key and value of a token."""

DOCUMENTS = {"plain causal": None, "documents of 1,000": 1000}
"""Tokens of a document; None: the row is one."""

MIB = 2**20

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


def synchronize() -> None:
    """Waits for the device."""
    if GPU:
        torch.cuda.synchronize()


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


# layer


def layer(arguments: argparse.Namespace) -> list[str]:
    """The three forms on one rank."""
    times = "global layer ms | local layer ms | 30 layers s | 30 layers core s | × ours"
    lines = table(f"mask | tokens | form | {times} | peak MiB, global | peak MiB, local | mask MiB")
    rows: dict[str, list[str]] = {documents: [] for documents in DOCUMENTS}
    for size in arguments.sizes:
        for documents, found in _layers_of(size, arguments).items():
            rows[documents] += found
    return [
        f"Heads {ARGS.num_attention_heads}/{ARGS.num_key_value_heads} × {ARGS.head_dim}, window {ARGS.sliding_window}, "
        f"{LAYERS['global']} global and {LAYERS['local']} local layers, one row, {DTYPE}. What is masked as a whole, "
        "and what has no mask, takes as long whatever the documents: measured once a length.",
        "", *lines, *rows["plain causal"], *rows["documents of 1,000"],
    ]  # fmt: skip


def _layers_of(size: int, arguments: argparse.Namespace) -> dict[str, list[str]]:
    """Lines of the table at one length, by mask."""
    torch.compiler.reset()
    inputs, runs, mask_bytes = draw(size, size), {}, {}
    for documents, length in DOCUMENTS.items():
        masks = PackedRows(document_ids(size, length)).masks(SPANS)
        mask_bytes[documents] = sum(map(held_bytes, masks.values()))
        for kind, mask in masks.items():
            runs[f"{documents}, {kind}"] = partial(both_ways, ours(mask), *inputs)
    runs["no mask"] = partial(both_ways, full_causal, *inputs)
    if size <= arguments.whole_up_to:
        whole = dense_mask(mask.first, mask.end, 0, size)
        runs["masked whole"] = partial(both_ways, partial(masked_whole, visible=whole), *inputs)
    costs = in_turns(runs, arguments)
    lines: dict[str, list[str]] = {}
    for documents in DOCUMENTS:
        forms = {"ours": ([costs[f"{documents}, {kind}"] for kind in LAYERS], mask_bytes[documents])}
        if "masked whole" in costs:
            forms["all keys, masked whole"] = ([costs["masked whole"]] * 2, 2 * size * size)
        forms["causal in all 30, no mask"] = ([costs["no mask"]] * 2, 0)
        base = thirty_layers(*forms["ours"][0])
        lines[documents] = [
            f"| {documents} | {size:,} | {form} | {full.seconds * 1e3:,.1f} | {local.seconds * 1e3:,.1f} | "
            f"{thirty_layers(full, local).seconds:.3f} | {thirty_layers(full, local).core_seconds:.3f} | "
            f"{thirty_layers(full, local).core_seconds / base.core_seconds:.2f} | "
            f"{full.peak_bytes / MIB:,.0f} | {local.peak_bytes / MIB:,.0f} | {held / MIB:,.1f} |"
            for form, ((full, local), held) in forms.items()
        ]
    return lines


def thirty_layers(full: Cost, local: Cost) -> Spent:
    """One layer of each kind, so many times."""
    return Spent(*(LAYERS["global"] * a + LAYERS["local"] * b for a, b in zip(full[:2], local[:2], strict=True)))


def held_bytes(mask: AttentionMask) -> int:
    """Of a mask that all layers of a kind share."""
    tables = [] if mask.blocks is None else [x for x in mask.blocks.as_tuple() if isinstance(x, Tensor)]
    tensors = [mask.first, mask.end, *tables, *([] if mask.dense is None else [mask.dense])]
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


# growth


def growth(arguments: argparse.Namespace) -> list[str]:
    """Doubling from the smallest of the lengths to the largest."""
    sizes = [min(arguments.sizes)]
    while 2 * sizes[-1] <= max(arguments.sizes):
        sizes.append(2 * sizes[-1])
    lines = table("mask | tokens | local layer ms | core µs a token | core time × the length before")
    exponents = []
    for documents, length in DOCUMENTS.items():
        times: list[float] = []
        for size in sizes:
            torch.compiler.reset()
            mask = PackedRows(document_ids(size, length)).masks({"local": SPANS["local"]})["local"]
            run = partial(both_ways, ours(mask), *draw(size, size))
            cost = in_turns({"local": run}, arguments)["local"]
            times.append(cost.core_seconds)
            ratio = f"{times[-1] / times[-2]:.2f}" if len(times) > 1 else "–"
            cells = f"{cost.seconds * 1e3:,.1f} | {times[-1] / size * 1e6:.2f} | {ratio}"
            lines.append(f"| {documents} | {size:,} | {cells} |")
        if len(times) > 1:
            exponents.append(f"{documents} {np.polyfit(np.log(sizes), np.log(times), 1)[0]:.2f}")
    return [*lines, "", f"Core time grows with the length to the power of: {', '.join(exponents)}."]


# ranks


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


LONG = 8192
"""Tokens of a row on two ranks that is run once; in longer ones a global layer without documents takes minutes."""


# balance


def balance(arguments: argparse.Namespace) -> list[str]:
    """Shapes of one rank at a time in this process, with random keys in place of those that would have come."""
    size, degree = arguments.balance_tokens, 4
    lines = table("layout | visible keys, busiest rank | least busy | ms, busiest rank | core ms | keys received MiB")
    runs, cells = {}, {}
    for layout in ("contiguous", "head_tail"):
        masks = [_causal_part(RowShard(size, degree, rank, layout == "head_tail")) for rank in range(degree)]
        visible = [int((mask.end - mask.first).sum()) for mask in masks]
        busiest = masks[visible.index(max(visible))]
        received = max(sum(mask.exchange.received) for mask in masks if mask.exchange is not None)
        cells[layout] = (max(visible), min(visible), received * KEY_BYTES / MIB)
        inputs = draw(size // degree, busiest.num_keys)
        runs[layout] = partial(both_ways, ours(replace(busiest, exchange=None)), *inputs)
    costs = in_turns(runs, arguments)
    for layout, (most, least, received) in cells.items():
        lines.append(
            f"| {layout} | {most:,} | {least:,} | {costs[layout].seconds * 1e3:,.1f} | "
            f"{costs[layout].core_seconds * 1e3:,.1f} | {received:,.1f} |"
        )
    ratio = costs["contiguous"].core_seconds / costs["head_tail"].core_seconds
    expected = cells["contiguous"][0] / cells["head_tail"][0]
    return [
        f"{size:,} tokens on {degree} ranks, one process with all threads at one rank's shapes.", "", *lines, "",
        f"Contiguous takes {ratio:.2f} × the core time of head and tail; visible keys say {expected:.2f} ×.",
    ]  # fmt: skip


def _causal_part(shard: RowShard) -> AttentionMask:
    rows = PackedRows(document_ids(shard.num_tokens, None), "continue", shard)
    return rows.masks({"global": Span()}, "causal")["global"]


# mask


def mask(arguments: argparse.Namespace) -> list[str]:
    """From document ids to FlexAttention's tables."""
    lines = table("tokens | documents | layer | how | seconds | core s | peak MiB | blocks kept")
    for size, documents in ((8192, 62), (16_384, 125), (131_072, 1000)):
        ids = random_documents(size, documents)
        spans = {"global": Span(), "local": SPANS["local"], "teacher's chunked": Span(chunk=8192)}
        for kind, span in spans.items():
            runs = {"ours": partial(_our_blocks, ids, span)}
            if size <= arguments.create_up_to:
                runs["create_block_mask"] = partial(_torch_blocks, ids, span)
            for how, make in runs.items():
                peak = allocated(make)[0]
                made: list[BlockMask] = []
                spent = median([timed(lambda: made.append(make())) for _ in range(arguments.repeats)])  # noqa: B023
                kept = int(made[-1].kv_num_blocks.sum() + made[-1].full_kv_num_blocks.sum())
                figures = f"{spent.seconds:.4f} | {spent.core_seconds:.4f} | {peak / MIB:,.1f} | {kept:,}"
                lines.append(f"| {size:,} | {documents:,} | {kind} | {how} | {figures} |")
    return lines


def random_documents(size: int, documents: int) -> Tensor:
    """[1, size] ids of so many documents of random lengths."""
    generator = torch.Generator().manual_seed(0)
    borders = torch.zeros(size, dtype=torch.int64)
    borders[torch.randperm(size - 1, generator=generator)[: documents - 1] + 1] = 1
    return borders.cumsum(0).unsqueeze(0).to(DEVICE)


def _our_blocks(ids: Tensor, span: Span) -> BlockMask:
    made = PackedRows(ids).masks({"x": span})["x"]
    return block_mask(made.first, made.end, made.num_keys) if made.blocks is None else made.blocks


def _torch_blocks(ids: Tensor, span: Span) -> BlockMask:
    """The rule, evaluated at every query and key."""

    def rule(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        visible = (query >= key) & (ids[row, query] == ids[row, key])
        if span.window is not None:
            visible = visible & (query - key < span.window)
        if span.chunk is not None:
            visible = visible & (query // span.chunk == key // span.chunk)
        return visible

    return create_block_mask(rule, 1, None, ids.shape[1], ids.shape[1], device=ids.device.type)


# step


def step(arguments: argparse.Namespace) -> list[str]:
    """Proportional set size: a page that processes share is divided among them."""
    config, checkpoint = "train_configs/debug/2_context.toml", ROOT / "outputs/debug/1_language/checkpoint"
    if not checkpoint.is_dir():
        raise SystemExit(f"{checkpoint}: not found; `bash launch/quickstart.sh` writes it")
    with tempfile.TemporaryDirectory() as folder:
        options = {
            "training.seq_len": 32_768, "training.steps": 4, "training.global_batch_size": 1,
            "parallelism.context_parallel_degree": 2, "metrics.log_freq": 1, "checkpoint.interval": 100,
            "job.dump_folder": folder,
        }  # fmt: skip
        words = [word for key, value in options.items() for word in (f"--{key}", str(value))]
        command = ["bash", "launch/train.sh", config, *words, "--validation.no_enable"]
        environment = {**os.environ, "NPROC": "2"}
        environment.pop("OMP_NUM_THREADS", None)
        with (Path(folder) / "log").open("w") as log:
            job = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)
            peak, processes = most_resident(job)
        if job.returncode:
            raise RuntimeError((Path(folder) / "log").read_text()[-4000:])
        records = read_metrics(folder, "train")
    losses = [record["loss"] for record in records]
    spent = [32_768 / record["tokens_per_second"] for record in records]
    return [
        f"`NPROC=2 {' '.join(command)}`", "",
        f"{peak / 2**30:.2f} GiB at most, {processes} processes together (torchrun included), sampled every 50 ms; the "
        f"bar is 4 GiB. Seconds a step: {', '.join(f'{x:.1f}' for x in spent)}; losses "
        f"{', '.join(f'{loss:.4f}' for loss in losses)}.",
    ]  # fmt: skip


def most_resident(job: subprocess.Popen[bytes]) -> tuple[int, int]:
    """Waits for a job: (most bytes of all its processes together, how many they were then)."""
    most = (0, 0)
    while job.poll() is None:
        sizes = [size for pid in descendants(job.pid) if (size := proportional_bytes(pid))]
        most = max(most, (sum(sizes), len(sizes)))
        time.sleep(0.05)
    return most


def descendants(pid: int) -> list[int]:
    """A process and all that it started."""
    found = [pid]
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            found += [child for word in children.read_text().split() for child in descendants(int(word))]
        except OSError:  # it has ended
            continue
    return found


def proportional_bytes(pid: int) -> int:
    """0 for a process that has ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


SECTIONS = {"layer": layer, "growth": growth, "ranks": ranks, "balance": balance, "mask": mask, "step": step}
ON_A_CPU = ("ranks", "step")
"""Gloo and resident memory."""


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sections = [name for name in SECTIONS if not (GPU and name in ON_A_CPU)]
    sizes = [2048, 8192, 32_768] + ([131_072] if GPU else [])
    parser.add_argument("--only", nargs="+", choices=sections, default=sections)
    parser.add_argument("--sizes", nargs="+", type=int, default=sizes, help="tokens of a row")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--budget", type=float, default=8.0, help="seconds for the repeats of one layer")
    parser.add_argument(
        "--whole-up-to", type=int, default=32_768 if GPU else 8192, help="tokens of a row that is masked as a whole"
    )
    parser.add_argument("--create-up-to", type=int, default=16_384, help="tokens for torch's create_block_mask")
    parser.add_argument("--balance-tokens", type=int, default=131_072 if GPU else 8192)
    parser.add_argument("--write", type=Path, help="Markdown file")
    arguments = parser.parse_args()
    # Beyond the limit FlexAttention would quietly run uncompiled, with all of queries × keys in memory.
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    lines = ["# Attention", "", *describe(["torch", "torchtitan"], torch.get_num_threads())]
    for name in arguments.only:
        begin = time.perf_counter()
        section = ["", f"## {name}", "", *SECTIONS[name](arguments)]
        section += ["", f"({time.perf_counter() - begin:.0f} s, load average after it {os.getloadavg()[0]:.1f})"]
        print("\n".join(section), flush=True)
        lines += section
        if arguments.write:
            arguments.write.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()

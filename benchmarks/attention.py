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
import subprocess
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from attention_ranks import ranks
from attention_timing import (
    ARGS,
    DOCUMENTS,
    DTYPE,
    KEY_BYTES,
    LAYERS,
    SPANS,
    Cost,
    Spent,
    both_ways,
    document_ids,
    draw,
    full_causal,
    in_turns,
    masked_whole,
    median,
    ours,
    table,
    timed,
)
from machine import DEVICE, GPU, MIB, ROOT, describe, most_resident, section_parser, write_sections
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from mobilellm_pro.model.attention_mask import AttentionMask, PackedRows, block_mask, dense_mask
from mobilellm_pro.model.row_shard import RowShard, Span
from mobilellm_pro.training.run_folder import read_metrics
from tests.pipeline.measured_step import allocated


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


SECTIONS = {"layer": layer, "growth": growth, "ranks": ranks, "balance": balance, "mask": mask, "step": step}
ON_A_CPU = ("ranks", "step")
"""Gloo and resident memory."""


def main() -> None:
    """Command line."""
    parser = section_parser(__doc__, [name for name in SECTIONS if not (GPU and name in ON_A_CPU)])
    sizes = [2048, 8192, 32_768] + ([131_072] if GPU else [])
    parser.add_argument("--sizes", nargs="+", type=int, default=sizes, help="tokens of a row")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--budget", type=float, default=8.0, help="seconds for the repeats of one layer")
    parser.add_argument(
        "--whole-up-to", type=int, default=32_768 if GPU else 8192, help="tokens of a row that is masked as a whole"
    )
    parser.add_argument("--create-up-to", type=int, default=16_384, help="tokens for torch's create_block_mask")
    parser.add_argument("--balance-tokens", type=int, default=131_072 if GPU else 8192)
    arguments = parser.parse_args()
    # Beyond the limit FlexAttention would quietly run uncompiled, with all of queries × keys in memory.
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    head = ["# Attention", "", *describe(["torch", "torchtitan"], torch.get_num_threads())]
    write_sections(head, {name: partial(SECTIONS[name], arguments) for name in arguments.only}, arguments.write)


if __name__ == "__main__":
    main()

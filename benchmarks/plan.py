"""What `mobilellm-pro plan` predicts beside what real steps take here: memory, operations, bytes moved.

    python benchmarks/plan.py --write benchmarks/results/plan_HARDWARE_YYYYMM.md

Steps are those of `tests/pipeline/measured_step.py`: a student, a Llama 4 teacher and the loss. On several ranks the
fake backend stands for the others: every buffer is there, nothing is sent. Allocated is the most that torch's allocator
gave out in a step. Resident is the growth of a fresh process whose C library gives freed blocks back. On a machine with
a GPU memory is the GPU's, and operations, resident size and bytes moved are left out.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from machine import describe

import mobilellm_pro.config  # noqa: F401  (before torchtitan)

BF16 = ("--training.mixed_precision_param=bfloat16", "--teacher.dtype=bfloat16")
FULL = ("--activation_checkpoint.mode=full",)
OPERATION = ("--activation_checkpoint.mode=selective",)
LONG = ("--training.seq_len=1024",)

CASES: dict[str, tuple[str, int, tuple[str, ...]]] = {
    "debug, fp32": ("debug", 1, ()),
    "debug, fp32, full checkpointing": ("debug", 1, FULL),
    "large, fp32": ("large", 1, LONG),
    "large, fp32, full checkpointing": ("large", 1, (*LONG, *FULL)),
    "large, bf16": ("large", 1, (*LONG, "--training.dtype=bfloat16", *BF16)),
    "large, autocast": ("large", 1, (*LONG, *BF16)),
    "large, bf16, 8 ranks": ("large", 8, (*LONG, *BF16)),
    "large, bf16, 8 ranks, full checkpointing": ("large", 8, (*LONG, *BF16, *FULL)),
    "large, bf16, 8 ranks, checkpointing by operation": ("large", 8, (*LONG, *BF16, *OPERATION)),
    "large, bf16, 4 ranks, 2 share a row": ("large", 4, (*LONG, *BF16, "--parallelism.context_parallel_degree=2")),
    "large, bf16, 4 ranks, teacher in 2 parts": (
        "large",
        4,
        (*LONG, *BF16, "--teacher.parallelism.tensor_parallel_degree=2"),
    ),
}


def rows_of(name: str) -> Iterator[tuple[str, float, float]]:
    """(quantity, predicted, measured) of one case, in this process."""
    from tests.pipeline.measured_step import (
        device_type,
        load_step,
        measure_flops,
        measure_memory,
        measure_resident,
        measure_transfers,
        predict,
    )

    flavor, ranks, overrides = CASES[name]
    config, teacher = load_step(flavor, *overrides)
    predicted = predict(config, ranks, teacher)
    on_cpu = device_type == "cpu"
    if on_cpu and ranks == 1:
        yield "resident, MB", predicted.memory.peak / 1e6, measure_resident(config, teacher) / 1e6
    memory = measure_memory(config, ranks, teacher)
    held = predicted.memory.held
    for kind, measured in (
        ("parameters", memory.parameters),
        ("optimizer state", memory.optimizer_state),
        ("gradients", memory.gradients),
        ("teacher", memory.teacher),
    ):
        yield f"{kind}, MB", held[kind] / 1e6, measured / 1e6
    mode = predicted.shape.checkpointing
    if ranks == 1 and mode != "op":
        kept = predicted.memory.activations[mode] + predicted.memory.at_work["student weights cast (autocast)"]
        yield "kept activations, MB", kept / 1e6, memory.saved_activations / 1e6
    yield "allocated, MB", predicted.memory.peak / 1e6, max(memory.moments.values()) / 1e6
    if on_cpu:
        counted = measure_flops(config, ranks, teacher)
        for part, amount in predicted.flops.items():
            yield f"{part}, GFLOP", amount / 1e9, counted[part] / 1e9
        if ranks > 1:
            yield "moved, MB", predicted.num_bytes / 1e6, measure_transfers(config, ranks, teacher) / 1e6


def table(name: str) -> list[str]:
    """One case in a fresh process, as Markdown."""
    from tests.pipeline.measured_step import RETURN_FREED

    environment = {**os.environ, **RETURN_FREED}
    command = [sys.executable, __file__, "--worker", name]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"{name}: {done.stderr}")
    lines = [f"## {name}", "", "| | predicted | measured | ratio |", "|---|---:|---:|---:|"]
    for line in done.stdout.splitlines():
        if line.startswith("row\t"):
            _, quantity, predicted, measured = line.split("\t")
            ratio = float(predicted) / float(measured)
            lines.append(f"| {quantity} | {float(predicted):,.1f} | {float(measured):,.1f} | {ratio:.3f} |")
    return [*lines, ""]


def main() -> None:
    """Measure every case and print or write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--write", type=Path)
    parser.add_argument("--worker", choices=list(CASES), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        for row in rows_of(options.worker):
            print("row", *row, sep="\t", flush=True)
        return
    lines = ["# Predicted and measured", "", *describe(["torch", "torchtitan"], torch.get_num_threads()), ""]
    for name in options.cases:
        lines += table(name)
        print("\n".join(lines), flush=True)
        if options.write:
            with options.write.open("a") as stream:
                stream.write("\n".join(lines) + "\n")
        lines = []


if __name__ == "__main__":
    main()

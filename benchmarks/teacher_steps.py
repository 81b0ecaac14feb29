"""Sections `step` and `options` of teacher.py: whole training steps, the teacher live, cached, absent or in FP8."""

import argparse
import os
import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch
from machine import DEVICE, GPU, ROOT, seconds
from torch import Tensor

from mobilellm_pro.config import load
from mobilellm_pro.losses import linear_distillation
from mobilellm_pro.model.checkpoint import load_model
from mobilellm_pro.model.teacher import Teacher, TeacherArgs
from mobilellm_pro.training.run_folder import read_metrics
from tests.training.small_world import write_teacher

CONFIG = "train_configs/debug/1_language.toml"
STEPS = 40


def step(arguments: argparse.Namespace, work: Path) -> list[str]:
    """The jobs differ in teacher.cache and in the objective alone; median of the steps after the tenth."""
    cache = ["--teacher.cache_path", str(work / "cache")]
    jobs = {
        "teacher live": [],
        "hidden states written": [*cache, "--teacher.cache", "write"],
        "hidden states read": [*cache, "--teacher.cache", "read"],
        "cross entropy alone": ["--distill.objective", "ce"],
    }
    times: dict[str, list[float]] = {name: [] for name in jobs}
    for number in range(arguments.repeats):
        for name, overrides in jobs.items():
            if name == "hidden states written" and number:
                continue  # what is there is not written again
            times[name].append(step_seconds(work / f"{number} {name}", overrides))
    product = head_product_seconds(arguments.repeats)
    medians = {name: statistics.median(values) for name, values in times.items()}
    bar = medians["cross entropy alone"] + product
    lines = ["| step | seconds (each run) | of cross entropy + head product |", "|---|---|---|"]
    for name, value in medians.items():
        runs = ", ".join(f"{x:.4f}" for x in times[name])
        lines.append(f"| {name} | {value:.4f} ({runs}) | {value / bar:.2f} × |")
    return [*lines, f"| head product | {product:.4f} | |", "", *loss_at_full_width(arguments.repeats)]


def loss_at_full_width(repeats: int) -> list[str]:
    """The part of a step in which reading a cache differs from labels, at the 1B run's widths."""
    vocab_size, width, teacher_width = 202_048, 1280, 5120
    tokens, dtype = (4096, torch.bfloat16) if GPU else (256, torch.float32)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, device=DEVICE, dtype=dtype) * 0.02

    hidden, head = draw(tokens, width).requires_grad_(), draw(vocab_size, width).requires_grad_()
    teacher_hidden, teacher_head = draw(tokens, teacher_width), draw(vocab_size, teacher_width)
    labels = torch.randint(0, vocab_size, (tokens,), device=DEVICE)

    def run(teacher: tuple[Tensor, Tensor] | tuple[None, None], kl_weight: float) -> None:
        terms = linear_distillation(hidden, head, *teacher, labels, kl_weight=kl_weight, ce_weight=1 - kl_weight)
        torch.autograd.grad(terms.loss, (hidden, head))

    def product() -> None:
        for part in teacher_hidden.split(256):
            part @ teacher_head.T

    times: dict[str, list[float]] = {"KL from cached hidden states": [], "cross entropy": [], "head product": []}
    for _ in range(repeats):
        times["KL from cached hidden states"].append(seconds(lambda: run((teacher_hidden, teacher_head), 1.0), 1))
        times["cross entropy"].append(seconds(lambda: run((None, None), 0.0), 1))
        times["head product"].append(seconds(product, 1))
    kl, entropy, product_seconds = (statistics.median(values) for values in times.values())
    return [
        f"The loss alone, {tokens} tokens, V = {vocab_size:,}, widths {width} and {teacher_width}, {dtype}:", "",
        "| cross entropy s | teacher's head product s | KL from cached hidden states s | KL / the other two |",
        "|---|---|---|---|",
        f"| {entropy:.3f} | {product_seconds:.3f} | {kl:.3f} | {kl / (entropy + product_seconds):.2f} × |",
    ]  # fmt: skip


def step_seconds(folder: Path, overrides: list[str], rows: int | None = None) -> float:
    """Median time of a step (of so many rows, where not the file's) of a job in one process, the first ten left out."""
    command = [sys.executable, "-W", "ignore", "-m", "mobilellm_pro", "train", CONFIG, "--job.dump_folder", str(folder)]
    command += ["--training.steps", str(STEPS), "--validation.no_enable", "--checkpoint.no_enable"]
    command += ["--metrics.log_freq", "1", "--lr_scheduler.warmup_steps", "1", *overrides]
    command += ["--training.global_batch_size", str(rows)] if rows else []
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
    config = load(ROOT / CONFIG)
    tokens = (rows or config.training.global_batch_size) * config.training.seq_len
    return statistics.median(tokens / record["tokens_per_second"] for record in read_metrics(folder, "train")[10:])


def head_product_seconds(repeats: int) -> float:
    """[tokens, D] times [D, V] for all tokens of a step of the job, a micro-batch at a time."""
    config = load(ROOT / CONFIG)
    teacher = load_model(ROOT / config.teacher.path).model
    head = teacher.get_submodule("lm_head").weight.to(DEVICE)
    micro_batch = config.training.local_batch_size * config.training.seq_len
    hidden = torch.randn(micro_batch, head.shape[1], device=DEVICE)
    times = config.training.global_batch_size // config.training.local_batch_size
    return times * seconds(lambda: hidden @ head.T, 5 * repeats)


def options(arguments: argparse.Namespace, work: Path) -> list[str]:
    """A step of four micro-batches, with the teacher's options; on a GPU beside a teacher of 4.6B parameters."""
    variants = {"none": [], "float8": ["--teacher.quantization", "float8"]}
    common = ["--teacher.parallelism.data_parallel_shard_degree", "1"]
    lines = ["| options | seconds a step (each run) | tokens/s |", "|---|---|---|"]
    if GPU:
        variants |= {"overlap": ["--teacher.overlap"], "float8, overlap": ["--teacher.overlap", *variants["float8"]]}
        args = TeacherArgs(vocab_size=4096, hidden_size=2560, intermediate_size=4096, num_hidden_layers=8)
        write_teacher(
            Teacher(replace(args, num_attention_heads=20, num_key_value_heads=4)).bfloat16(), work / "teacher"
        )
        common += ["--teacher.path", str(work / "teacher"), "--teacher.dtype", "bfloat16"]
    else:
        lines = ["No second stream here, so no overlap; the quickstart's teacher, float32.", "", *lines]
    tokens = 32 * load(ROOT / CONFIG).training.seq_len
    times: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(arguments.repeats):
        for name, words in variants.items():
            times[name].append(step_seconds(work / f"{number} {name}", [*common, *words], rows=32))
    for name, runs in times.items():
        middle = statistics.median(runs)
        lines.append(f"| {name} | {middle:.4f} ({', '.join(f'{x:.4f}' for x in runs)}) | {tokens / middle:,.0f} |")
    return lines

"""The whole training step: ours beside torchtitan's own trainer and beside the Trainer of `transformers`.

    python benchmarks/train_step.py                                            # CPU: debug, sequences of 2,048
    python benchmarks/train_step.py --size 100m
    python benchmarks/train_step.py --size 1b --ways ce ce-compiled torchtitan-compiled kl-live      # one H100

Every way is a trainer in a process of its own, with the same shape and the same text. On a CPU all are built first and
then take turns of three steps, the first of which does not count, so that what disturbs one disturbs all; on a GPU,
whose memory they would not share, one comes after another. A step is all of it: data, models, loss, backward pass,
clipping, optimizer. Ratios are of medians.

`ce-global` computes what torchtitan's model computes but for its second vocabulary matrix, which is only looked up.
Operations a token are counted as `get_nparams_and_flops` of our student does, for torchtitan's model as well: 6 for
every weight that is multiplied, and attention with what each layer sees, causal rows half of it, borders of documents
left out. MFU is operations a
second over the peak: of bf16 as the maker states it (H100: 989 TFLOP/s), on a CPU a product of matrices of 2,048 in
float32 in this run.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from machine import GPU, ROOT, describe, seconds
from torchtitan.tools.utils import get_peak_flops
from train_step_jobs import Job

from mobilellm_pro.atomic_file import write_atomically
from mobilellm_pro.model.student import FLAVORS
from mobilellm_pro.training.step_ranges import STEP_RANGES

WAYS = {
    "ce": Job(),
    "ce-causal": Job(mask="causal"),
    "ce-global": Job(mask="causal", is_global=True),
    "ce-compiled": Job(compile=True),
    "ce-causal-compiled": Job(mask="causal", compile=True),
    "ce-selective": Job(checkpointing="selective"),
    "ce-full": Job(checkpointing="full"),
    "ce-foreach": Job(optimizer="foreach"),
    "kl-live": Job(objective="kl", teacher="live"),
    "kl-cached": Job(objective="kl", teacher="cached"),
    "kl-live-compiled": Job(objective="kl", teacher="live", compile=True),
    "torchtitan": Job(way="torchtitan"),
    "torchtitan-compiled": Job(way="torchtitan", compile=True),
    "transformers": Job(way="transformers"),
    "transformers-compiled": Job(way="transformers", compile=True),
}
TURN, PROFILED = 3, 2


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("debug", "100m", "1b"), default="debug")
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--rows", type=int, default=1, help="sequences of a step")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--rounds", type=int, default=5, help="turns of each way, after one to warm up")
    parser.add_argument("--write", type=Path, help="Markdown file; the numbers go beside it as .json")
    arguments = parser.parse_args()
    steps = (arguments.rounds + 1) * TURN + PROFILED
    size = {"flavor": arguments.size, "seq_len": arguments.seq_len, "rows": arguments.rows, "steps": steps}
    jobs = {name: replace(WAYS[name], **size) for name in arguments.ways}
    peak = get_peak_flops(torch.cuda.get_device_name()) if GPU else cpu_peak()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as open_ways:
        trainers: dict[str, Trainer] = {}
        found: dict[str, dict[str, Any]] = {}
        for name, job in jobs.items():
            trainers[name] = open_ways.enter_context(Trainer(job, Path(folder) / name))
            if GPU:
                found |= measured({name: trainers[name]}, arguments.rounds)
                trainers[name].end()
        if not GPU:
            found = measured(trainers, arguments.rounds)
    for name, job in jobs.items():
        found[name] |= {"name": job.name, **summary(found[name], arguments.rows * arguments.seq_len, peak)}
    lines = list(report(found, arguments, peak))
    print("\n".join(lines))
    if arguments.write:
        write_atomically(arguments.write, "\n".join(lines) + "\n")
        write_atomically(arguments.write.with_suffix(".json"), json.dumps(found, indent=1) + "\n")


class Trainer:
    """A process that trains a job step by step."""

    def __init__(self, job: Job, folder: Path, root: Path = ROOT) -> None:
        """
        Args:
            job: what to train.
            folder: for its files, not there yet.
            root: checkout whose code trains.
        """
        folder.mkdir()
        print(f"building {job.name}", file=sys.stderr, flush=True)
        program = root / "benchmarks/train_step_worker.py"
        environment = os.environ | {
            "OMP_NUM_THREADS": str(torch.get_num_threads()),
            "PYTHONPATH": str(root),
            "HF_DATASETS_CACHE": str(folder / "datasets"),
        }
        self._log = (folder / "log").open("w+")
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", str(program), json.dumps(asdict(job)), str(folder)],
            cwd=root, env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log,
        )  # fmt: skip
        self._job = job

    def __enter__(self) -> "Trainer":
        return self

    def __exit__(self, *error: object) -> None:
        self._process.kill()
        self._process.wait()
        self._log.close()

    def ask(self, *words: object) -> dict[str, Any]:
        """What it answers.

        Raises:
            RuntimeError: it has ended, with its last words.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        with suppress(BrokenPipeError):  # it has ended, and has no answer
            print(*words, file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        if not answer:
            self._log.seek(0)
            raise RuntimeError(f"{self._job.name}:\n{self._log.read()[-3000:]}")
        return json.loads(answer)

    def end(self) -> None:
        """Lets it go, with its memory."""
        assert self._process.stdin is not None
        print("end", file=self._process.stdin, flush=True)
        self._process.wait()


def measured(trainers: dict[str, Trainer], rounds: int) -> dict[str, dict[str, Any]]:
    """Seconds of each step, memory, size, and shares where the code names its parts; trainers take turns."""
    found: dict[str, dict[str, Any]] = {}
    for name, trainer in trainers.items():
        found[name] = {**trainer.ask("size"), "seconds": []}
    for number in range(rounds + 1):
        for name, trainer in trainers.items():
            answers = [trainer.ask("step") for _ in range(TURN)]
            found[name]["memory"] = answers[-1]["memory"]
            if number:
                found[name]["seconds"] += [answer["seconds"] for answer in answers[1:]]
        print(f"turn {number} of {rounds}", file=sys.stderr, flush=True)
    for name, trainer in trainers.items():
        if WAYS[name].way == "ours":
            found[name]["shares"] = trainer.ask("shares", PROFILED)["shares"]
    return found


def cpu_peak() -> float:
    """Floating point operations a second of a product of matrices in float32."""
    a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)
    return 2 * 2048**3 / seconds(lambda: a @ b, 9)


def summary(way: dict[str, Any], tokens: int, peak: float) -> dict[str, float]:
    """Of one way's steps."""
    step = statistics.median(way["seconds"])
    flops = way["flops_per_token"] * tokens / step
    return {"step": step, "tokens_per_second": tokens / step, "flops": flops, "mfu": flops / peak}


def report(found: dict[str, dict[str, Any]], arguments: argparse.Namespace, peak: float) -> Iterator[str]:
    """Lines of Markdown."""
    args = FLAVORS[arguments.size]
    yield f"# Training step: {arguments.size}, sequences of {arguments.seq_len:,}, {arguments.rows} a step"
    yield ""
    yield from describe(["torch", "torchtitan", "transformers", "accelerate"], torch.get_num_threads())
    yield ""
    stated = "as its maker states it" if GPU else "a product of float32 matrices of 2,048 here"
    order = "one after another" if GPU else "in turns"
    yield (
        f"Student: {args.num_hidden_layers} layers, width {args.hidden_size}, vocabulary {args.vocab_size:,}; "
        f"{'bf16' if GPU else 'float32'}; peak {peak / 1e12:.3f} TFLOP/s ({stated}); {(TURN - 1) * arguments.rounds} "
        f"steps of each, {order}; load average {os.getloadavg()[0]:.1f} after them."
    )
    yield ""
    baselines = [name for name in ("torchtitan", "transformers") if name in found]
    beside = "".join(f" {name}'s step / this |" for name in baselines)
    yield f"| way | parameters | step s (range) | tokens/s | TFLOP/s | MFU | memory MiB |{beside}"
    yield "|---|---:|---|---:|---:|---:|---:|" + "---:|" * len(baselines)
    for way in found.values():
        is_ce = ": ce" in way["name"]
        ratios = "".join(f" {found[name]['step'] / way['step']:.2f} |" if is_ce else " |" for name in baselines)
        yield (
            f"| {way['name']} | {way['parameters'] / 1e6:.1f}M "
            f"| {way['step']:.3f} ({min(way['seconds']):.3f} to {max(way['seconds']):.3f}) "
            f"| {way['tokens_per_second']:,.0f} | {way['flops'] / 1e12:.3f} | {100 * way['mfu']:.1f} % "
            f"| {way['memory']:,.0f} |{ratios}"
        )
    shared = {way["name"]: way["shares"] for way in found.values() if "shares" in way}
    if shared:
        parts = [part for part in (*STEP_RANGES, "rest") if any(part in shares for shares in shared.values())]
        yield from ("", "Shares of a step, each part without those in it; the loss makes the head's gradient:", "")
        yield "| way | " + " | ".join(part.removeprefix("step: ") for part in parts) + " |"
        yield "|---|" + "---:|" * len(parts)
        for name, shares in shared.items():
            yield f"| {name} | " + " | ".join(f"{100 * shares.get(part, 0):.1f} %" for part in parts) + " |"
    yield ""
    yield (
        "Doubts: torchtitan's model has two vocabulary matrices and full attention in every layer, and its loader "
        "makes tokens in the step, where ours reads them; the Trainer's data are rows in memory, and reading them is "
        "not counted. " + ("" if GPU else "Memory is the most that the process had resident, code and data included.")
    )


if __name__ == "__main__":
    main()

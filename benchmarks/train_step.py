"""The whole training step: ours beside torchtitan's own trainer and beside the Trainer of `transformers`.

    python benchmarks/train_step.py                                            # CPU: debug, sequences of 2,048
    python benchmarks/train_step.py --size 100m
    python benchmarks/train_step.py --size 1b --rows 8 --ways ce-compiled torchtitan-compiled        # one H100
    python benchmarks/train_step.py --size 1b --rows 4 --ways ce-compiled kl-live-compiled
    python benchmarks/train_step.py --size 1b --seq-len 8192 --rows 2 --ways ce-compiled ce-causal-compiled
    python benchmarks/train_step.py --size 1b --seq-len 131072 --checkpointing full --compile --ways ce ce-causal

Every way is a trainer in a process of its own, with the same shape and the same text. On a CPU all are built first and
then take turns of three steps, the first of which does not count, so that what disturbs one disturbs all; on a GPU,
whose memory they would not share, one comes after another. A step is all of it: data, models, loss, backward pass,
clipping, optimizer. Times are medians of steps. Ratios are of the turns' means: a turn gives one (on a GPU of what the
ways did at different times), they are averaged geometrically, and the 95 % interval is by Student's t of their
logarithms. A way that fails is named, and the others go on.

`ce-global` computes what torchtitan's model computes but for its second vocabulary matrix, which is only looked up.
Operations a token are counted as `get_nparams_and_flops` of our student does, for torchtitan's model as well: 6 for
every weight that is multiplied, and attention with what each layer sees, causal rows half of it, borders of documents
left out, so rows of many tokens seem faster than they are unless the mask is plain (`ce-causal`); of a teacher those of
its forward pass too. A step of the 1B moves 43 GB of weights, moments and gradients, 13 ms of an H100's time, whatever
its rows hold: MFU wants some 16,384 tokens a step. MFU is operations a second over the peak: of bf16 as the maker
states it (H100: 989 TFLOP/s), on a CPU a product of matrices of 2,048 in float32 in this run.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from machine import GPU, ROOT, describe, interval, seconds
from torchtitan.tools.utils import get_peak_flops
from tqdm import tqdm
from train_step_jobs import Job, teacher_args

from mobilellm_pro.atomic_file import write_atomically
from mobilellm_pro.model.student import FLAVORS
from mobilellm_pro.model.teacher import Teacher
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
    "ce-float8": Job(float8=True, compile=GPU),
    "kl-live": Job(objective="kl", teacher="live"),
    "kl-cached": Job(objective="kl", teacher="cached"),
    "kl-cached-256": Job(objective="kl", teacher="cached", chunk_tokens=256),
    "kl-live-compiled": Job(objective="kl", teacher="live", compile=True),
    "torchtitan": Job(way="torchtitan"),
    "torchtitan-compiled": Job(way="torchtitan", compile=True),
    "transformers": Job(way="transformers"),
    "transformers-compiled": Job(way="transformers", compile=True),
}
TURN, PROFILED = 3, 2
WORKER = Path(__file__).with_name("train_step_worker.py")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("debug", "100m", "1b"), default="debug")
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--rows", type=int, default=1, help="sequences of a step")
    default = [name for name, way in WAYS.items() if way.chunk_tokens is None]
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=default)
    parser.add_argument("--compile", action="store_true", help="every way, whatever its name says")
    parser.add_argument("--checkpointing", choices=("none", "selective", "full"), help="of every way")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each way, at least 2, after one to warm up")
    parser.add_argument("--write", type=Path, help="Markdown file; the numbers go beside it as .json")
    arguments = parser.parse_args()
    if arguments.rounds < 2:
        parser.error("--rounds: one turn has no interval; expected at least 2")
    steps = (arguments.rounds + 1) * TURN + PROFILED
    size = {"flavor": arguments.size, "seq_len": arguments.seq_len, "rows": arguments.rows, "steps": steps}
    switches = {"compile": True} if arguments.compile else {}
    switches |= {"checkpointing": arguments.checkpointing} if arguments.checkpointing else {}
    jobs = {name: replace(WAYS[name], **size, **switches) for name in arguments.ways}
    peak = get_peak_flops(torch.cuda.get_device_name()) if GPU else cpu_peak()
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as opened:
        world = Path(folder) / "world"
        write_world(list(jobs.values()), world)
        together = [[name] for name in jobs] if GPU else [list(jobs)]
        for names in together:
            trainers = {name: opened.enter_context(Trainer(jobs[name], world, Path(folder) / name)) for name in names}
            found |= measured(trainers, arguments.rounds)
            for trainer in trainers.values():
                trainer.end()
    failed = {name: way["failed"] for name, way in found.items() if "failed" in way}
    for name, words in failed.items():
        print(f"{name} failed:\n{words}", file=sys.stderr)
    found = {name: way for name, way in found.items() if len(way["seconds"]) == arguments.rounds}
    for name, way in found.items():
        way |= {"name": jobs[name].name, **summary(way, arguments.rows * arguments.seq_len, peak)}
    lines = list(report(found, arguments, peak))
    if failed:
        lines += ["", f"Failed: {', '.join(failed)}."]
    print("\n".join(lines))
    if arguments.write and found:
        write_atomically(arguments.write, "\n".join(lines) + "\n")
        write_atomically(arguments.write.with_suffix(".json"), json.dumps(found, indent=1) + "\n")
    sys.exit(bool(failed))


def write_world(jobs: Sequence[Job], world: Path, root: Path = ROOT) -> None:
    """Data of all ways, written once, by the code of the checkout `root`."""
    subprocess.run(worker(jobs, world), cwd=root, check=True, env=environment(root), stdout=sys.stderr)


def worker(jobs: Sequence[Job], world: Path) -> list[str]:
    """The command line of one."""
    return [sys.executable, "-W", "ignore", str(WORKER), json.dumps([asdict(job) for job in jobs]), str(world)]


def environment(root: Path) -> dict[str, str]:
    """Of a worker that runs the code of a checkout; the allocator's as launch/train.sh sets it."""
    own = {"OMP_NUM_THREADS": str(torch.get_num_threads()), "PYTHONPATH": str(root)}
    return {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"} | os.environ | own


class Trainer:
    """A process that trains a job step by step."""

    def __init__(self, job: Job, world: Path, folder: Path, root: Path = ROOT) -> None:
        """
        Args:
            job: what to train.
            world: data, as `write_world` writes them.
            folder: for its files, not there yet.
            root: checkout whose code trains.
        """
        self._log = tempfile.TemporaryFile("w+")
        command = [*worker([job], world), str(folder)]
        own = environment(root) | {"HF_DATASETS_CACHE": str(folder / "datasets")}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self._log}
        self._process = subprocess.Popen(command, cwd=root, env=own, text=True, **pipes)

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
            self._wait()
            self._log.seek(0)
            raise RuntimeError(self._log.read()[-3000:])
        return json.loads(answer)

    def end(self) -> None:
        """Lets it go, with its memory."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            print("end", file=self._process.stdin, flush=True)
        self._wait()

    def _wait(self) -> None:
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def measured(trainers: dict[str, Trainer], rounds: int) -> dict[str, dict[str, Any]]:
    """Seconds of the steps of each turn, memory, size, and shares where the code names its parts.

    Trainers take turns; of one that has ended there are its last words, as "failed".
    """
    found: dict[str, dict[str, Any]] = {name: {"seconds": []} for name in trainers}
    for number in tqdm(range(rounds + 2), desc=", ".join(trainers) if len(trainers) == 1 else "turns"):
        for name, trainer in trainers.items():
            if "failed" in found[name]:
                continue
            try:
                if number == 0:
                    found[name] |= trainer.ask("size")
                if number <= rounds:
                    steps = [trainer.ask("step")["seconds"] for _ in range(TURN)]
                    found[name] |= trainer.ask("peak")  # since the turn before
                    if number:
                        found[name]["seconds"].append(steps[1:])
                elif WAYS[name].way == "ours":
                    found[name] |= trainer.ask("shares", PROFILED)
            except RuntimeError as error:
                found[name]["failed"] = str(error)
    return found


def cpu_peak() -> float:
    """Floating point operations a second of a product of matrices in float32."""
    a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)
    return 2 * 2048**3 / seconds(lambda: a @ b, 9)


def summary(way: dict[str, Any], tokens: int, peak: float) -> dict[str, float]:
    """Of one way's steps."""
    step = statistics.median(chain(*way["seconds"]))
    flops = way["flops_per_token"] * tokens / step
    return {"step": step, "tokens_per_second": tokens / step, "flops": flops, "mfu": flops / peak}


def ratio(baseline: dict[str, Any], way: dict[str, Any]) -> str:
    """How much longer the baseline's steps take, with an interval."""
    turns = zip(baseline["seconds"], way["seconds"], strict=True)
    low, middle, high = interval([statistics.mean(theirs) / statistics.mean(ours) for theirs, ours in turns])
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def report(found: dict[str, dict[str, Any]], arguments: argparse.Namespace, peak: float) -> Iterator[str]:
    """Lines of Markdown."""
    args = FLAVORS[arguments.size]
    yield f"# Training step: {arguments.size}, sequences of {arguments.seq_len:,}, {arguments.rows} a step"
    yield ""
    yield from describe(
        ["torch", "torchtitan", "torchao", "triton", "transformers", "accelerate"], torch.get_num_threads()
    )
    yield ""
    stated = "as its maker states it" if GPU else "a product of float32 matrices of 2,048 here"
    order = "one after another" if GPU else "in turns"
    yield (
        f"Student: {args.num_hidden_layers} layers, width {args.hidden_size}, vocabulary {args.vocab_size:,}; "
        f"{'bf16' if GPU else 'float32'}; peak {peak / 1e12:.3f} TFLOP/s ({stated}); {(TURN - 1) * arguments.rounds} "
        f"steps of each, {order}; load average {os.getloadavg()[0]:.1f} after them."
    )
    if any(WAYS[name].objective == "kl" for name in found):
        with torch.device("meta"):
            teacher = Teacher(teacher_args(arguments.size))
        layers, width = teacher.model_args.num_hidden_layers, teacher.model_args.hidden_size
        count = sum(parameter.numel() for parameter in teacher.parameters())
        yield f"Teacher: Llama 4 with random weights, {count / 1e6:,.1f}M parameters, {layers} layers, width {width}."
    yield ""
    baselines = [name for name in ("ce", "torchtitan", "transformers") if name in found]
    beside = "".join(f" {found[name]['name']} / this |" for name in baselines)
    yield f"| way | parameters | step s (range) | tokens/s | TFLOP/s | MFU | memory MiB |{beside}"
    yield "|---|---:|---|---:|---:|---:|---:|" + "---:|" * len(baselines)
    for key, way in found.items():
        ratios = "".join(f" {ratio(found[name], way)} |" if name != key else " |" for name in baselines)
        steps = list(chain(*way["seconds"]))
        yield (
            f"| {way['name']} | {way['parameters'] / 1e6:.1f}M "
            f"| {way['step']:.3f} ({min(steps):.3f} to {max(steps):.3f}) "
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
        "not counted. Memory is the most of the last turn"
        + ("." if GPU else ": what the process had resident, code and data included.")
    )


if __name__ == "__main__":
    main()

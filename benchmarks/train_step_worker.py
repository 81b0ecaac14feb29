"""One way to train, in a process of its own for train_step.py: builds a trainer and does a step when it is told to.

    python benchmarks/train_step_worker.py '[{"way": "ours", "objective": "ce", ...}, ...]' WORLD
    python benchmarks/train_step_worker.py '[{"way": "ours", "objective": "ce", ...}]' WORLD FOLDER

Without a folder it writes what the jobs read. Else it reads words from standard input: `size` is answered by a line of
JSON with numbers of parameters and operations, `step` with the seconds of one step, `peak` with the most memory since
it was asked last, `shares N` with the shares of the ranges named in the code in N profiled steps (our trainer only),
`end` by nothing.
"""

import json
import math
import os
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from machine import GPU, MIB, synchronize
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from train_step_jobs import Job, build_titan, build_trainer, run_transformers, write_world

from mobilellm_pro.config import cpu_device
from mobilellm_pro.model.student import FLAVORS
from mobilellm_pro.training.step_ranges import STEP_RANGES


def main() -> None:
    """Command line: jobs as JSON, a folder with data, a folder for a job's own files."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # trainers print
    jobs, world = [Job(**job) for job in json.loads(sys.argv[1])], Path(sys.argv[2])
    if not sys.argv[3:]:
        write_world(jobs, world)
        return
    (job,), folder = jobs, Path(sys.argv[3])
    folder.mkdir()
    build = {"ours": build_trainer, "torchtitan": build_titan}
    conversation = Conversation(replies)
    if job.way == "transformers":
        run_transformers(job, world, folder, conversation)  # its loop calls back
        return
    trainer = build[job.way](job, world, folder)
    batches = trainer.batch_generator(trainer.dataloader)
    while conversation.waits(trainer.model_parts[0], operations(trainer, job)):
        trainer.step += 1
        trainer.train_step(batches)
        conversation.answer()


class Conversation:
    """What the driver asks and what it is told."""

    def __init__(self, replies: Any) -> None:
        self._replies = replies
        self._begin = 0.0
        self._profiled: Profiled | None = None

    def waits(self, model: torch.nn.Module, flops: float) -> bool:
        """Before a step: whether there is to be one."""
        if self._profiled is None:
            word, *rest = sys.stdin.readline().split() or ["end"]
            while word in ("size", "peak"):
                number = sum(p.numel() for p in model.parameters())
                self._say({"parameters": number, "flops_per_token": flops} if word == "size" else {"memory": peak()})
                word, *rest = sys.stdin.readline().split() or ["end"]
            if word == "shares":
                self._profiled = Profiled(int(rest[0]))
            elif word != "step":
                return False
        synchronize()
        self._begin = time.perf_counter()
        return True

    def answer(self) -> None:
        """After it."""
        synchronize()
        seconds = time.perf_counter() - self._begin
        if self._profiled is None:
            self._say({"seconds": seconds})
        elif (shares := self._profiled.after_step(seconds)) is not None:
            self._profiled = None
            self._say({"shares": shares})

    def _say(self, message: dict[str, Any]) -> None:
        print(json.dumps(message), file=self._replies, flush=True)


class Profiled:
    """Some steps under torch's profiler."""

    def __init__(self, steps: int) -> None:
        self._left, self._seconds = steps, 0.0
        activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if GPU else [])
        self._profile = profile(activities=activities)
        self._profile.__enter__()

    def after_step(self, seconds: float) -> dict[str, float] | None:
        """Shares of the time of all steps, after the last one."""
        self._left, self._seconds = self._left - 1, self._seconds + seconds
        if self._left:
            return None
        self._profile.__exit__(None, None, None)
        return shares(self._profile.events(), self._seconds)


def operations(trainer: Any, job: Job) -> float:
    """Of a token's training; torchtitan's model counted as ours is, with attention to all before in every layer."""
    if job.way == "ours":
        return trainer.metrics_processor.num_flops_per_token
    (model,), args = trainer.model_parts, FLAVORS[job.flavor]
    multiplied = sum(p.numel() for p in model.parameters()) - model.tok_embeddings.weight.numel()
    attention = 12 * args.num_attention_heads * args.head_dim * job.seq_len / 2
    return 6 * multiplied + args.num_hidden_layers * attention


def shares(events: Any, seconds: float) -> dict[str, float]:
    """Range -> share of the time, each without the ranges in it.

    On a CPU that is the time in the range. On a GPU it is the time of the kernels that were launched while it was open,
    by any thread: the backward pass launches from its own; what it waited is in "rest".
    """
    own = [event for event in events if event.device_type == DeviceType.CPU]  # a GPU's timeline has them once more
    ranges = sorted((e.time_range.start, e.time_range.end, e.name) for e in own if e.name in STEP_RANGES)
    spent: dict[str, float] = defaultdict(float)
    if GPU:
        for event in own:
            inside = [(begin, name) for begin, end, name in ranges if begin <= event.time_range.start < end]
            if event.kernels and inside:
                spent[max(inside)[1]] += sum(kernel.duration for kernel in event.kernels)
    else:
        for begin, end, name in ranges:
            spent[name] += end - begin
            around = [(b, n) for b, e, n in ranges if b < begin and end <= e]
            if around:
                spent[max(around)[1]] -= end - begin
    found = {name: spent[name] / 1e6 / seconds for name in STEP_RANGES if name in spent}
    return found | {"rest": 1 - math.fsum(found.values())}


def peak() -> float:
    """MiB: the most of the GPU's memory, or the process', since this was asked last."""
    device: Any = torch.cuda if GPU else cpu_device
    most = device.memory_stats()["active_bytes.all.peak"] / MIB
    device.reset_peak_memory_stats()
    return most


if __name__ == "__main__":
    main()

"""What train_step.py and its workers say to each other, and what a worker measures of its steps."""

import json
import math
import sys
import time
from collections import defaultdict
from typing import Any

import torch
from machine import GPU, MIB, synchronize
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from mobilellm_pro.config import cpu_device
from mobilellm_pro.training.step_ranges import STEP_RANGES


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

"""The CPU, with the questions that torchtitan asks of an accelerator's module (`torch.cuda`, `torch.xpu`).

`cpu.py` hands this module to torchtitan as its device module. Everything not defined here is `torch.cpu`'s. Memory
numbers are those of the process: a CPU has no allocator to ask, and the resident set is what a user runs out of.
"""

import os
import platform
import resource
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")


class CpuProperties(NamedTuple):
    """The part of a device's properties that torchtitan reads."""

    name: str
    total_memory: int
    """Physical memory of the machine, in bytes."""


def __getattr__(name: str) -> Any:
    """Everything else is `torch.cpu`'s (set_device, synchronize, Stream, ...)."""
    return getattr(torch.cpu, name)


def current_device() -> int:
    """The index of the one CPU; torch.cpu answers "cpu" where callers of an accelerator's module expect a number."""
    return 0


def get_device_name(device: torch.device | str | int | None = None) -> str:
    """The processor's name as the operating system reports it."""
    return platform.processor() or platform.machine() or "cpu"


def get_device_properties(device: torch.device | str | int | None = None) -> CpuProperties:
    """Name and physical memory of this machine."""
    return CpuProperties(get_device_name(device), os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def memory_stats(device: torch.device | str | int | None = None) -> dict[str, int]:
    """Peak resident memory of this process in bytes, under the names of the CUDA allocator's statistics."""
    peak_bytes = _peak_resident_bytes()
    return {
        "active_bytes.all.peak": peak_bytes,
        "reserved_bytes.all.peak": peak_bytes,
        "num_alloc_retries": 0,
        "num_ooms": 0,
    }


def reset_peak_memory_stats(device: torch.device | str | int | None = None) -> None:
    """Start a new peak where the kernel can do so (Linux); elsewhere the peak is that of the whole process."""
    try:
        _CLEAR_REFS.write_text("5")  # proc(5): resets VmHWM to the present resident set
    except OSError:
        pass


def empty_cache() -> None:
    """Nothing: there is no caching allocator."""


def _peak_resident_bytes() -> int:
    try:
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # bytes on macOS, KiB on Linux

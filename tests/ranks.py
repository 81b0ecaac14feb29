"""Runs a function on several gloo ranks, cheaply: ranks fork from a server that has torch and torchtitan imported.

A torchrun start costs most of a minute of imports on a small machine; a forked rank costs less than a second. Forking
is safe because the server itself never computes: it has no threads.
"""

import faulthandler
import multiprocessing
import os
import queue
import signal
import socket
import time
import traceback
from collections.abc import Callable
from typing import Any

# The server asks whether there is a GPU when it imports the project; asked by way of CUDA, no rank could use it.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
PRELOADED = ["torch", "mobilellm_pro.config", "mobilellm_pro.training.run"]


class Ranks:
    """Processes that run `function(*args)` with torchrun's environment, started at once."""

    def __init__(self, function: Callable[..., Any], world_size: int, *args: Any) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        self._results: Any = context.Queue()
        port = _free_port()
        self.processes = [
            context.Process(target=_rank, args=(self._results, rank, world_size, port, function, args))
            for rank in range(world_size)
        ]
        for process in self.processes:
            process.start()

    def results(self, timeout_seconds: float = 120) -> list[Any]:
        """What the ranks returned, in rank order; AssertionError with the ends of the failed ones, or on a timeout."""
        collected: dict[int, Any] = {}
        failed: dict[int, str] = {}
        deadline = time.monotonic() + timeout_seconds
        try:
            while len(collected) + len(failed) < len(self.processes) and time.monotonic() < deadline:
                known = len(collected) + len(failed)
                codes = {rank: process.exitcode for rank, process in enumerate(self.processes)}
                try:
                    rank, result, error = self._results.get(timeout=1)
                    if error is None:
                        collected[rank] = result
                    else:
                        failed[rank] = error
                except queue.Empty:  # a rank sends what it has to say before it ends
                    silent = {rank: code for rank, code in codes.items() if rank not in collected | failed}
                    failed |= {rank: f"died, exit code {code}" for rank, code in silent.items() if code is not None}
                if len(collected) + len(failed) > known:
                    # A failed rank takes its connections along: the first to complain is often not the first to fail.
                    deadline = time.monotonic() + (10 if failed else timeout_seconds)
        finally:
            self.stop()
        others = f"{sorted(collected)} of {len(self.processes)} finished"
        assert not failed, "\n".join([*(f"rank {rank}: {failed[rank]}" for rank in sorted(failed)), f"only {others}"])
        assert len(collected) == len(self.processes), f"ranks hung: only {others}"
        return [collected[rank] for rank in range(len(self.processes))]

    def stop(self) -> None:
        """Ends what still runs."""
        for process in self.processes:
            process.join(timeout=5)
            process.kill()
            process.join()


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any, timeout_seconds: float = 120) -> list[Any]:
    """Calls `function(*args)` on every rank and waits; results in rank order, AssertionError where one failed."""
    return Ranks(function, world_size, *args).results(timeout_seconds)


def _rank(results: Any, rank: int, world_size: int, port: int, function: Callable[..., Any], args: Any) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        MASTER_ADDR="localhost",
        MASTER_PORT=str(port),
    )
    faulthandler.enable()  # where a rank dies in native code
    # A job that a shell started in the background ignores Ctrl-C, and its children inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    import torch

    torch.set_num_threads(1)
    try:
        results.put((rank, function(*args), None))
    except BaseException:
        results.put((rank, None, traceback.format_exc()))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]

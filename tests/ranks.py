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
        """What the ranks returned, in rank order; AssertionError with the failed ranks' ends, or on a timeout."""
        collected: dict[int, Any] = {}
        failed: dict[int, str] = {}
        try:
            while len(collected) + len(failed) < len(self.processes):
                rank, result, error = self._results.get(timeout=5 if failed else timeout_seconds)
                if error is None:
                    collected[rank] = result
                else:
                    failed[rank] = error
        except queue.Empty:
            assert failed, f"ranks hung: only {sorted(collected)} of {len(self.processes)} finished"
        finally:
            ends = [process.exitcode for process in self.processes]
            self.stop()
        # A rank that fails takes its connections along, so the first to complain is often not the first to fail.
        complaints = [f"rank {rank} of {len(self.processes)}:\n{error}" for rank, error in sorted(failed.items())]
        assert not failed, "\n".join([*complaints, f"exit codes: {ends} (negative: the signal)"])
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

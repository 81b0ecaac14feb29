"""Runs a function on several gloo ranks, cheaply: ranks fork from a server that has torch and torchtitan imported.

A torchrun start costs most of a minute of imports on a small machine; a forked rank costs less than a second. Forking
is safe because the server itself never computes: it has no threads.
"""

import multiprocessing
import os
import queue
import socket
import traceback
from collections.abc import Callable
from typing import Any

PRELOADED = ["torch", "mobilellm_pro.config", "mobilellm_pro.training.run"]


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any, timeout_seconds: float = 120) -> list[Any]:
    """Calls `function(*args)` on `world_size` ranks with torchrun's environment; results in rank order.

    Raises:
        AssertionError: with the traceback of the first rank that failed, or on a timeout.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    results: Any = context.Queue()
    port = _free_port()
    ranks = [
        context.Process(target=_rank, args=(results, rank, world_size, port, function, args), daemon=True)
        for rank in range(world_size)
    ]
    for process in ranks:
        process.start()
    collected: dict[int, Any] = {}
    try:
        while len(collected) < world_size:
            rank, result, error = results.get(timeout=timeout_seconds)
            assert error is None, f"rank {rank} of {world_size}:\n{error}"
            collected[rank] = result
    except queue.Empty:
        raise AssertionError(f"ranks hung: only {sorted(collected)} of {world_size} finished") from None
    finally:
        for process in ranks:
            process.join(timeout=5)
            process.kill()
    return [collected[rank] for rank in range(world_size)]


def _rank(results: Any, rank: int, world_size: int, port: int, function: Callable[..., Any], args: Any) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        MASTER_ADDR="localhost",
        MASTER_PORT=str(port),
    )
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

"""Ranks that do not come to a collective: the others end after a timeout, and say which ones they waited for.

gloo raises an error in every rank that waits. NCCL's watchdog ends the process itself, with the size and the timeout of
the collective in its message and the latest collectives of the rank in comm.save_traces_folder. Either way torchrun
then ends all that is left, a rank that hangs too: SIGTERM first, SIGKILL 30 seconds later.
"""

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist
from torchtitan.config import Comm
from torchtitan.distributed import ParallelDims
from torchtitan.distributed import utils as dist_utils
from torchtitan.tools.logging import logger

_TIMED_OUT = re.compile(r"[Tt]imed out waiting|[Cc]ollective operation timeout|[Ww]ait timeout")
_PREFIX = "mobilellm_pro/timed_out"
_ROLL_CALL_SECONDS = 3.0
"""Ranks wait for each other from about the same moment on, so those that can still speak do so within this time."""


class CollectiveTimeouts:
    """The timeouts of a run, on one rank."""

    def __init__(self, comm: Comm, parallel_dims: ParallelDims) -> None:
        """
        Args:
            comm: [comm].
            parallel_dims: whose groups have timeouts.
        """
        self._comm, self._parallel_dims = comm, parallel_dims
        self._key = "init_timeout_seconds"

    def shorten(self, step: int) -> None:
        """To be called when the first step of this process, number `step`, is done: what comes is known to be fast.

        torchtitan itself does it after step 1, which a run that goes on never comes to.
        """
        self._key = "train_timeout_seconds"
        if step > 1:
            dist_utils.set_pg_timeouts(timedelta(seconds=self._comm.train_timeout_seconds), self._parallel_dims)

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Around what has collectives.

        Raises:
            TimeoutError: in the place of torch's error; it names the key and, where they are known, the ranks.
        """
        try:
            yield
        except RuntimeError as error:
            if not _TIMED_OUT.search(str(error)):
                raise
            message = self._message()
            logger.error(message)
            raise TimeoutError(message) from error

    def _message(self) -> str:
        missing, key = _missing_ranks(), f"comm.{self._key}"
        if missing is None:
            who = "the other ranks cannot be asked any more"
        elif missing:
            who = f"rank{'s' * (len(missing) > 1)} {', '.join(map(str, missing))} did not come: hung, dead or too slow"
        else:
            who = "every rank waited"
        return (
            f"ranks waited for each other longer than {key} = {getattr(self._comm, self._key)}: {who}. Started again, "
            f"the run goes on from its newest checkpoint; raise {key} if a rank may take that long"
        )


def _missing_ranks() -> list[int] | None:
    """Ranks that have not called this within a few seconds; None where the store is gone."""
    try:
        store = dist.distributed_c10d._get_default_store()
        store.set(f"{_PREFIX}/{dist.get_rank()}", "1")
        time.sleep(_ROLL_CALL_SECONDS)
        return [rank for rank in range(dist.get_world_size()) if not store.check([f"{_PREFIX}/{rank}"])]
    except (RuntimeError, ValueError):
        return None

"""A rank does not outlive its torchrun: what is left of a killed job would meet the next one in the same folder.

torchrun ends its ranks when it ends itself, unless it is killed (SIGKILL, out of memory). On Linux the kernel can be
asked to kill a process when its parent dies.
"""

import os
import signal
from datetime import timedelta

import torch.distributed as dist

from mobilellm_pro.parent_death import parent_death_signal

_ANSWER_SECONDS = 15


def end_with_launcher() -> None:
    """Under torchrun on Linux: lets this process be killed when torchrun is gone. Elsewhere does nothing.

    Raises:
        SystemExit: torchrun is gone already; it died while this process imported its modules.
    """
    ask_for_signal = parent_death_signal(signal.SIGKILL)
    if ask_for_signal is None or "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    ask_for_signal()
    if not _launcher_answers():
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise SystemExit(f"error: torchrun does not answer at {address}: it ended while this rank was starting")


def _launcher_answers() -> bool:
    """Whether the store that torchrun keeps for its ranks can be reached; True where it keeps none.

    The parent's process id tells nothing: a process that has lost its parent gets another one, and torchrun itself
    may be process 1 of a container.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return True
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        dist.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=_ANSWER_SECONDS), wait_for_workers=False)
    except dist.DistError:
        return False
    return True

"""A signal at the death of the parent, by which a process does not outlive who started it; Linux alone sends one."""

import ctypes
import os
import signal
import sys
from collections.abc import Callable

_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


def parent_death_signal(number: signal.Signals) -> Callable[[], None] | None:
    """The call by which a process asks for the signal; None where there is no such thing.

    All that the call needs is loaded before, so that it may stand between fork and exec. It raises OSError.
    """
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None, use_errno=True).prctl

    def ask() -> None:
        if prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0) != 0:
            error = ctypes.get_errno()
            raise OSError(error, f"prctl(PR_SET_PDEATHSIG): {os.strerror(error)}")

    return ask

"""A run that is asked to stop: by the file STOP in its folder, or by SIGTERM or SIGUSR1 to any of its ranks.

The run ends after the step that it is in, with a checkpoint of that step, and goes on from there when it is started
again. The file is for whoever knows of a time limit beforehand, and gives a step all the time that it needs. torchrun
passes SIGTERM on to its ranks and kills them 30 seconds later (`--shutdown-timeout`); SIGUSR1 it does not pass on.

A signal only sets a flag here: ranks are stopped by what they agree on once a step (`step_guard`).
"""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from torchtitan.tools.logging import logger

STOP = "STOP"
"""Name of the file, in `job.dump_folder`."""

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
_NOBODY, _FILE, _SIGNAL = range(3)


class StopRequest:
    """What one rank knows of a request."""

    def __init__(self, folder: Path, *, looks_at_file: bool) -> None:
        """
        Args:
            folder: of the run.
            looks_at_file: whether this rank looks for the file; one of them does.
        """
        self._path, self._looks_at_file = folder / STOP, looks_at_file
        self._signalled = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Takes signals as requests, where Python allows it: in the main thread."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._note) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._signalled = True

    def look(self) -> int:
        """A number that is the greater the more should be said of it, 0 where nobody asks; see `in_words`."""
        if self._signalled:
            return _SIGNAL
        return _FILE if self._looks_at_file and self._path.exists() else _NOBODY

    def remove(self, *, older_than: float | None = None) -> None:
        """Removes the file.

        Args:
            older_than: leave one that was made at this time, in seconds since the epoch, or later.
        """
        try:
            if older_than is None or self._path.stat().st_mtime < older_than:
                self._path.unlink()
                logger.info(f"{self._path} is removed")
        except FileNotFoundError:
            pass


def in_words(request: int) -> str:
    """Who asks, after `StopRequest.look`."""
    return {_FILE: f"{STOP} asks", _SIGNAL: "a signal asks"}[request]


def begin_of_this_run() -> float:
    """When this process, or torchrun above it, was started, in seconds since the epoch.

    Importing torch takes long enough for somebody to ask for a stop meanwhile.
    """
    starts = [time.time()]
    for pid in [os.getpid()] + [os.getppid()] * ("TORCHELASTIC_RUN_ID" in os.environ):
        try:
            # The 22nd field; the second is the name, in parentheses, with any characters in it.
            ticks = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
        except (OSError, ValueError, IndexError):
            continue  # not Linux, or the parent is gone
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
        starts.append(time.time() - age)
    return min(starts)

"""One run at a time in a folder: its first rank holds a lock for as long as it lives.

It is a lock of the process (POSIX), not of the open file: workers of a data loader, which are forked and outlive a
killed rank for seconds, do not hold it.
"""

import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mobilellm_pro.config import JobError
from mobilellm_pro.file_lock import try_lock

LOCK = "run.lock"
WAIT_SECONDS = 40.0
"""A run that was asked to stop or whose launcher was killed may be about to end; torchrun gives its ranks 30 s."""


@contextmanager
def run_lock(folder: Path, wait_seconds: float = WAIT_SECONDS) -> Iterator[None]:
    """Holds the lock of a run's folder; the system releases it when the process ends, however it ends.

    Args:
        folder: job.dump_folder, which exists.
        wait_seconds: how long another run may take to end.

    Raises:
        JobError: another run holds it; the process and its machine are named.
    """
    deadline = time.monotonic() + wait_seconds
    with (folder / LOCK).open("a+") as file:
        while not try_lock(file.fileno(), file.name, fcntl.lockf):
            if time.monotonic() >= deadline:
                file.seek(0)
                raise JobError(
                    str(folder),
                    [
                        f"another run, {file.read() or 'unknown'}, is at work in this folder: wait for its end, ask it "
                        "to stop (a file STOP in the folder, or SIGTERM), or choose another job.dump_folder"
                    ],
                )
            time.sleep(0.1)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield

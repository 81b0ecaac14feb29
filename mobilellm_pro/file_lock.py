"""Locks of files, by which processes keep out of each other's way; some file systems of clusters have none."""

import errno
import fcntl
import sys
from collections.abc import Callable

_HELD = {errno.EACCES, errno.EAGAIN}
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}


def try_lock(descriptor: int, name: object, lock: Callable[[int, int], None] = fcntl.flock) -> bool:
    """Takes the lock of an open file if nobody holds it; where there are no locks it says so and counts as taken.

    Args:
        descriptor: of the file, open for writing.
        name: its path, for the message.
        lock: `fcntl.flock`, a lock of the open file, which children inherit, or `fcntl.lockf`, of this process alone.

    Returns:
        whether it is this one's now.
    """
    try:
        lock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _HELD:
            return False
        if error.errno not in _NO_LOCKS:
            raise
        print(f"warning: {name}: this file system has no locks, nothing keeps a second process out", file=sys.stderr)
    return True

"""Files that are there as a whole or not at all: written under a temporary name beside the target, then renamed.

A reader, or a start after a kill or a power cut, finds the old file or the new one and never half of one. It stands
below all rooms, since all of them leave files that another process reads.
"""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def write_atomically(path: Path, content: str | bytes) -> None:
    """Puts a file with this content in the place of the one that may be there.

    Args:
        path: of the file, in a folder that exists.
        content: all of it; text is written as UTF-8.

    Raises:
        OSError: it cannot be written; the old file stays and nothing else remains.
    """
    with replacement(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


@contextmanager
def replacement(path: Path) -> Iterator[Path]:
    """Gives a temporary name beside `path`; what the block writes there is on disk and under `path` after it.

    The name is drawn anew each time, so that processes, also of several machines, may write the same file at once. A
    block that fails leaves the old file and nothing else. For what is not one string: tables, plots, arrays.
    """
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)

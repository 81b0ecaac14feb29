"""A file that several processes may write at once, of which only the first counts: shared settings of a folder."""

import os
import secrets
from pathlib import Path


def write_if_absent(path: Path, text: str, suffix: str = ".tmp") -> None:
    """Writes a file, complete under its name from the first moment, or leaves the one that is there.

    Unlike a rename, a hard link never replaces what another process wrote.

    Args:
        path: of the file, in a folder that exists.
        text: its content.
        suffix: of the temporary name.

    Raises:
        OSError: the folder cannot be written, or is on a file system without hard links; nothing remains.
    """
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(8)}{suffix}")
    try:
        with temporary.open("x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.link(temporary, path)
    except FileExistsError:
        pass
    finally:
        temporary.unlink(missing_ok=True)

"""A file that several processes may write at once, of which only the first counts: shared settings of a folder."""

import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any


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


def agree_on_settings(path: Path, settings: Mapping[str, Any], *, said: str, cure: str, begin: bool = True) -> None:
    """Notes what something is begun with, or compares with what stands there.

    Args:
        path: of the JSON file; its folder is made if need be.
        settings: name -> JSON value.
        said, cure: before and after the differences in the message.
        begin: whether it begins now; else nothing is noted.

    Raises:
        ValueError: they differ; names each difference.
    """
    own = json.loads(json.dumps(settings))
    if begin:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_if_absent(path, json.dumps(own, indent=2) + "\n")
    elif not path.is_file():
        return
    found = json.loads(path.read_text())
    lines = [
        f"  {key}: {found.get(key)!r} there, {own.get(key)!r} now"
        for key in {**found, **own}
        if found.get(key) != own.get(key)
    ]
    if lines:
        raise ValueError("\n".join([f"{path}: {said}:", *lines, cure]))

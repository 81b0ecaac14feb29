"""The folder of a hidden-state cache: can it be written, and whose hidden states are in it.

cache.json names the teacher and the number format. The first of the processes that write at once makes it.
"""

import json
import secrets
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from mobilellm_pro.data.claimed_file import write_if_absent
from mobilellm_pro.data.hidden_state_files import (
    TEMPORARY,
    VERSION,
    CacheKey,
    differences,
    existing_parent,
)

CACHE_FILE = "cache.json"


def folder_problem(folder: Path, names: Iterable[str]) -> str:
    """Why a cache cannot be written, in words; "" where it can. Nothing is made but a file that is removed again.

    Args:
        folder: of the cache; where it does not exist the nearest folder above it that does is tried.
        names: of the corpora, each of which has a folder in it.
    """
    tried = {existing_parent(path) for path in (folder, *(folder / name for name in names))}
    for parent in sorted(tried):
        probe = parent / f"{CACHE_FILE}.{secrets.token_hex(8)}{TEMPORARY}"
        try:
            if (folder / CACHE_FILE).exists():  # other files are only renamed into place
                probe.touch(exist_ok=False)
            else:
                write_if_absent(probe, "", TEMPORARY)
            probe.unlink()
        except OSError as error:
            return _cannot_write(folder, parent, error)
    return ""


def claim_cache(folder: Path, key: CacheKey, teacher_path: str) -> None:
    """Writes cache.json where there is none; any number of processes may do so at once.

    Raises:
        ValueError: it is there, for another teacher or number format, or it cannot be written.
    """
    path = folder / CACHE_FILE
    if not path.exists():
        content = {"version": VERSION, "teacher_path": teacher_path, **asdict(key)}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_if_absent(path, json.dumps(content, indent=2) + "\n", TEMPORARY)
        except OSError as error:
            raise ValueError(_cannot_write(folder, folder, error)) from None
    check_cache(folder, key, teacher_path)


def check_cache(folder: Path, key: CacheKey, teacher_path: str) -> None:
    """Compares cache.json with what a job expects.

    Raises:
        FileNotFoundError: no such folder, or no cache in it.
        ValueError: a damaged file, or a cache of another teacher or number format; all differences are named.
    """
    path = folder / CACHE_FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist: teacher.cache_path is no cache of hidden states: correct it, or run a job with "
            'teacher.cache = "write" first'
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        version, path_then = content.pop("version"), content.pop("teacher_path")
        found = CacheKey(**content) if version == VERSION else None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path}: not the file of a cache ({error}): choose another teacher.cache_path") from None
    if found is None:
        raise ValueError(f"{path}: version {version}, expected {VERSION}: choose another teacher.cache_path")
    if found != key:
        raise ValueError(
            f"{path}: hidden states of another kind, written with the teacher {path_then}; the job's is "
            f"{teacher_path}: {differences(found, key)}: correct [teacher] or choose another teacher.cache_path"
        )


def _cannot_write(folder: Path, where: Path, error: OSError) -> str:
    return (
        f"teacher.cache_path = {str(folder)!r}: no cache can be written in {where} ({error.strerror or error}): choose "
        "a folder that this user may write to, on a file system with hard links"
    )

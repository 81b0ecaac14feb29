"""The sources of a corpus as they are on disk: sizes, times and checksums, and what has changed since.

A source is one file, all files of a folder, or an `.idx` with its `.bin`. Checksums are compared only where one of the
same size has another time of change, so looking at a finished corpus reads nothing.
"""

import hashlib
from pathlib import Path
from typing import Any

from mobilellm_pro.data.dataset_config import DatasetConfig, folder_files
from mobilellm_pro.data.manifest import file_sha256
from mobilellm_pro.data.source import Source


def corpus_sources(dataset: DatasetConfig) -> list[Source]:
    """The sources of a dataset; to an `.idx` belong the bytes of its `.bin`, where the tokens are."""
    sources = dataset.sources()
    if dataset.format != "megatron":
        return sources
    sizes = [sum(file.stat().st_size for file in source_files(source) if file.exists()) for source in sources]
    return [source._replace(num_bytes=size) for source, size in zip(sources, sizes, strict=True)]


def source_changes(known: list[dict[str, Any]], sources: list[Source]) -> list[str]:
    """Sources that came, went before they were read, or hold something else than they did."""
    old = {entry["name"]: entry for entry in known}
    today = {source.name: source for source in sources}
    found = [f"source {name} is new" for name in today if name not in old]
    for name, entry in old.items():
        read = "sha256" in entry  # what has not been read yet may be repaired
        if name not in today:  # raw text may be deleted once it is prepared
            found += [] if read else [f"source {name} is gone"]
        elif read and entry["num_bytes"] != today[name].num_bytes:
            found.append(f"source files changed: {name} had {entry['num_bytes']} bytes, now {today[name].num_bytes}")
        elif _content_changed(entry, today[name]):
            found.append(f"source files changed: {name} has another content of the same size")
    return found


def _content_changed(entry: dict[str, Any], source: Source) -> bool:
    if entry.get("sha256") is None:  # not read yet, or from the network
        return False
    return entry["mtime_ns"] != source_mtime(source) and entry["sha256"] != source_sha256(source)


def source_record(source: Source, mtime_ns: int, known: dict[Path, str] | None = None) -> dict[str, Any]:
    """Name, path, num_bytes, mtime_ns and sha256 of a source that has been read (the last three None for the network).

    Args:
        source: what was read.
        mtime_ns: its `source_mtime` before.
        known: file -> sha256, where somebody has computed it already.

    Raises:
        ValueError: it was changed meanwhile.
    """
    record = {"name": source.name, "path": None, "num_bytes": source.num_bytes, "mtime_ns": None, "sha256": None}
    if source.path is None:
        return record
    digest = source_sha256(source, known)
    if source_mtime(source) != mtime_ns:
        raise ValueError(f"{source.path} was changed while it was read: run `prepare` again when it is complete")
    return {**record, "path": str(source.path), "mtime_ns": mtime_ns, "sha256": digest}


def source_files(source: Source) -> list[Path]:
    """The files behind a source: itself, also the `.bin` beside an `.idx`, or all below a folder."""
    path = source.path
    if path is None:
        return []
    if path.is_dir():
        return folder_files(path)
    return [path, path.with_suffix(".bin")] if path.suffix == ".idx" else [path]


def source_mtime(source: Source) -> int:
    """Time of change in nanoseconds, added up over the files of a folder: any changed file changes the sum."""
    return sum(file.stat().st_mtime_ns for file in source_files(source) if file.exists())


def source_sha256(source: Source, known: dict[Path, str] | None = None) -> str:
    """sha256 of a file; of names and sha256 of the files when there are several, of which some may be `known`."""
    files = source_files(source)
    if files == [source.path]:
        return file_sha256(files[0])
    digest = hashlib.sha256()
    for file in files:
        content = (known or {}).get(file) or file_sha256(file)
        digest.update(f"{file}\n{content}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()

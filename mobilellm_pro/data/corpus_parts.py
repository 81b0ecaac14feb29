"""The parts of a corpus that is being made: which sources belong together, what is done, what has changed since.

`plan.json` is written first. It names the settings, the tokenizer and the sources of each part, so that a second run
continues the same corpus or refuses to. A finished part leaves `part-<number>.json` (by rename); when all are there
they become the manifest and disappear. A part's files are named after it, so parts never touch each other's:

    plan.json  part-00000.json  train-00000-000.bin/.idx  train-00000-001.bin/.idx  valid-00000-000.bin/.idx  ...
"""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from mobilellm_pro.data.clusters import remove_clusters
from mobilellm_pro.data.dataset_config import DatasetConfig
from mobilellm_pro.data.manifest import FILE as MANIFEST
from mobilellm_pro.data.manifest import (
    Manifest,
    ShardRecord,
    read_shards,
    write_json,
    write_manifest,
)
from mobilellm_pro.data.shard_writer import full_disk_named
from mobilellm_pro.data.source import Source
from mobilellm_pro.data.source_records import corpus_sources, source_changes
from mobilellm_pro.data.tokenizer import Tokenizer
from mobilellm_pro.file_lock import try_lock

SPLITS = ("train", "valid", "dev")
PLAN = "plan.json"
PLAN_VERSION = 1
PART_BYTES = 256 * 2**20
"""Sources are added to a part until they reach this: minutes of work, so a kill costs little and all cores are busy."""


def splits_of(settings: dict[str, Any]) -> tuple[str, ...]:
    """The splits that a corpus of these settings has; "dev" only where a share of the documents is asked for."""
    return SPLITS if settings.get("dev") else SPLITS[:2]


def split_of(key: str, holdout: float, dev: float = 0.0) -> str:
    """The split of a key (`text_hash` of a document): "valid" for a share `holdout` of all keys, "dev" for `dev`."""
    return split_of_digest(hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest(), holdout, dev)


def split_of_digest(digest: bytes, holdout: float, dev: float = 0.0) -> str:
    """The split of a digest of 8 bytes: "valid" has the smallest of them, whatever "dev" takes beside it."""
    number = int.from_bytes(digest, "big")
    if number < holdout * 2**64:
        return "valid"
    return "dev" if number < (holdout + dev) * 2**64 else "train"


@dataclass(frozen=True)
class PartRecord:
    """What a finished part has made.

    Attributes:
        shards: split -> shards in order.
        sources: `source_record` of each source.
        text_bytes: split -> UTF-8 bytes of text behind the tokens.
        skipped: reason -> documents left out.
    """

    shards: dict[str, list[ShardRecord]]
    sources: list[dict[str, Any]]
    text_bytes: dict[str, int]
    skipped: dict[str, int]


@dataclass(frozen=True)
class Plan:
    """What a corpus will be made from.

    Attributes:
        tokenizer, fingerprint, vocab_size, settings: as in the manifest.
        parts: the sources of each part, in order, as JSON values.
    """

    tokenizer: str
    fingerprint: str
    vocab_size: int
    settings: dict[str, Any]
    parts: list[list[dict[str, Any]]]
    version: int = PLAN_VERSION

    def sources(self, part: int) -> list[Source]:
        """The sources of a part."""
        return [
            Source(**{**entry, "path": Path(entry["path"]) if entry["path"] else None}) for entry in self.parts[part]
        ]

    def with_sizes(self, sources: list[Source]) -> "Plan":
        """The same plan with the sizes of today: a source that was not read yet may have been repaired."""
        sizes = {source.name: source.num_bytes for source in sources}
        parts = [
            [{**entry, "num_bytes": sizes.get(entry["name"], entry["num_bytes"])} for entry in part]
            for part in self.parts
        ]
        return replace(self, parts=parts)

    def num_bytes(self, part: int) -> int:
        """Bytes of the sources of a part, 0 for those of unknown size."""
        return sum(entry["num_bytes"] or 0 for entry in self.parts[part])

    def missing_parts(self, folder: Path) -> list[int]:
        """Numbers of the parts that have no record yet."""
        return [number for number in range(len(self.parts)) if not part_path(folder, number).exists()]


def make_plan(dataset: DatasetConfig, tokenizer: Tokenizer) -> Plan:
    """Groups the sources into parts; a part of a Hugging Face dataset is a part of its own."""
    parts: list[list[dict[str, Any]]] = []
    total = PART_BYTES
    for source in corpus_sources(dataset):
        size = PART_BYTES if source.path is None or source.num_bytes is None else source.num_bytes
        if total >= PART_BYTES or source.path is None:
            parts.append([])
            total = 0
        parts[-1].append({**source._asdict(), "path": str(source.path) if source.path else None})
        total += size
    return Plan(tokenizer.source, tokenizer.fingerprint, tokenizer.vocab_size, plain_settings(dataset), parts)


def plain_settings(dataset: DatasetConfig) -> dict[str, Any]:
    """The settings as they come back from JSON."""
    return json.loads(json.dumps(dataset.settings()))


def read_plan(folder: Path) -> Plan | None:
    """The plan of an unfinished corpus, None if there is none.

    Raises:
        ValueError: the file is damaged or of another version.
    """
    path = folder / PLAN
    if not path.is_file():
        return None
    try:
        plan = Plan(**json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: not a plan ({error}): delete the folder and run `prepare` again") from None
    if plan.version != PLAN_VERSION:
        raise ValueError(
            f"{path}: version {plan.version}, expected {PLAN_VERSION}: delete the folder and run `prepare` again"
        )
    return plan


def write_plan(folder: Path, plan: Plan) -> None:
    """Starts a corpus: removes what an outdated one left, the manifest first, and writes the plan."""
    (folder / MANIFEST).unlink(missing_ok=True)
    remove_clusters(folder)
    (folder / PLAN).unlink(missing_ok=True)
    for pattern in ("part-[0-9]*", *(f"{split}-[0-9]*" for split in SPLITS)):
        for file in folder.glob(pattern):
            file.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    with full_disk_named(folder / PLAN):
        write_json(folder / PLAN, asdict(plan))


def part_path(folder: Path, number: int) -> Path:
    """The record of a part."""
    return folder / f"part-{number:05d}.json"


def read_part(folder: Path, number: int) -> PartRecord:
    """The record of a finished part.

    Raises:
        ValueError: the file is damaged.
    """
    path = part_path(folder, number)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return PartRecord(**{**content, "shards": read_shards(content["shards"])})
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path}: not the record of a part ({error}): delete it and run `prepare` again") from None


def write_part(folder: Path, number: int, record: PartRecord) -> None:
    """Marks a part as finished."""
    path = part_path(folder, number)
    with full_disk_named(path):
        write_json(path, asdict(record))


def remove_part(folder: Path, number: int) -> None:
    """Removes the files of a part that was not finished."""
    for pattern in (f"part-{number:05d}.json*", *(f"{split}-{number:05d}-*" for split in SPLITS)):
        for file in folder.glob(pattern):
            file.unlink()


def finish_corpus(folder: Path, plan: Plan) -> Manifest:
    """Joins the records of all parts into the manifest, which makes the corpus valid, and removes them.

    Raises:
        ValueError: a record is damaged, or there is not one document in the corpus.
    """
    records = [read_part(folder, number) for number in range(len(plan.parts))]
    splits = splits_of(plan.settings)
    shards = {split: [shard for record in records for shard in record.shards[split]] for split in splits}
    text_bytes = {split: sum(record.text_bytes[split] for record in records) for split in splits}
    skipped: dict[str, int] = {}
    for record in records:
        for reason, count in record.skipped.items():
            skipped[reason] = skipped.get(reason, 0) + count
    sources = [source for record in records for source in record.sources]
    manifest = Manifest(
        plan.tokenizer, plan.fingerprint, plan.vocab_size, plan.settings, sources, shards, text_bytes, skipped
    )
    if not any(shards.values()):
        for file in (folder / PLAN, *folder.glob("part-[0-9]*")):  # with other text or settings it is another corpus
            file.unlink()
        raise ValueError(
            f"dataset {folder.name!r}: no documents in {plan.settings['source']} ({manifest.skipped_counts()}): "
            "correct `source` or the filters"
        )
    with full_disk_named(folder / MANIFEST):
        write_manifest(folder, manifest)
    remove_plan(folder)
    return manifest


def remove_plan(folder: Path) -> None:
    """Removes plan and part records of a corpus that has its manifest."""
    for file in (*folder.glob("part-[0-9]*"), folder / PLAN):
        file.unlink(missing_ok=True)


def changes(made: Manifest | Plan, folder: Path, dataset: DatasetConfig, tokenizer: Tokenizer) -> list[str]:
    """How the configuration and the sources of today differ from those of a finished or unfinished corpus.

    Raises:
        FileNotFoundError, ValueError: from `DatasetConfig.sources`, when an unfinished corpus needs them.
    """
    old = {"dev": 0.0, **made.settings, "tokenizer": made.fingerprint[:12]}
    new = {"dev": 0.0, **plain_settings(dataset), "tokenizer": tokenizer.fingerprint[:12]}
    found = [f"{key} was {old.get(key)!r}, now {new.get(key)!r}" for key in new if old.get(key) != new[key]]
    if old.get("format") != new["format"] or old.get("source") != new["source"]:
        return found  # of course the sources are others
    if dataset.format == "hub" and isinstance(made, Manifest):
        return found  # a finished corpus needs no network
    return found + source_changes(list(_known_sources(made, folder)), corpus_sources(dataset))


def _known_sources(made: Manifest | Plan, folder: Path) -> Iterator[dict[str, Any]]:
    """The sources: with their checksums (`source_record`) where they have been read."""
    if isinstance(made, Manifest):
        yield from made.sources
        return
    missing = set(made.missing_parts(folder))
    for number, entries in enumerate(made.parts):
        yield from entries if number in missing else read_part(folder, number).sources


@contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Holds a lock on a corpus: two processes that make the same parts would spoil each other's files.

    Raises:
        ValueError: another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "prepare.lock"
    with path.open("w") as file:
        # A holder that is done removes the file; whoever had it open then locks one that others do not see.
        if not (try_lock(file.fileno(), path) and os.fstat(file.fileno()).st_nlink > 0):
            raise ValueError(f"{path}: another `prepare` is making this corpus: wait for it or end it")
        try:
            yield
        finally:
            path.unlink(missing_ok=True)

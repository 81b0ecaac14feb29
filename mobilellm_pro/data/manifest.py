"""`manifest.json` of a prepared corpus: what it was made from, with what, and what must be on disk.

It is written last and by rename, so its presence says that the corpus is complete; the fingerprint and settings in it
say whether it is the corpus that a configuration means.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mobilellm_pro.atomic_file import write_atomically

FILE = "manifest.json"
VERSION = 2


@dataclass(frozen=True)
class ShardRecord:
    """One shard: file name without suffix, counts, largest id, and sha256 of both files."""

    name: str
    documents: int
    tokens: int
    max_id: int
    bin_sha256: str
    idx_sha256: str


@dataclass(frozen=True)
class Manifest:
    """Everything about one corpus.

    Attributes:
        tokenizer: source of the tokenizer (a path or "llama4").
        fingerprint: of the tokenizer.
        vocab_size: of the tokenizer.
        settings: the settings that decide about the content, to compare with a configuration.
        sources: name, path, num_bytes, mtime_ns and sha256 of each source that was read.
        shards: split -> shards in order.
        text_bytes: split -> UTF-8 bytes of text behind the tokens.
        skipped: reason ("empty", "short", ...) -> documents left out.
    """

    tokenizer: str
    fingerprint: str
    vocab_size: int
    settings: dict[str, Any]
    sources: list[dict[str, Any]]
    shards: dict[str, list[ShardRecord]]
    text_bytes: dict[str, int]
    skipped: dict[str, int] = field(default_factory=dict)
    version: int = field(default=VERSION)

    def documents(self, split: str) -> int:
        """Documents of a split."""
        return sum(record.documents for record in self.shards[split])

    def tokens(self, split: str) -> int:
        """Tokens of a split."""
        return sum(record.tokens for record in self.shards[split])

    def split_sizes(self) -> str:
        """Documents of each split, for messages."""
        return ", ".join(f"{split} {self.documents(split)} documents" for split in self.shards)

    def skipped_counts(self) -> str:
        """Documents left out by reason, for messages."""
        return describe_skipped(self.skipped)


def describe_skipped(skipped: dict[str, int]) -> str:
    """ "0 skipped", or "3 skipped (2 empty, 1 short)"."""
    reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(skipped.items()) if count)
    return f"{sum(skipped.values())} skipped" + (f" ({reasons})" if reasons else "")


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Writes the manifest of a finished corpus, by rename."""
    write_json(folder / FILE, asdict(manifest))


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes a JSON file by rename: it is there as a whole or not at all, also after a power cut."""
    write_atomically(path, json.dumps(content, indent=2) + "\n")


def read_manifest(folder: Path) -> Manifest:
    """Reads the manifest.

    Raises:
        FileNotFoundError: the folder holds no finished corpus.
        ValueError: the file is damaged or of another version.
    """
    path = folder / FILE
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: {folder} is not a finished corpus; run `prepare` (again)")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        version = content["version"]
        if version == VERSION:
            return Manifest(**{**content, "shards": read_shards(content["shards"])})
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path}: not a manifest ({error}): delete the folder and run `prepare` again") from None
    raise ValueError(
        f"{path}: version {version}, expected {VERSION}: delete the folder, or set overwrite, and run `prepare` again"
    )


def read_shards(content: dict[str, list[dict[str, Any]]]) -> dict[str, list[ShardRecord]]:
    """The shards of each split, from JSON."""
    return {split: [ShardRecord(**record) for record in records] for split, records in content.items()}


def file_sha256(path: Path) -> str:
    """sha256 of a file in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

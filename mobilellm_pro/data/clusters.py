"""To which cluster each document of a corpus belongs: what `prepare --cluster` leaves beside the manifest.

    clusters.json                 settings, sizes, top terms, beginnings of documents, and the checksums of
    clusters-<split>-<digest>.npy uint8 or uint16 [documents] of each split: the number of each document's cluster
    clusters.md                   the same for people

The record is written last: clusters are there as a whole or not at all. It names the documents that it was made for, so
that numbers are never taken for those of another corpus.
"""

import json
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from mobilellm_pro.atomic_file import replacement
from mobilellm_pro.data.manifest import file_sha256, write_json

FILE = "clusters.json"
REPORT = "clusters.md"
VERSION = 1
_AGAIN = "run `prepare --cluster --overwrite` with its datasets.toml"


@dataclass(frozen=True)
class Cluster:
    """One cluster of documents.

    Attributes:
        documents, tokens: split -> how many it has.
        terms: words that set it apart, the strongest first.
        examples: how some of its documents begin.
    """

    documents: dict[str, int]
    tokens: dict[str, int]
    terms: list[str]
    examples: list[str]


@dataclass(frozen=True)
class ClusterRecord:
    """Everything about the clusters of one corpus.

    Attributes:
        settings: that decide about the clusters, to compare with a configuration.
        corpus: split -> `Corpus.content` of the documents.
        files: split -> name, sha256 and number of entries of the array of numbers.
        clusters: the largest first; the position is the number.
    """

    settings: dict[str, Any]
    corpus: dict[str, str]
    files: dict[str, dict[str, Any]]
    clusters: list[Cluster]
    version: int = field(default=VERSION)

    def sizes(self) -> str:
        """Training documents of each cluster, for messages."""
        counts = ", ".join(str(cluster.documents.get("train", 0)) for cluster in self.clusters)
        return f"{len(self.clusters)} clusters of {counts} documents"


class DocumentClusters:
    """The numbers of one split.

    Attributes:
        folder: of the corpus.
        number: of clusters.
        labels: uint8 or uint16 [documents], mapped.
        content: eight hex digits that change with any of them.
    """

    def __init__(self, folder: Path, number: int, labels: np.ndarray, content: str) -> None:
        """Holds what `open_clusters` found."""
        self.folder, self.number, self.labels, self.content = folder, number, labels, content

    def members(self, documents: np.ndarray | slice, clusters: tuple[int, ...]) -> np.ndarray:
        """bool [documents]: which of them are in one of the clusters.

        Raises:
            ValueError: a number that no cluster has.
        """
        wrong = [cluster for cluster in clusters if not 0 <= cluster < self.number]
        if wrong:
            raise ValueError(
                f"{self.folder}: no cluster {', '.join(map(str, wrong))}; {REPORT} there describes the clusters 0 to "
                f"{self.number - 1}: correct `clusters` of this corpus"
            )
        chosen = np.zeros(self.number, dtype=bool)
        chosen[list(clusters)] = True
        return chosen[self.labels[documents]]


def open_clusters(
    folder: Path, split: str, content: str, num_documents: int, *, check: bool = True
) -> DocumentClusters:
    """Maps the numbers of a split.

    Args:
        folder: of the corpus.
        split: which part.
        content, num_documents: of the split (`Corpus`).
        check: compare the checksum too; without it only type and size.

    Raises:
        ValueError: the corpus has no clusters, they were made for other documents, or a file is damaged.
    """
    record = read_clusters(folder)
    if record is None:
        raise ValueError(
            f"{folder / FILE} does not exist, but `clusters` chooses documents of this corpus: set `clusters` of the "
            "dataset in its datasets.toml and run `prepare --cluster`, or leave the choice out"
        )
    if record.corpus.get(split) != content:
        raise ValueError(f"{folder / FILE}: made for other documents than the split {split!r} holds now: {_AGAIN}")
    entry = record.files[split]
    path, number = folder / entry["name"], len(record.clusters)
    try:
        labels = np.load(path, mmap_mode="r").view(np.ndarray)
        if labels.dtype != label_type(number) or labels.shape != (num_documents,):
            raise ValueError(f"{labels.dtype} {list(labels.shape)}, expected {label_type(number)} [{num_documents}]")
        if check and file_sha256(path) != entry["sha256"]:
            raise ValueError("its sha256 is not the recorded one")
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{path}: damaged ({error}): {_AGAIN}") from None
    return DocumentClusters(folder, number, labels, entry["sha256"][:8])


def label_type(number: int) -> np.dtype:
    """Of the numbers of so many clusters."""
    return np.dtype(np.uint8 if number <= 256 else np.uint16)


def read_clusters(folder: Path) -> ClusterRecord | None:
    """The record of a corpus, None where there is none.

    Raises:
        ValueError: the file is damaged or of another version.
    """
    path = folder / FILE
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        version = content["version"]
        if version == VERSION:
            return ClusterRecord(**{**content, "clusters": [Cluster(**item) for item in content["clusters"]]})
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path}: not a record of clusters ({error}): {_AGAIN}") from None
    raise ValueError(f"{path}: version {version}, expected {VERSION}: {_AGAIN}")


def write_labels(folder: Path, labels: dict[str, np.ndarray]) -> dict[str, dict[str, Any]]:
    """Writes the numbers of each split under names that no other content has; returns `ClusterRecord.files`."""
    files = {}
    for split, values in labels.items():
        digest = sha256(values.tobytes()).hexdigest()[:8]
        path = folder / f"clusters-{split}-{digest}.npy"
        with replacement(path) as temporary, temporary.open("wb") as file:
            np.save(file, values)
        files[split] = {"name": path.name, "sha256": file_sha256(path), "documents": len(values)}
    return files


def write_clusters(folder: Path, record: ClusterRecord) -> None:
    """Makes the record valid, by rename, and removes the numbers of an earlier one."""
    write_json(folder / FILE, asdict(record))
    names = {entry["name"] for entry in record.files.values()}
    for stale in folder.glob("clusters-*.npy*"):
        if stale.name not in names:
            stale.unlink()


def remove_clusters(folder: Path) -> None:
    """Removes the clusters of a corpus that is made afresh, the record first."""
    for file in (folder / FILE, *folder.glob("clusters-*.npy*"), folder / REPORT):
        file.unlink(missing_ok=True)

"""Corpora of given token ids, written without tokenizer and `prepare`, for tests of what reads shards."""

from pathlib import Path

import numpy as np

from mobilellm_pro.data.clusters import Cluster, ClusterRecord, label_type, write_clusters, write_labels
from mobilellm_pro.data.manifest import Manifest, ShardRecord, file_sha256, write_manifest
from mobilellm_pro.data.shard_index import write_index
from mobilellm_pro.data.shards import Corpus


def write_corpus(
    folder: Path, documents: list[list[int]], *, per_shard: int = 2, dtype: str = "int32", vocab_size: int = 10
) -> Path:
    """Writes the documents as the training split, `per_shard` to a shard, nothing held out."""
    folder.mkdir(parents=True, exist_ok=True)
    records = []
    for first in range(0, len(documents), per_shard):
        part, path = documents[first : first + per_shard], folder / f"train-{len(records):05d}.bin"
        ids = np.array(sum(part, []), dtype=dtype)
        path.write_bytes(ids.tobytes())
        write_index(path.with_suffix(".idx"), np.array([len(ids) for ids in part], dtype=np.int32), dtype=dtype)
        digests = [file_sha256(path.with_suffix(suffix)) for suffix in (".bin", ".idx")]
        records.append(ShardRecord(path.stem, len(part), len(ids), max(map(int, ids), default=-1), *digests))
    shards = {"train": records, "valid": []}
    write_manifest(folder, Manifest("t.model", "f" * 64, vocab_size, {}, [], shards, {"train": 40, "valid": 0}))
    return folder


def damage(path: Path, offset: int, content: bytes) -> None:
    """Overwrites bytes of a file."""
    raw = bytearray(path.read_bytes())
    raw[offset : offset + len(content)] = content
    path.write_bytes(raw)


def random_documents(count: int, longest: int, *, seed: int = 0, vocab_size: int = 1000) -> list[list[int]]:
    """Documents of 0 to `longest` tokens; ids are random, so that a misplaced token is seen."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, vocab_size, rng.integers(0, longest + 1)).tolist() for _ in range(count)]


def write_labels_of(folder: Path, labels: list[int], number: int, split: str = "train") -> None:
    """Gives the documents of a split clusters, as `prepare --cluster` would."""
    content = {split: Corpus.open(folder, split).content}
    files = write_labels(folder, {split: np.array(labels, dtype=label_type(number))})
    write_clusters(folder, ClusterRecord({}, content, files, [Cluster({}, {}, [], []) for _ in range(number)]))

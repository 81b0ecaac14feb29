"""Shards: the bytes of the format, what comes back, and every way in which a file can be wrong."""

import dataclasses
import json
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest

from mobilellm_pro.data.manifest import Manifest, read_manifest, write_manifest
from mobilellm_pro.data.shard_index import read_index
from mobilellm_pro.data.shard_writer import ShardWriter
from mobilellm_pro.data.shards import Corpus
from tests.data.synthetic import make_corpora

DOCUMENTS = [[7, 1, 2, 8], [7, 8], [7, 3, 3, 3, 3, 8], [7, 4, 8]]


def write_corpus(folder: Path, *, shard_tokens: int = 8, vocab_size: int = 10) -> Path:
    """DOCUMENTS as the training split, nothing held out."""
    with ShardWriter(folder, "train", shard_tokens=shard_tokens) as writer:
        for number, ids in enumerate(DOCUMENTS):
            writer.add(np.array(ids, dtype=np.int32), f"doc{number}")
    shards = {"train": writer.records, "valid": []}
    write_manifest(folder, Manifest("t.model", "f" * 64, vocab_size, {}, [], shards, {"train": 40, "valid": 0}))
    return folder


def test_bytes_of_the_index(tmp_path: Path):
    """Built by hand from the public description of the format."""
    with ShardWriter(tmp_path, "train", shard_tokens=100) as writer:
        for number, ids in enumerate(DOCUMENTS):
            writer.add(np.array(ids, dtype=np.int32), f"doc{number}")
    expected = b"MMIDIDX\x00\x00" + struct.pack("<Q", 1) + struct.pack("<B", 4)
    expected += struct.pack("<Q", 4) + struct.pack("<Q", 5)
    expected += struct.pack("<4i", 4, 2, 6, 3)
    expected += struct.pack("<4q", 0, 16, 24, 48)
    expected += struct.pack("<5q", 0, 1, 2, 3, 4)
    assert (tmp_path / "train-00000.idx").read_bytes() == expected
    assert (tmp_path / "train-00000.bin").read_bytes() == struct.pack("<15i", *sum(DOCUMENTS, []))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["train-00000.bin", "train-00000.idx"]


def test_reads_documents_of_several_sequences(tmp_path: Path):
    """Other writers put several sequences into one document."""
    index = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 4, 3, 3)
    index += struct.pack("<3i", 2, 1, 4) + struct.pack("<3q", 0, 8, 12) + struct.pack("<3q", 0, 2, 3)
    (tmp_path / "other.idx").write_bytes(index)
    (tmp_path / "other.bin").write_bytes(bytes(28))
    assert read_index(tmp_path / "other.idx").tolist() == [3, 4]


@pytest.mark.parametrize("shard_tokens", [6, 8, 100])
def test_round_trip(tmp_path: Path, shard_tokens: int):
    corpus = Corpus.open(write_corpus(tmp_path, shard_tokens=shard_tokens))
    assert (corpus.num_documents, corpus.num_tokens) == (4, 15)
    assert corpus.document_lengths.tolist() == [4, 2, 6, 3]
    for number, ids in enumerate(DOCUMENTS):
        assert corpus.tokens(number, 0, len(ids)).tolist() == ids
        assert corpus.tokens(number, 1, len(ids) - 1).tolist() == ids[1:-1]
    corpus.verify()
    copy = pickle.loads(pickle.dumps(corpus))
    assert copy.tokens(2, 0, 6).tolist() == DOCUMENTS[2]
    assert len(pickle.dumps(corpus)) < 3000, "a worker gets the folder, not the tokens"


def write_documents(folder: Path, lengths: list[int]) -> None:
    with ShardWriter(folder, "train", shard_tokens=8) as writer:
        for length in lengths:
            writer.add(np.arange(length, dtype=np.int32), f"of length {length}")


def test_document_longer_than_a_shard(tmp_path: Path):
    with pytest.raises(ValueError, match=r"'of length 9' has 9 tokens, more than shard_tokens = 8: raise shard_tokens"):
        write_documents(tmp_path, [2, 9])
    assert not list(tmp_path.iterdir()), "the unfinished shard is gone"


def test_missing_manifest(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"manifest\.json does not exist.*run `prepare`"):
        Corpus.open(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", '{"shards": {}}', '{"shards": 3}'])
def test_damaged_manifest(tmp_path: Path, content: str):
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(ValueError, match=r"manifest\.json: not a manifest"):
        Corpus.open(tmp_path)


def test_manifest_of_another_version(tmp_path: Path):
    write_corpus(tmp_path)
    write_manifest(tmp_path, dataclasses.replace(read_manifest(tmp_path), version=2))
    with pytest.raises(ValueError, match="version 2, expected 1"):
        Corpus.open(tmp_path)


def test_truncated_bin(tmp_path: Path):
    file = write_corpus(tmp_path) / "train-00000.bin"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(
        ValueError, match=r"train-00000\.bin: 20 bytes, but train-00000\.idx describes 24.*run `prepare`"
    ):
        Corpus.open(tmp_path)


def damage(path: Path, offset: int, content: bytes) -> None:
    raw = bytearray(path.read_bytes())
    raw[offset : offset + len(content)] = content
    path.write_bytes(raw)


@pytest.mark.parametrize(
    ("offset", "content", "message"),
    [
        (0, b"X", "not an index of version 1"),
        (9, struct.pack("<Q", 2), "not an index of version 1"),
        (17, b"\x08", r"type code 8, expected 4 \(int32\)"),
        (18, struct.pack("<Q", 10**6), "bytes, expected 12000"),
        (42, struct.pack("<q", 4000), "sequence 0 points to byte 4000, outside"),
        (50, struct.pack("<q", 4), "sequence 1 points to byte 4"),
        (34, struct.pack("<i", -4), "sequence 0 points to byte 0|sequence 1 points"),
        (58, struct.pack("<q", 1), "document borders do not run from 0 to 2"),
        (74, struct.pack("<q", 3), "document borders do not run from 0 to 2"),
    ],
)
def test_damaged_index(tmp_path: Path, offset: int, content: bytes, message: str):
    damage(write_corpus(tmp_path) / "train-00000.idx", offset, content)
    with pytest.raises(ValueError, match=message) as error:
        Corpus.open(tmp_path)
    assert "train-00000.idx" in str(error.value)


def test_truncated_index(tmp_path: Path):
    file = write_corpus(tmp_path) / "train-00000.idx"
    for size in (0, 20, 40):
        file.write_bytes(file.read_bytes()[:size])
        with pytest.raises(ValueError, match=r"train-00000\.idx"):
            Corpus.open(tmp_path)


def test_missing_shard(tmp_path: Path):
    (write_corpus(tmp_path) / "train-00001.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"train-00001\.bin is missing"):
        Corpus.open(tmp_path)


def test_shard_of_another_run(tmp_path: Path):
    write_corpus(tmp_path)
    for suffix in (".bin", ".idx"):
        (tmp_path / f"train-00000{suffix}").write_bytes((tmp_path / f"train-00001{suffix}").read_bytes())
    with pytest.raises(ValueError, match="the manifest says"):
        Corpus.open(tmp_path)


def test_empty_split(tmp_path: Path):
    with pytest.raises(ValueError, match=r"split 'valid' is empty \(splits: train 4 documents, valid 0 documents\)"):
        Corpus.open(write_corpus(tmp_path), "valid")


def test_another_tokenizer(tmp_path: Path):
    write_corpus(tmp_path)
    Corpus.open(tmp_path, fingerprint="f" * 64)
    with pytest.raises(ValueError, match=r"made with the tokenizer t\.model \(ffff"):
        Corpus.open(tmp_path, fingerprint="0" * 64)


def test_ids_outside_the_vocabulary(tmp_path: Path):
    write_corpus(tmp_path)
    Corpus.open(tmp_path, vocab_size=9)
    with pytest.raises(ValueError, match="holds id 8, but the vocabulary has 8 ids"):
        Corpus.open(tmp_path, vocab_size=8)


def test_verify_finds_changed_tokens(tmp_path: Path):
    write_corpus(tmp_path)
    damage(tmp_path / "train-00001.bin", 4, struct.pack("<i", 5))
    with pytest.raises(ValueError, match=r"train-00001\.bin: sha256 differs"):
        Corpus.open(tmp_path).verify()
    damage(tmp_path / "train-00001.bin", 4, struct.pack("<i", 12))
    with pytest.raises(ValueError, match="id 12 is outside the vocabulary of 10"):
        Corpus.open(tmp_path).verify()


def test_synthetic_corpora(tmp_path: Path):
    folders = make_corpora(tmp_path)
    assert set(folders) == {"a", "b"}
    for folder in folders.values():
        train, valid = Corpus.open(folder), Corpus.open(folder, "valid")
        assert train.num_documents + valid.num_documents == 150
        assert valid.num_documents > 3
        assert len(json.loads((folder / "manifest.json").read_text())["shards"]["train"]) > 1
        train.verify()

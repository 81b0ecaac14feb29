"""Shards: the bytes of the format, what comes back, and every way in which a file can be wrong."""

import dataclasses
import json
import pickle
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mobilellm_pro.data import manifest, shard_index
from mobilellm_pro.data.shard_index import ShardIndex, write_index
from mobilellm_pro.data.shards import Corpus
from tests.data import shard_files
from tests.data.shard_files import damage
from tests.data.synthetic import make_corpora

DOCUMENTS = [[7, 1, 2, 8], [7, 8], [7, 3, 3, 3, 3, 8], [7, 4, 8]]
LENGTHS = np.array([4, 2, 6, 3], dtype=np.int32)


def write_corpus(folder: Path, **options) -> Path:
    return shard_files.write_corpus(folder, DOCUMENTS, **options)


@pytest.mark.parametrize("chunk", [1, 3, 2**20])
def test_bytes_of_the_index(tmp_path: Path, chunk: int, monkeypatch: pytest.MonkeyPatch):
    """Built by hand from the public description of the format."""
    monkeypatch.setattr(shard_index, "_CHUNK_DOCUMENTS", chunk)
    write_index(tmp_path / "a.idx", LENGTHS)
    expected = b"MMIDIDX\x00\x00" + struct.pack("<Q", 1) + struct.pack("<B", 4)
    expected += struct.pack("<Q", 4) + struct.pack("<Q", 5)
    expected += struct.pack("<4i", 4, 2, 6, 3)
    expected += struct.pack("<4q", 0, 16, 24, 48)
    expected += struct.pack("<5q", 0, 1, 2, 3, 4)
    assert (tmp_path / "a.idx").read_bytes() == expected
    (tmp_path / "a.bin").write_bytes(bytes(60))
    assert ShardIndex.open(tmp_path / "a.idx").num_tokens == 15


def test_documents_may_lie_anywhere(tmp_path: Path):
    """An index may leave out documents of its .bin, and name them in any order."""
    ids = np.arange(20, dtype="<u2")
    (tmp_path / "a.bin").write_bytes(ids.tobytes())
    write_index(tmp_path / "a.idx", LENGTHS[:3], starts=np.array([14, 1, 5]), dtype=np.uint16)
    index = ShardIndex.open(tmp_path / "a.idx")
    assert (index.dtype, index.num_tokens) == (np.uint16, 12)
    assert (index.lengths.tolist(), index.pointers.tolist()) == ([4, 2, 6], [28, 2, 10])


def test_documents_of_several_sequences(tmp_path: Path):
    """Other writers put several sequences into one document; `prepare` imports them."""
    header = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 4, 3, 3)
    index = header + struct.pack("<3i", 2, 1, 4) + struct.pack("<3q", 0, 8, 12) + struct.pack("<3q", 0, 2, 3)
    (tmp_path / "other.idx").write_bytes(index)
    (tmp_path / "other.bin").write_bytes(bytes(28))
    with pytest.raises(ValueError, match=r"other\.idx: 3 sequences and 3 document borders.*import the corpus"):
        ShardIndex.open(tmp_path / "other.idx")


@pytest.mark.parametrize("dtype", ["int32", "uint16"])
@pytest.mark.parametrize("per_shard", [1, 3, 100])
def test_round_trip(tmp_path: Path, per_shard: int, dtype: str):
    corpus = Corpus.open(write_corpus(tmp_path, per_shard=per_shard, dtype=dtype))
    assert (corpus.num_documents, corpus.num_tokens) == (4, 15)
    for number, ids in enumerate(DOCUMENTS):
        assert corpus.tokens(number, 0, len(ids)).dtype == dtype
        assert corpus.tokens(number, 0, len(ids)).tolist() == ids
        assert corpus.tokens(number, 1, len(ids) - 1).tolist() == ids[1:-1]
    for first in range(5):
        for last in range(first, 5):
            assert corpus.lengths(first, last).tolist() == LENGTHS[first:last].tolist()
    shards, begins, lengths = corpus.locate(np.array([3, 0, 3, 2]))
    found = [corpus.shard_ids[s][b : b + n].tolist() for s, b, n in zip(shards, begins, lengths, strict=True)]
    assert found == [DOCUMENTS[3], DOCUMENTS[0], DOCUMENTS[3], DOCUMENTS[2]]
    corpus.verify()
    copy = pickle.loads(pickle.dumps(corpus))
    assert copy.tokens(2, 0, 6).tolist() == DOCUMENTS[2]
    assert len(pickle.dumps(corpus)) < 3000, "a worker gets the folder, not the tokens"


def test_verify_reports_bytes(tmp_path: Path):
    write_corpus(tmp_path)
    done: list[int] = []
    Corpus.open(tmp_path).verify(done.append)
    assert sum(done) == sum(path.stat().st_size for path in tmp_path.glob("train-*"))


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
    version = manifest.VERSION + 1
    manifest.write_manifest(tmp_path, dataclasses.replace(manifest.read_manifest(tmp_path), version=version))
    with pytest.raises(ValueError, match=f"version {version}, expected {manifest.VERSION}"):
        Corpus.open(tmp_path)


def test_truncated_bin(tmp_path: Path):
    file = write_corpus(tmp_path) / "train-00000.bin"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(
        ValueError,
        match=r"train-00000\.bin: 20 bytes, but train-00000\.idx puts document 1 at bytes 16 to 24.*`prepare`",
    ):
        Corpus.open(tmp_path)


@pytest.mark.parametrize(
    ("offset", "content", "message"),
    [
        (0, b"X", "not an index of version 1"),
        (9, struct.pack("<Q", 2), "not an index of version 1"),
        (17, b"\x05", r"type code 5, expected 4 \(int32\) or 8 \(uint16\)"),
        (18, struct.pack("<Q", 10**6), "bytes, expected 12000"),
        (42, struct.pack("<q", 4000), r"train-00000\.bin: 24 bytes, but .* document 0 at bytes 4000 to 4016"),
        (42, struct.pack("<q", 2**63 - 4), "document 0 at bytes 9223372036854775804 to"),
        (42, struct.pack("<q", -4), "document 0 begins at byte -4 of .*expected a multiple of 4"),
        (50, struct.pack("<q", 5), "document 1 begins at byte 5 of .*expected a multiple of 4"),
        (38, struct.pack("<i", 3), r"document 1 at bytes 16 to 28; truncated"),
        (34, struct.pack("<i", -4), "document 0 has -4 tokens"),
        (38, struct.pack("<i", 1), "2 documents and 5 tokens, the manifest says 2 and 6"),
        (66, struct.pack("<q", 0), "document 1 begins with sequence 0, expected one sequence a document"),
        (74, struct.pack("<q", 3), "document 2 begins with sequence 3"),
    ],
)
def test_damaged_index(tmp_path: Path, offset: int, content: bytes, message: str):
    damage(write_corpus(tmp_path) / "train-00000.idx", offset, content)
    with pytest.raises(ValueError, match=message) as error:
        Corpus.open(tmp_path)
    assert "train-00000.idx" in str(error.value)


def test_open_without_a_check(tmp_path: Path):
    """What costs time for a large corpus is left out; headers and sizes are not."""
    damage(write_corpus(tmp_path) / "train-00000.idx", 42, struct.pack("<q", 4000))
    assert Corpus.open(tmp_path, check_index=False).tokens(1, 0, 2).tolist() == DOCUMENTS[1]
    damage(tmp_path / "train-00000.idx", 9, struct.pack("<Q", 2))
    with pytest.raises(ValueError, match="not an index of version 1"):
        Corpus.open(tmp_path, check_index=False)


def test_truncated_index(tmp_path: Path):
    file = write_corpus(tmp_path) / "train-00000.idx"
    for size in (0, 20, 40):
        file.write_bytes(file.read_bytes()[:size])
        with pytest.raises(ValueError, match=r"train-00000\.idx"):
            Corpus.open(tmp_path)


@pytest.mark.parametrize("more", [0, 100])
def test_more_shards_than_open_files(tmp_path: Path, more: int):
    """The soft limit of the process is raised as far as it may be; then the error says what to do."""
    shard_files.write_corpus(tmp_path, [[1]] * 60, per_shard=1)
    script = (
        "import os, resource, sys\n"
        "from mobilellm_pro.data.shards import Corpus\n"
        "held = len(os.listdir('/proc/self/fd')) + 40\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (held, held + int(sys.argv[2])))\n"
        "print(Corpus.open(sys.argv[1]).num_tokens)"
    )
    run = subprocess.run([sys.executable, "-c", script, str(tmp_path), str(more)], capture_output=True, text=True)
    if more:
        assert run.stdout == "60\n", run.stderr
    else:
        assert f"ValueError: {tmp_path}: its 60 shards need two open files each" in run.stderr


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
    with pytest.raises(ValueError, match=r"train-00001\.bin: id 12 at token 1 is outside the vocabulary of 10"):
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

"""Corpora of other programs: what arrives, what is written beside it, and every way in which an index can be wrong."""

import json
import struct
from pathlib import Path

import numpy as np
import pytest

from mobilellm_pro.data import megatron
from mobilellm_pro.data.manifest import read_manifest
from mobilellm_pro.data.megatron import read_megatron_index
from mobilellm_pro.data.prepare import prepare
from mobilellm_pro.data.shards import Corpus
from mobilellm_pro.data.tokenizer import Tokenizer
from tests.data.shard_files import damage
from tests.data.synthetic import DEBUG_TOKENIZER, make_corpora

ASSETS = Path(__file__).parents[1] / "assets" / "megatron"
LENGTHS = [12, 1, 40, 7, 0, 33, 5, 5, 18, 64, 3]
DOCUMENTS = [[4000 if k == 0 else (37 * d + 11 * k * k) % 4000 for k in range(n)] for d, n in enumerate(LENGTHS)]
HOLDOUT = 0.3


def write_toml(folder: Path, source: str | Path, **settings: object) -> Path:
    table = {"name": "other", "format": "megatron", "source": str(source), "holdout": HOLDOUT, **settings}
    lines = [f"tokenizer = {json.dumps(str(DEBUG_TOKENIZER))}", f"output = {json.dumps(str(folder / 'tokens'))}"]
    lines += ["[[dataset]]", *(f"{key} = {json.dumps(value)}" for key, value in table.items())]
    (folder / "datasets.toml").write_text("\n".join(lines) + "\n")
    return folder / "datasets.toml"


def adopt(folder: Path, source: str | Path, **settings: object) -> Path:
    prepare(write_toml(folder, source, **settings), workers=0)
    return folder / "tokens" / "other"


def documents_of(folder: Path, split: str) -> list[list[int]]:
    corpus = Corpus.open(folder, split)
    lengths = corpus.lengths(0, corpus.num_documents).tolist()
    return [corpus.tokens(number, 0, length).tolist() for number, length in enumerate(lengths)]


def write_pair(stem: Path, documents: list[list[list[int]]], kind: str = "<i4", code: int = 4) -> Path:
    """Sequences of documents as bytes, from the public description of the format."""
    sequences = [np.array(ids, dtype=kind) for document in documents for ids in document]
    first = np.cumsum([0, *map(len, documents)])
    index = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, len(sequences), len(first))
    index += struct.pack(f"<{len(sequences)}i", *map(len, sequences))
    index += struct.pack(f"<{len(sequences)}q", *np.cumsum([0, *(ids.nbytes for ids in sequences)])[:-1])
    index += struct.pack(f"<{len(first)}q", *first)
    stem.with_suffix(".idx").write_bytes(index)
    stem.with_suffix(".bin").write_bytes(b"".join(ids.tobytes() for ids in sequences))
    return stem.with_suffix(".idx")


@pytest.mark.parametrize(("kind", "code"), [("<i4", 4), ("<u2", 8)])
def test_bytes_of_the_format(tmp_path: Path, kind: str, code: int):
    """Sequences of one document are joined, empty documents stay out, nothing is copied."""
    path = write_pair(tmp_path / "x", [[[1, 2], [3]], [], [[4, 5, 6]], [[]], [[7], [], [8, 9]]], kind, code)
    index = read_megatron_index(path)
    assert (index.starts.tolist()[::2], index.lengths.tolist()) == ([0, 3, 6], [3, 0, 3, 0, 3])
    folder = adopt(tmp_path, path, holdout=0.0)
    assert documents_of(folder, "train") == [[1, 2, 3], [4, 5, 6], [7, 8, 9]]
    assert read_manifest(folder).skipped == {"empty": 2}
    assert (folder / "train-00000-000.bin").readlink() == tmp_path / "x.bin"
    assert sorted(path.name for path in folder.iterdir()) == [
        "manifest.json", "train-00000-000.bin", "train-00000-000.idx"
    ]  # fmt: skip
    assert Corpus.open(folder).shard_ids[0].dtype == np.dtype(kind)


@pytest.mark.parametrize("name", ["core_int32", "core_uint16", "core_modes", "datatrove_int32", "datatrove_uint16"])
def test_files_of_other_programs(tmp_path: Path, name: str):
    folder = adopt(tmp_path, ASSETS / f"{name}.idx")
    train, valid = documents_of(folder, "train"), documents_of(folder, "valid")
    assert valid and sorted(train + valid) == sorted(ids for ids in DOCUMENTS if ids)
    for split, found in (("train", train), ("valid", valid)):
        assert found == [ids for ids in DOCUMENTS if ids in found], "in the order of the file"
        Corpus.open(folder, split).verify()
    manifest, tokenizer = read_manifest(folder), Tokenizer.load(str(DEBUG_TOKENIZER))
    assert manifest.skipped == ({"empty": 1} if name.startswith("core") else {})
    assert manifest.text_bytes["train"] == sum(int(tokenizer.token_bytes[ids].sum()) for ids in train)
    assert manifest.shards["train"][0].max_id == 4000
    assert len(manifest.sources) == 1 and manifest.sources[0]["num_bytes"] > 600


def test_the_split_depends_on_the_ids_alone(tmp_path: Path):
    """Not on their type, the program, the order or the blocks in which they are read."""
    found = []
    for name in ("core_int32", "datatrove_uint16"):
        (tmp_path / name).mkdir()
        found.append(documents_of(adopt(tmp_path / name, ASSETS / f"{name}.idx"), "valid"))
    turned = write_pair(tmp_path / "turned", [[ids] for ids in reversed(DOCUMENTS)])
    found.append(documents_of(adopt(tmp_path, turned), "valid")[::-1])
    assert found[0] == found[1] == found[2]


def test_a_third_split_takes_nothing_from_the_second(tmp_path: Path):
    """By the rule that text follows, with the ids in its place."""
    (tmp_path / "without").mkdir()
    without = adopt(tmp_path / "without", ASSETS / "core_int32.idx")
    folder = adopt(tmp_path, ASSETS / "core_int32.idx", dev=0.3)
    assert documents_of(folder, "valid") == documents_of(without, "valid")
    train, dev = documents_of(folder, "train"), documents_of(folder, "dev")
    assert dev and train and sorted(train + dev) == sorted(documents_of(without, "train"))
    Corpus.open(folder, "dev").verify()


def test_small_blocks_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "small").mkdir()
    whole = adopt(tmp_path, ASSETS / "core_int32.idx")
    monkeypatch.setattr(megatron, "_BLOCK_TOKENS", 13)
    small = adopt(tmp_path / "small", ASSETS / "core_int32.idx")
    assert read_manifest(small) == read_manifest(whole)


def test_several_files_and_a_second_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = adopt(tmp_path, ASSETS / "datatrove_*.idx", holdout=0.0)
    assert documents_of(folder, "train") == 2 * [ids for ids in DOCUMENTS if ids]
    assert [record.name for record in read_manifest(folder).shards["train"]] == ["train-00000-000", "train-00000-001"]
    prepare(tmp_path / "datasets.toml")
    assert "already prepared" in capsys.readouterr().out


def test_source_changed_after_adoption(tmp_path: Path):
    path = write_pair(tmp_path / "x", [[[1, 2]], [[3]]])
    adopt(tmp_path, path, holdout=0.0)
    write_pair(tmp_path / "x", [[[1, 2]], [[4]]])
    with pytest.raises(ValueError, match=r"source files changed: .*x\.idx has another content"):
        adopt(tmp_path, path, holdout=0.0)


@pytest.mark.parametrize(
    ("offset", "content", "message"),
    [
        (0, b"X", "not an index of version 1"),
        (9, struct.pack("<Q", 2), "not an index of version 1"),
        (17, b"\x05", r"ids are int64 \(code 5\), expected int32 or uint16"),
        (17, b"\x63", r"ids are an unknown type \(code 99\)"),
        (18, struct.pack("<Q", 9), "122 bytes, expected 182 for 9 sequences"),
        (34, struct.pack("<i", -1), "document 0, sequence 0 lies at bytes 0 to -4"),
        (50, struct.pack("<q", 2), "document 0, sequence 0 lies at bytes 2 to 6"),
        (58, struct.pack("<q", 8), "document 0, sequence 1 begins at byte 8, not where the one before it ends"),
        (74, struct.pack("<q", 400), r"document 1, sequence 3 lies at bytes 400 to 404, outside x\.bin"),
        (74, struct.pack("<q", 2**63 - 4), r"document 1, sequence 3 lies at bytes .* outside x\.bin"),
        (82, struct.pack("<q", 1), "document borders do not run from 0 to 4"),
        (114, struct.pack("<q", 5), "document borders do not run from 0 to 4"),
    ],
)
def test_damaged_index(tmp_path: Path, offset: int, content: bytes, message: str):
    path = write_pair(tmp_path / "x", [[[1], [2]], [[3], [5]], [], []])
    damage(path, offset, content)
    with pytest.raises(ValueError, match=message) as error:
        adopt(tmp_path, path)
    assert str(path) in str(error.value)


def test_missing_and_truncated_files(tmp_path: Path):
    path = write_pair(tmp_path / "x", [[[1, 2, 3]]])
    path.with_suffix(".bin").write_bytes(bytes(8))
    with pytest.raises(ValueError, match=r"document 0, sequence 0 lies at bytes 0 to 12, outside x\.bin \(8 bytes\)"):
        adopt(tmp_path, path)
    path.with_suffix(".bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"x\.bin does not exist"):
        prepare(write_toml(tmp_path, path), overwrite=True, workers=0)
    (tmp_path / "y.idx").write_bytes(b"MMID")
    (tmp_path / "y.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"y\.idx: not an index"):
        read_megatron_index(tmp_path / "y.idx")


def test_ids_outside_the_vocabulary(tmp_path: Path):
    path = write_pair(tmp_path / "x", [[[1, 2]], [[3], [4, 60000]]])
    with pytest.raises(ValueError, match=r"x\.bin: document 1 holds id 60000 at its token 2, but .* has \d+ ids: set"):
        adopt(tmp_path, path)
    assert not (tmp_path / "tokens/other/manifest.json").exists()


def test_pictures_are_refused(tmp_path: Path):
    with pytest.raises(ValueError, match=r"core_pictures\.idx: document 5, sequence \d+ is of type 1, expected 0"):
        adopt(tmp_path, ASSETS / "core_pictures.idx")


def test_megatron_core_reads_ours(tmp_path: Path):
    """Runs where megatron-core can be imported, see tests/assets/megatron/README.md."""
    theirs = pytest.importorskip("megatron.core.datasets.indexed_dataset", reason="megatron-core is not installed")
    adopted = adopt(tmp_path, ASSETS / "core_uint16.idx")
    for folder in (make_corpora(tmp_path / "text", ("a",))["a"], adopted):
        for split in ("train", "valid"):
            found = []
            for record in read_manifest(folder).shards[split]:
                dataset = theirs.IndexedDataset(str(folder / record.name))
                assert len(dataset) == record.documents == len(dataset.document_indices) - 1
                found += [dataset[number].tolist() for number in range(len(dataset))]
            assert found == documents_of(folder, split)

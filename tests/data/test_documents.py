"""Readers: what comes out of each format, and errors that name file and record."""

import gzip
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mobilellm_pro.data.dataset_config import DatasetConfig
from mobilellm_pro.data.documents import read_documents, text_hash
from mobilellm_pro.data.source import Document, Source

pyarrow = pytest.importorskip("pyarrow", reason="reads parquet and Zstandard")
ROWS = [{"name": 1, "body": "one", "lang": "en"}, {"name": 2, "body": "zwei ü\u2028", "lang": None}]
COLUMNS = {"text_column": "body", "id_column": "name", "language_column": "lang"}
EXPECTED = [("1", "one", "en"), ("2", "zwei ü\u2028", "")]


def read(path: Path, **settings: Any) -> list[Document]:
    dataset = DatasetConfig("a", (str(path),), **{"id_column": "", **settings})
    return [document for source in dataset.sources() for document in read_documents(dataset, source)]


def lines(rows: list[dict[str, Any]]) -> bytes:
    return "\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode() + b"\n\n"


def zstandard(content: bytes) -> bytes:
    return pyarrow.Codec("zstd").compress(content, asbytes=True)


def write_parquet(path: Path, columns: dict[str, Any], **options: Any) -> Path:
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table(columns), path, **options)
    return path


def contents(documents: list[Document]) -> list[tuple[str, str, str]]:
    return [document[:3] for document in documents]


def test_jsonl_plain_gzip_and_zstandard(tmp_path: Path):
    packed = {"a.jsonl": lines(ROWS), "a.jsonl.gz": gzip.compress(lines(ROWS)), "a.jsonl.zst": zstandard(lines(ROWS))}
    for name, content in packed.items():
        (tmp_path / name).write_bytes(content)
        documents = read(tmp_path / name, **COLUMNS)
        assert contents(documents) == EXPECTED
        assert 0 < documents[-1].position <= len(content)
        assert len(content) - documents[-1].position <= 1, "all but the empty line at the end"


def test_zstandard_of_several_frames(tmp_path: Path):
    (tmp_path / "a.jsonl.zst").write_bytes(b"".join(zstandard(lines(ROWS)) for _ in range(3)))
    assert contents(read(tmp_path / "a.jsonl.zst", **COLUMNS)) == EXPECTED * 3


def test_without_ids_the_text_names_the_document(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n{"text": "y"}\n')
    assert [document.id for document in read(tmp_path / "a.jsonl")] == [text_hash("x"), text_hash("y")]


def test_folder(tmp_path: Path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/b.py").write_text("bb")
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / ".hidden").write_bytes(b"\xff")
    assert read(tmp_path, format="folder") == [Document("a.txt", "a", "", 1), Document("sub/b.py", "bb", "", 3)]


def test_parquet(tmp_path: Path):
    columns = {key: [row[key] for row in ROWS] * 100 for key in ("name", "body", "lang")} | {"unused": [0.5] * 200}
    path = write_parquet(tmp_path / "a.parquet", columns, row_group_size=70)
    documents = read(path, format="parquet", **COLUMNS)
    assert contents(documents) == EXPECTED * 100
    assert documents[99].position == path.stat().st_size // 2
    assert documents[-1].position == path.stat().st_size


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"id": ["x"], "body": ["x"]}, r"a\.parquet: no column 'text'; it has body, id: set text_column"),
        ({"id": ["x"], "text": [1]}, r"a\.parquet: column 'text' holds int64, expected a string: set text_column"),
        ({"id": [1, 2], "text": ["x", None]}, r"a\.parquet, row 2: column 'text' holds NoneType"),
        ({"id": [1, None], "text": ["x", "y"]}, r"a\.parquet, row 2: column 'id' holds NoneType"),
    ],
)
def test_bad_columns_of_parquet(tmp_path: Path, columns: dict[str, Any], message: str):
    path = write_parquet(tmp_path / "a.parquet", columns)
    with pytest.raises(ValueError, match=message):
        read(path, format="parquet", id_column="id")


def test_damaged_parquet(tmp_path: Path):
    path = write_parquet(
        tmp_path / "a.parquet", {"text": ["some words"] * 500}, compression="none", use_dictionary=False
    )
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"PAR1" + b"\0" * 3000 + whole[3004:]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"a\.parquet"):
            read(path, format="parquet")
    array = pyarrow.StringArray.from_buffers(
        2, pyarrow.array([b"fine", b"\xff"]).buffers()[1], pyarrow.py_buffer(b"fine\xff")
    )
    with pytest.raises(ValueError, match=r"a\.parquet, row 2: invalid UTF-8 at byte 0 \(0xff\)"):
        read(write_parquet(path, {"text": array}), format="parquet")


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (b'{"body": "x"}', "record 2: no column 'text'; it has body: set text_column"),
        (b'{"text": "x"}', "record 2: no column 'id'; it has text: set id_column"),
        (b'{"id": null, "text": "x"}', "record 2: column 'id' holds NoneType, expected a string or an integer"),
        (b'{"id": 1, "text": "a\xff"}', r"record 2: invalid UTF-8 at byte 20 \(0xff\)"),
        (b'{"id": 1, "text": ', "record 2: not a JSON object"),
        (b"[1, 2]", "record 2: expected a JSON object, found list"),
        (b'{"id": 1, "text": null}', "record 2: column 'text' holds NoneType, expected a string"),
    ],
)
def test_bad_records(tmp_path: Path, second: bytes, message: str):
    file = tmp_path / "bad.jsonl"
    file.write_bytes(b'{"id": 0, "text": "fine"}\n' + second + b"\n")
    with pytest.raises(ValueError, match=message) as error:
        read(file, id_column="id")
    assert "bad.jsonl" in str(error.value)


def test_bad_language(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text('{"text": "x", "lang": 3}\n')
    with pytest.raises(ValueError, match="record 1: column 'lang' holds int, expected a string: set language_column"):
        read(tmp_path / "a.jsonl", language_column="lang")


@pytest.mark.parametrize(("suffix", "pack"), [("gz", gzip.compress), ("zst", zstandard)])
def test_damaged_archives(tmp_path: Path, suffix: str, pack: Any):
    whole = pack(b'{"text": "x"}\n' * 1000)
    for content in (whole[: len(whole) // 2], b"plain"):
        (tmp_path / f"cut.jsonl.{suffix}").write_bytes(content)
        with pytest.raises(ValueError, match=rf"cut\.jsonl\.{suffix}: damaged or truncated"):
            read(tmp_path / f"cut.jsonl.{suffix}")


def test_bad_files(tmp_path: Path):
    dataset = DatasetConfig("a", ("absent.jsonl",))
    with pytest.raises(FileNotFoundError, match="absent"):
        next(read_documents(dataset, Source("absent.jsonl", tmp_path / "absent.jsonl", 0)))
    with pytest.raises(ValueError, match='is a folder, expected a file: set format = "folder"'):
        read(tmp_path)
    (tmp_path / "x.txt").write_bytes(b"\xe9")
    with pytest.raises(ValueError, match=r"x\.txt, record 1: invalid UTF-8"):
        read(tmp_path, format="folder")
    with pytest.raises(ValueError, match="is a file, expected a folder"):
        read(tmp_path / "x.txt", format="folder")
    with pytest.raises(ValueError, match=r'x\.parquet: not a jsonl file by its suffix: set format = "parquet"'):
        read(write_parquet(tmp_path / "x.parquet", {"text": ["x"]}))
    with pytest.raises(AssertionError, match="token shards"):
        next(read_documents(DatasetConfig("a", ("x",), format="megatron"), Source("x", tmp_path, 0)))


def test_hub_reads_a_local_folder_shard_by_shard(tmp_path: Path):
    pytest.importorskip("datasets", reason="streams Hugging Face datasets")
    for part in range(2):
        rows = {"id": [f"{part}a", f"{part}b"], "text": [f"text {part}"] * 2}
        write_parquet(tmp_path / f"train-{part}.parquet", rows)
    dataset = DatasetConfig("a", (str(tmp_path),), format="hub")
    sources = dataset.sources()
    assert [source.name for source in sources] == [f"{tmp_path}/train, shard {i} of 2" for i in range(2)]
    assert [source[1:3] for source in sources] == [(None, None)] * 2
    documents = [list(read_documents(dataset, source)) for source in sources]
    assert documents == [[Document(f"{part}{row}", f"text {part}") for row in "ab"] for part in range(2)]
    with pytest.raises(ValueError, match="published anew"):
        next(read_documents(dataset, sources[0]._replace(num_shards=3)))
    with pytest.raises(ValueError, match="shard 0 of 2, record 1: no column 'body'; it has id, text: set text_column"):
        next(read_documents(DatasetConfig("a", (str(tmp_path),), format="hub", text_column="body"), sources[0]))


def test_hub_files_of_a_local_folder(tmp_path: Path):
    (tmp_path / "part").mkdir()
    (tmp_path / "part/a.jsonl.zst").write_bytes(zstandard(lines(ROWS)))
    write_parquet(tmp_path / "b.parquet", {key: [row[key] for row in ROWS] for key in ROWS[0]})
    files = ("part/*.zst", "*.parquet")
    assert contents(read(tmp_path, format="hub", hub_files=files, **COLUMNS)) == EXPECTED * 2
    with pytest.raises(ValueError, match="no file matches"):
        read(tmp_path, format="hub", hub_files=("*.csv",))


@pytest.mark.parametrize("settings", [{}, {"subset": "absent"}, {"hub_files": ("*.parquet",)}])
def test_unknown_hub_dataset_names_the_cure(tmp_path: Path, settings: dict[str, Any]):
    program = f"""
from mobilellm_pro.data.dataset_config import DatasetConfig
try:
    DatasetConfig("a", ("nobody/absent",), format="hub", **{settings!r}).sources()
except ValueError as error:
    print(error)
"""
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PATH": ""}
    result = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    assert "hub dataset 'nobody/absent': cannot be read" in result.stdout
    assert "`hf auth login`" in result.stdout


def test_no_large_package_before_it_is_needed():
    program = (
        "import sys, mobilellm_pro.data.documents, mobilellm_pro.data.tokenizer\n"
        "print([m for m in ('torch', 'torchtitan', 'pyarrow', 'datasets', 'huggingface_hub') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"

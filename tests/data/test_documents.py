"""Readers: what comes out, and errors that name file and record."""

import gzip
import json
from pathlib import Path

import pytest

from mobilellm_pro.data.documents import Document, read_documents, text_hash


def read(path: Path, **columns: str) -> list[Document]:
    return list(read_documents("jsonl", [path], **columns))


def test_jsonl_plain_and_gzip(tmp_path: Path):
    rows = [{"name": 1, "body": "one"}, {"name": 2, "body": "zwei ü\u2028"}]
    content = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode() + b"\n\n"
    (tmp_path / "a.jsonl").write_bytes(content)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(content))
    expected = [Document("1", "one"), Document("2", "zwei ü\u2028")]
    for name in ("a.jsonl", "a.jsonl.gz"):
        assert read(tmp_path / name, text_column="body", id_column="name") == expected


def test_without_ids_the_text_names_the_document(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n{"text": "y"}\n')
    assert [document.id for document in read(tmp_path / "a.jsonl")] == [text_hash("x"), text_hash("y")]


def test_folder(tmp_path: Path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/b.py").write_text("b")
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / ".hidden").write_bytes(b"\xff")
    assert list(read_documents("folder", [tmp_path])) == [Document("a.txt", "a"), Document("sub/b.py", "b")]


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (b'{"body": "x"}', "record 2: no column 'text'; it has body: set text_column"),
        (b'{"text": "x"}', "record 2: no column 'id'; it has text: set id_column"),
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


def test_bad_files(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="absent"):
        read(tmp_path / "absent.jsonl")
    whole = gzip.compress(b'{"text": "x"}\n' * 1000)
    for content in (whole[: len(whole) // 2], b"plain"):
        (tmp_path / "cut.jsonl.gz").write_bytes(content)
        with pytest.raises(ValueError, match=r"cut\.jsonl\.gz: damaged or truncated"):
            read(tmp_path / "cut.jsonl.gz")
    (tmp_path / "x.txt").write_bytes(b"\xe9")
    with pytest.raises(ValueError, match=r"x\.txt, record 1: invalid UTF-8"):
        list(read_documents("folder", [tmp_path / "."], text_column=""))[0]
    with pytest.raises(ValueError, match="is a file, expected a folder"):
        list(read_documents("folder", [tmp_path / "x.txt"]))
    with pytest.raises(ValueError, match="format = 'csv': expected one of jsonl, folder"):
        list(read_documents("csv", [tmp_path]))

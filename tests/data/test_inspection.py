"""`inspect`: statistics, samples, checksums, and a corpus that is not finished."""

from pathlib import Path

import numpy as np
import pytest

from mobilellm_pro.data import inspection
from mobilellm_pro.data.inspection import inspect, length_quantiles
from mobilellm_pro.data.prepare import prepare
from mobilellm_pro.data.shards import Corpus
from tests.data.synthetic import make_corpora, write_text, write_toml


def test_statistics_samples_and_checksums(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = make_corpora(tmp_path)["b"]
    capsys.readouterr()
    inspect(tmp_path / "tokens", samples=2)
    output = capsys.readouterr().out
    assert output.count("checksums right") == 4
    assert output.count("document 0: '<|begin_of_text|>") == 4
    assert "bytes a token" in output and "0 skipped" in output
    file = next(folder.glob("valid*.bin"))
    raw = bytearray(file.read_bytes())
    raw[0] ^= 1
    file.write_bytes(raw)
    inspect(folder, verify=False)
    with pytest.raises(ValueError, match="sha256 differs"):
        inspect(folder)
    with pytest.raises(FileNotFoundError, match="run `prepare` first"):
        inspect(tmp_path / "text")


def test_skipped_documents_by_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    write_text(tmp_path, {"a": "long enough", "b": " ", "c": "no"})
    prepare(write_toml(tmp_path, ("a",), min_chars=3, holdout=0.0), workers=0)
    assert "2 skipped (2 short)" in capsys.readouterr().out
    inspect(tmp_path / "tokens")
    assert "2 skipped (2 short)" in capsys.readouterr().out


@pytest.mark.parametrize("chunk", [7, 10_000])
def test_quantiles_are_those_of_all_lengths(tmp_path: Path, chunk: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(inspection, "_CHUNK_DOCUMENTS", chunk)
    corpus = Corpus.open(make_corpora(tmp_path, ("a",))["a"])
    shares = (0.0, 0.1, 0.25, 0.5, 0.9, 1.0)
    expected = np.quantile(corpus.lengths(0, corpus.num_documents), shares, method="closest_observation")
    found = length_quantiles(corpus, shares)
    lengths = np.sort(corpus.lengths(0, corpus.num_documents))
    assert found[[0, -1]].tolist() == expected[[0, -1]].tolist()
    assert found.tolist() == [lengths[round(share * (len(lengths) - 1))] for share in shares]


def test_unfinished_corpus(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("mobilellm_pro.data.corpus_parts.PART_BYTES", 1)
    write_text(tmp_path, {"a": "first"}, "a0")
    write_text(tmp_path, {"b": "second"}, "a1")
    (tmp_path / "text/a1.jsonl").write_bytes(b'{"id": "b", "text": "\xff"}\n')
    toml = write_toml(tmp_path, ("a",), source=str(tmp_path / "text/a*.jsonl"), holdout=0.0)
    with pytest.raises(ValueError, match="invalid UTF-8"):
        prepare(toml, workers=0)
    capsys.readouterr()
    inspect(tmp_path / "tokens")
    assert "a: unfinished, 1 of 2 parts done (1 documents, 4 tokens)" in capsys.readouterr().out

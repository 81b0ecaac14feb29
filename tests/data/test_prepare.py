"""`prepare` and `inspect`: what is written, what is skipped, what is refused, and a kill in the middle."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mobilellm_pro.data.dataset_config import load_datasets_config
from mobilellm_pro.data.manifest import read_manifest
from mobilellm_pro.data.prepare import inspect, prepare, split_of
from mobilellm_pro.data.shards import Corpus
from mobilellm_pro.data.tokenizer import Tokenizer
from tests.data.synthetic import DEBUG_TOKENIZER, make_corpora, write_toml

ROOT = Path(__file__).parents[2]


def write_text(folder: Path, texts: dict[str, str], name: str = "a") -> None:
    (folder / "text").mkdir(exist_ok=True)
    lines = [json.dumps({"id": key, "text": text}) + "\n" for key, text in texts.items()]
    (folder / "text" / f"{name}.jsonl").write_text("".join(lines))


def all_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.suffix in (".bin", ".idx")}


def decoded(folder: Path, split: str) -> list[str]:
    corpus, tokenizer = Corpus.open(folder, split), Tokenizer.load(str(DEBUG_TOKENIZER))
    lengths = corpus.document_lengths
    return [tokenizer.decode(corpus.tokens(i, 0, int(lengths[i]))) for i in range(corpus.num_documents)]


def test_documents_arrive_whole_and_split_by_id(tmp_path: Path):
    texts = {f"id{i}": f"Text number {i}: ünï {'x' * (i % 7)}" for i in range(200)} | {"e": "", "s": " \n"}
    write_text(tmp_path, texts)
    toml = write_toml(tmp_path, ("a",), holdout=0.2, min_chars=3)
    prepare(toml, workers=0)
    folder = tmp_path / "tokens/a"
    for split in ("train", "valid"):
        ids = [key for key in texts if texts[key].strip() and split_of(key, 0.2) == split]
        assert decoded(folder, split) == [f"<|begin_of_text|>{texts[key]}<|end_of_text|>" for key in ids]
        assert read_manifest(folder).text_bytes[split] == sum(len(texts[key].encode()) for key in ids)
    assert 20 < read_manifest(folder).documents("valid") < 60
    assert read_manifest(folder).skipped == 2


def test_split_ignores_the_order_of_the_input(tmp_path: Path):
    texts = {f"id{i}": f"text {i}" for i in range(50)}
    found = []
    for order in (texts, dict(reversed(texts.items()))):
        write_text(tmp_path, order)
        prepare(write_toml(tmp_path, ("a",), holdout=0.3), overwrite=True, workers=0)
        found.append(sorted(decoded(tmp_path / "tokens/a", "valid")))
    assert found[0] == found[1]
    assert np.mean([split_of(str(i), 0.05) == "valid" for i in range(20_000)]) == pytest.approx(0.05, abs=0.006)


def test_workers_do_not_change_the_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("mobilellm_pro.data.prepare._BATCH_CHARS", 500)
    folder = make_corpora(tmp_path, ("a",))["a"]
    expected = all_bytes(folder)
    prepare(write_toml(tmp_path, ("a",), holdout=0.2, shard_tokens=5000), overwrite=True, workers=0)
    assert all_bytes(folder) != expected
    prepare(write_toml(tmp_path, ("a",), holdout=0.1, shard_tokens=5000), overwrite=True, workers=2)
    assert all_bytes(folder) == expected


def test_finished_corpora_are_skipped(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = make_corpora(tmp_path, ("a",))["a"]
    before = (folder / "manifest.json").stat().st_mtime_ns
    prepare(tmp_path / "datasets.toml", workers=0)
    assert "already prepared" in capsys.readouterr().out
    assert (folder / "manifest.json").stat().st_mtime_ns == before
    (tmp_path / "text/a.jsonl").unlink()
    prepare(tmp_path / "datasets.toml", workers=0)


def test_changes_are_refused_by_name(tmp_path: Path):
    make_corpora(tmp_path, ("a",))
    toml = write_toml(tmp_path, ("a",), holdout=0.2, shard_tokens=5000)
    with pytest.raises(ValueError, match=r"a was prepared differently: holdout was 0.1, now 0.2\. Delete the folder"):
        prepare(toml, workers=0)
    toml = write_toml(tmp_path, ("a",), holdout=0.1, shard_tokens=5000)
    other = tmp_path / "other.model"
    other.write_bytes(b"".join(DEBUG_TOKENIZER.read_bytes().splitlines(keepends=True)[:3000]))
    toml.write_text(toml.read_text().replace(str(DEBUG_TOKENIZER), str(other)))
    with pytest.raises(ValueError, match="prepared differently: tokenizer was"):
        prepare(toml, workers=0)
    toml = write_toml(tmp_path, ("a",), holdout=0.1, shard_tokens=5000)
    with (tmp_path / "text/a.jsonl").open("a") as file:
        file.write('{"id": "new", "text": "more"}\n')
    with pytest.raises(ValueError, match=r"source files changed: .*a\.jsonl"):
        prepare(toml, workers=0)
    prepare(toml, overwrite=True, workers=0)
    assert "more" in "".join(decoded(tmp_path / "tokens/a", "train") + decoded(tmp_path / "tokens/a", "valid"))


def test_killed_and_started_again(tmp_path: Path):
    """SIGKILL after 100 of 150 documents: the rest is made, and the result is that of an undisturbed run."""
    expected = all_bytes(make_corpora(tmp_path / "whole", ("a",))["a"])
    folder = make_corpora(tmp_path / "killed", ("a",))["a"]
    for file in folder.iterdir():
        file.unlink()
    program = f"""
import os, signal
from mobilellm_pro.data import prepare, shards
calls, add = [], shards.ShardWriter.add
def add_or_die(self, ids, name):
    calls.append(name)
    if len(calls) == 100:
        os.kill(os.getpid(), signal.SIGKILL)
    add(self, ids, name)
shards.ShardWriter.add = add_or_die
prepare.prepare({str(tmp_path / "killed/datasets.toml")!r}, workers=0)
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, check=False)
    assert result.returncode == -signal.SIGKILL
    assert list(folder.glob("*.tmp")), "it died in the middle of a shard"
    with pytest.raises(FileNotFoundError, match="not a finished corpus"):
        Corpus.open(folder)
    prepare(tmp_path / "killed/datasets.toml", workers=0)
    assert all_bytes(folder) == expected
    assert not list(folder.glob("*.tmp"))


def test_bad_text_leaves_no_corpus(tmp_path: Path):
    write_text(tmp_path, {"long": "word " * 500})
    with pytest.raises(ValueError, match=r"document 'long' has \d+ tokens, more than shard_tokens = 50"):
        prepare(write_toml(tmp_path, ("a",), shard_tokens=50), workers=0)
    with pytest.raises(ValueError, match=r"a\.jsonl, record 1: no column 'body'"):
        prepare(write_toml(tmp_path, ("a",), text_column="body"), workers=2)
    write_text(tmp_path, {"x": " "})
    with pytest.raises(ValueError, match=r"dataset 'a': no documents in .*\(1 too short\)"):
        prepare(write_toml(tmp_path, ("a",)), workers=0)
    (tmp_path / "text/a.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match=r"dataset 'a': no file matches"):
        prepare(write_toml(tmp_path, ("a",)), workers=0)
    assert not (tmp_path / "tokens/a/manifest.json").exists()


def test_all_problems_of_a_toml_at_once(tmp_path: Path):
    path = tmp_path / "datasets.toml"
    path.write_text(
        'tokeniser = "x"\noutput = 3\n[[dataset]]\nname = "a/b"\nsource = "x"\nholdout = 1.5\nformat = "csv"\n'
        '[[dataset]]\nname = "c"\nsource = []\ntext_colum = "y"\nbos = 1\n[[dataset]]\nname = "c"\n'
    )
    with pytest.raises(ValueError, match="did you mean") as error:
        load_datasets_config(path)
    lines = str(error.value).splitlines()
    assert all(line.startswith(f"{path}: ") for line in lines)
    for expected in (
        "tokeniser: unknown key; did you mean 'tokenizer'?",
        "tokenizer: expected a string, found None",
        "output: expected a string, found 3",
        "dataset[0].name: expected letters",
        "dataset[0].holdout: expected a share",
        "dataset[0].format: expected one of jsonl, folder, found 'csv'",
        "dataset[1].source: expected a path or a list of paths",
        "dataset[1].text_colum: unknown key; did you mean 'text_column'?",
        "dataset[1].bos: expected bool, found 1",
        "dataset[2].source: missing",
        "dataset: the name 'c' occurs twice",
    ):
        assert any(expected in line for line in lines), expected


@pytest.mark.parametrize(("content", "message"), [("x = [", "not valid TOML"), ("", "at least one")])
def test_bad_toml(tmp_path: Path, content: str, message: str):
    (tmp_path / "d.toml").write_text(content)
    with pytest.raises(ValueError, match=message):
        load_datasets_config(tmp_path / "d.toml")
    with pytest.raises(FileNotFoundError, match=r"absent\.toml"):
        load_datasets_config(tmp_path / "absent.toml")


def test_shipped_configurations_load():
    files = sorted((ROOT / "train_configs").glob("*/datasets.toml"))
    assert len(files) == 2
    for file in files:
        assert len(load_datasets_config(file).datasets) >= 5


def test_inspect(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = make_corpora(tmp_path)["b"]
    capsys.readouterr()
    inspect(tmp_path / "tokens", samples=2)
    output = capsys.readouterr().out
    assert output.count("checksums right") == 4
    assert output.count("document 0: '<|begin_of_text|>") == 4
    assert "bytes a token" in output
    file = next(folder.glob("valid*.bin"))
    raw = bytearray(file.read_bytes())
    raw[0] ^= 1
    file.write_bytes(raw)
    inspect(folder, verify=False)
    with pytest.raises(ValueError, match="sha256 differs"):
        inspect(folder)
    with pytest.raises(FileNotFoundError, match="run `prepare` first"):
        inspect(tmp_path / "text")

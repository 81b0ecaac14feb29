"""`prepare`: what is written, what is skipped, what is refused, and what a kill or a full disk leaves."""

import dataclasses
import errno
import io
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mobilellm_pro.data import part_workers, text_parts
from mobilellm_pro.data.corpus_parts import make_plan, only_one, split_of
from mobilellm_pro.data.dataset_config import DatasetConfig
from mobilellm_pro.data.documents import text_hash
from mobilellm_pro.data.manifest import read_manifest, write_manifest
from mobilellm_pro.data.prepare import prepare
from mobilellm_pro.data.shard_writer import ShardWriter
from mobilellm_pro.data.shards import Corpus
from mobilellm_pro.data.source import Source
from mobilellm_pro.data.tokenizer import Tokenizer
from tests.data.synthetic import DEBUG_TOKENIZER, make_corpora, write_text, write_toml

ROOT = Path(__file__).parents[2]


def all_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.suffix in (".bin", ".idx")}


def decoded(folder: Path, split: str) -> list[str]:
    corpus, tokenizer = Corpus.open(folder, split), Tokenizer.load(str(DEBUG_TOKENIZER))
    lengths = corpus.lengths(0, corpus.num_documents).tolist()
    return [tokenizer.decode(corpus.tokens(i, 0, length)) for i, length in enumerate(lengths)]


@pytest.fixture
def one_source_a_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mobilellm_pro.data.corpus_parts.PART_BYTES", 1)


def write_sources(folder: Path, count: int = 4, **settings: object) -> Path:
    """A datasets.toml of one corpus with `count` files of ten documents."""
    for number in range(count):
        write_text(folder, {f"{number}/{i}": f"text {i} of file {number}" for i in range(10)}, f"a{number}")
    return write_toml(folder, ("a",), source=str(folder / "text/a*.jsonl"), holdout=0.2, **settings)


def test_documents_arrive_whole_and_split_by_text(tmp_path: Path):
    texts = {f"id{i}": f"Text number {i}: ünï {'x' * (i % 7)}" for i in range(200)} | {"e": "", "s": " \n"}
    write_text(tmp_path, texts)
    toml = write_toml(tmp_path, ("a",), holdout=0.2, min_chars=3)
    prepare(toml, workers=0)
    folder = tmp_path / "tokens/a"
    for split in ("train", "valid"):
        ids = [key for key in texts if texts[key].strip() and split_of(text_hash(texts[key]), 0.2) == split]
        assert decoded(folder, split) == [f"<|begin_of_text|>{texts[key]}<|end_of_text|>" for key in ids]
        assert read_manifest(folder).text_bytes[split] == sum(len(texts[key].encode()) for key in ids)
    assert 20 < read_manifest(folder).documents("valid") < 60
    assert read_manifest(folder).skipped == {"short": 2}


def test_no_copy_of_a_held_out_text_is_trained_on(tmp_path: Path):
    write_text(tmp_path, {f"id{i}": f"text {i % 20}" for i in range(400)})
    prepare(write_toml(tmp_path, ("a",), holdout=0.3), workers=0)
    train, valid = (set(decoded(tmp_path / "tokens/a", split)) for split in ("train", "valid"))
    assert train and valid and not train & valid and len(train | valid) == 20


def test_a_third_split_takes_nothing_from_the_second(tmp_path: Path):
    """With dev, "valid" is the same to the byte; "dev" is what "train" loses; without it nothing is new."""
    texts = {f"id{i}": f"text {i % 200}" for i in range(300)}
    for name, dev in (("without", 0.0), ("with", 0.2)):
        write_text(tmp_path / name, texts)
        prepare(write_toml(tmp_path / name, ("a",), holdout=0.2, **({"dev": dev} if dev else {})), workers=0)
    without, folder = (tmp_path / name / "tokens/a" for name in ("without", "with"))
    before, after = all_bytes(without), all_bytes(folder)
    assert {name for name in after if name not in before} == {"dev-00000-000.bin", "dev-00000-000.idx"}
    assert all(before[name] == after[name] for name in before if name.startswith("valid"))
    train, valid, dev = (decoded(folder, split) for split in ("train", "valid", "dev"))
    assert (
        sorted(train + dev) == sorted(decoded(without, "train"))
        and not set(train) & set(dev)
        and not set(valid) & set(dev)
    )
    assert 20 < len(dev) < 100 and read_manifest(folder).text_bytes["dev"] == sum(len(text) - 32 for text in dev)
    assert "dev" not in (without / "manifest.json").read_text()
    with pytest.raises(ValueError, match=r"the split 'dev' does not exist \(.*\): raise `dev` of this dataset"):
        Corpus.open(without, "dev")
    write_toml(tmp_path / "without", ("a",), holdout=0.2, dev=0.1)
    with pytest.raises(ValueError, match=r"a was prepared differently: dev was 0\.0, now 0\.1\. Delete the folder"):
        prepare(tmp_path / "without/datasets.toml", workers=0)
    write_toml(tmp_path / "with", ("a",), holdout=0.2)
    with pytest.raises(ValueError, match=r"a was prepared differently: dev was 0\.2, now 0\.0\. Delete the folder"):
        prepare(tmp_path / "with/datasets.toml", workers=0)


def test_another_run_is_noticed_before_looking_at_what_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Else a run that looked before the other finished would make its parts, and remove its shards, once more."""
    toml = write_sources(tmp_path)
    monkeypatch.setattr("mobilellm_pro.data.prepare.read_plan", lambda folder: pytest.fail("looked without the lock"))
    with only_one(tmp_path / "tokens/a"), pytest.raises(ValueError, match=r"prepare\.lock: another `prepare`"):
        prepare(toml, workers=0)
    assert not (tmp_path / "tokens/a/prepare.lock").exists()


def test_split_ignores_the_order_of_the_input(tmp_path: Path):
    texts = {f"id{i}": f"text {i}" for i in range(50)}
    found = []
    for order in (texts, dict(reversed(texts.items()))):
        write_text(tmp_path, order)
        prepare(write_toml(tmp_path, ("a",), holdout=0.3), overwrite=True, workers=0)
        found.append(sorted(decoded(tmp_path / "tokens/a", "valid")))
    assert found[0] == found[1]
    assert np.mean([split_of(str(i), 0.05) == "valid" for i in range(20_000)]) == pytest.approx(0.05, abs=0.006)
    assert [split_of(key, 0.5) for key in ("a", "b", "c/1", "ünï", "\ud800")] == [
        "valid", "train", "train", "valid", "valid"
    ]  # fmt: skip


def test_parts_are_groups_of_consecutive_sources():
    class Sized(DatasetConfig):
        def sources(self) -> list[Source]:
            sizes = [100, 200, 50, 300, 10, 10]
            return [Source(f"f{i}", Path(f"f{i}"), size * 2**20) for i, size in enumerate(sizes)] + [
                Source("hub/0", None, None, 0, 2), Source("hub/1", None, None, 1, 2)
            ]  # fmt: skip

    plan = make_plan(Sized("a", ("x",)), Tokenizer.load(str(DEBUG_TOKENIZER)))
    names = [[source.name for source in plan.sources(part)] for part in range(len(plan.parts))]
    assert names == [["f0", "f1"], ["f2", "f3"], ["f4", "f5"], ["hub/0"], ["hub/1"]]


def test_neither_processes_nor_threads_nor_pieces_change_the_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = make_corpora(tmp_path, ("a",))["a"]
    toml, expected = tmp_path / "datasets.toml", all_bytes(folder)
    assert len(expected) > 4

    def again(**options: int) -> dict[str, bytes]:
        (folder / "manifest.json").unlink()
        prepare(toml, **options)
        return all_bytes(folder)

    assert again(workers=3) == expected, "one process, three threads"
    monkeypatch.setattr(text_parts, "_BATCH_CHARS", 500)
    assert again(workers=0) == expected


def test_a_long_document_goes_through_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Longer than a piece, than a batch and than a shard; other documents come before and after it."""
    text = "The river keeps the stone. " * 50_000
    write_text(tmp_path, {"first": "one", "long": text, "last": "two"})
    toml = write_toml(tmp_path, ("a",), holdout=0.0, shard_tokens=100)
    largest = []
    append = ShardWriter.append
    monkeypatch.setattr(ShardWriter, "append", lambda self, ids: (largest.append(len(ids)), append(self, ids))[1])
    prepare(toml, workers=0)
    whole = Tokenizer.load(str(DEBUG_TOKENIZER)).encode_array(text, bos=True, eos=True)
    assert max(largest) < len(whole) / 2
    corpus = Corpus.open(tmp_path / "tokens/a")
    assert np.array_equal(corpus.tokens(1, 0, len(whole)), whole)
    assert decoded(tmp_path / "tokens/a", "train")[2] == "<|begin_of_text|>two<|end_of_text|>"
    names = [(record.name, record.documents) for record in read_manifest(tmp_path / "tokens/a").shards["train"]]
    assert names == [("train-00000-000", 2), ("train-00000-001", 1)]


def test_parts_of_several_corpora_share_the_workers(tmp_path: Path, one_source_a_part: None):
    folders = make_corpora(tmp_path, ("a", "b"))
    expected = {name: all_bytes(folder) for name, folder in folders.items()}
    for folder in folders.values():
        (folder / "manifest.json").unlink()
    prepare(tmp_path / "datasets.toml", workers=2)
    assert {name: all_bytes(folder) for name, folder in folders.items()} == expected
    for folder in folders.values():
        assert not [path.name for path in folder.iterdir() if not re.match(r"manifest|train|valid", path.name)]


def test_finished_corpora_are_skipped(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = make_corpora(tmp_path, ("a",))["a"]
    before = (folder / "manifest.json").stat().st_mtime_ns
    prepare(tmp_path / "datasets.toml", workers=0)
    assert "already prepared" in capsys.readouterr().out
    source = tmp_path / "text/a.jsonl"
    os.utime(source, ns=(0, 0))  # another time, the same content
    prepare(tmp_path / "datasets.toml", workers=0)
    source.write_text(source.read_text().replace("The", "Eht"))
    with pytest.raises(ValueError, match=r"source files changed: .*a\.jsonl has another content of the same size"):
        prepare(tmp_path / "datasets.toml", workers=0)
    source.unlink()
    prepare(tmp_path / "datasets.toml", workers=0)
    assert (folder / "manifest.json").stat().st_mtime_ns == before


def test_changes_are_refused_by_name(tmp_path: Path):
    make_corpora(tmp_path, ("a",))
    toml = write_toml(tmp_path, ("a",), holdout=0.2, shard_tokens=6000)
    with pytest.raises(
        ValueError,
        match=r"a was prepared differently: holdout was 0.1, now 0.2; shard_tokens was 5000, now 6000\. Delete the",
    ):
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
    with pytest.raises(ValueError, match=r"source files changed: .*a\.jsonl had \d+ bytes, now \d+"):
        prepare(toml, workers=0)
    prepare(toml, overwrite=True, workers=0)
    assert "more" in "".join(decoded(tmp_path / "tokens/a", "train") + decoded(tmp_path / "tokens/a", "valid"))


def test_corpus_of_an_older_version(tmp_path: Path):
    folder = make_corpora(tmp_path, ("a",))["a"]
    write_manifest(folder, dataclasses.replace(read_manifest(folder), version=1))
    with pytest.raises(ValueError, match="version 1, expected 2: delete the folder, or set overwrite, and run"):
        prepare(tmp_path / "datasets.toml", workers=0)
    prepare(tmp_path / "datasets.toml", overwrite=True, workers=0)
    assert read_manifest(folder).version == 2


def run_and_die(program: str) -> None:
    """Runs a program in which SIGKILL comes."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, check=False)
    assert result.returncode == -signal.SIGKILL, result.stderr.decode()


def killed_after_two_parts(toml: Path) -> None:
    """Makes parts 0 and 1 of 4, and dies in the third after its first shards."""
    run_and_die(f"""
import os, signal
from mobilellm_pro.data import corpus_parts, part_workers, prepare
corpus_parts.PART_BYTES, write_part = 1, part_workers.write_part
def write_or_die(folder, number, record):
    if number == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    write_part(folder, number, record)
part_workers.write_part = write_or_die
prepare.prepare({str(toml)!r}, workers=0)
""")


def test_killed_and_started_again(tmp_path: Path, one_source_a_part: None):
    """The finished parts are kept, the others made, and the result is that of an undisturbed run."""
    prepare(write_sources(tmp_path / "whole"), workers=0)
    toml, folder = write_sources(tmp_path / "killed"), tmp_path / "killed/tokens/a"
    killed_after_two_parts(toml)
    assert sorted(path.name for path in folder.glob("part-*")) == ["part-00000.json", "part-00001.json"]
    with pytest.raises(FileNotFoundError, match="not a finished corpus"):
        Corpus.open(folder)
    times = {path.name: path.stat().st_mtime_ns for path in folder.glob("*-0000[01]-*")}
    (folder / "train-00003-000.bin.tmp").write_bytes(b"of a part that was under way")
    (tmp_path / "killed/text/a0.jsonl").unlink()  # no longer needed
    prepare(toml, workers=0)
    assert all_bytes(folder) == all_bytes(tmp_path / "whole/tokens/a")
    assert len(times) >= 4 and all((folder / name).stat().st_mtime_ns == time for name, time in times.items())
    assert not [path.name for path in folder.iterdir() if not re.fullmatch(r"manifest.json|.*\.(bin|idx)", path.name)]


def workers_of(pid: int) -> list[int]:
    """The processes below a `prepare` that make parts."""
    below = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return [child for child in below if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]


def interrupt(pid: int) -> None:
    """Ctrl-C in a terminal goes to the whole process group."""
    os.killpg(pid, signal.SIGINT)


def kill_a_worker(pid: int) -> None:
    """What the kernel does where memory runs out."""
    os.kill(workers_of(pid)[0], signal.SIGKILL)


@pytest.mark.parametrize(
    ("disturb", "status", "message"),
    [(interrupt, 130, ""), (kill_a_worker, 2, "a worker process died, most likely because memory ran out")],
)
def test_disturbed_workers(tmp_path: Path, disturb: Callable[[int], None], status: int, message: str):
    """Ctrl-C, or a worker that is killed: finished parts stay, nothing runs on, and the next run makes the rest."""
    for name in ("whole", "disturbed"):
        write_sources(tmp_path / name, 2)
        write_text(tmp_path / name, {f"long/{i}": f"{i} " * 20_000 for i in range(200)}, "a9")  # some seconds of work
    prepare(tmp_path / "whole/datasets.toml", workers=0)
    folder, toml = tmp_path / "disturbed/tokens/a", tmp_path / "disturbed/datasets.toml"
    # Where the tests run in the background of a shell, Ctrl-C is ignored, and children inherit that.
    program = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    program += "from mobilellm_pro.data import corpus_parts; corpus_parts.PART_BYTES = 1\n"
    program += (
        f"from mobilellm_pro.__main__ import main; raise SystemExit(main(['prepare', {str(toml)!r}, '--workers', '2']))"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    deadline = time.monotonic() + 60
    while len(list(folder.glob("part-*.json"))) < 2:
        assert child.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    workers = workers_of(child.pid)
    assert workers and not (folder / "manifest.json").exists()
    disturb(child.pid)
    errors = child.communicate(timeout=60)[1]
    assert child.returncode == status and message in errors and "Traceback" not in errors, errors
    assert not any(Path(f"/proc/{worker}").exists() for worker in workers)
    assert len(list(folder.glob("part-*.json"))) == 2
    times = {path.name: path.stat().st_mtime_ns for path in folder.glob("*-0000[01]-*.bin")}
    prepare(toml, workers=0)
    assert {name: (folder / name).stat().st_mtime_ns for name in times} == times
    assert len(all_bytes(folder)) > len(times)
    assert decoded(folder, "train") == decoded(tmp_path / "whole/tokens/a", "train")


def test_killed_in_the_middle_of_a_shard(tmp_path: Path):
    expected = all_bytes(make_corpora(tmp_path / "whole", ("a",))["a"])
    folder = make_corpora(tmp_path / "killed", ("a",))["a"]
    for file in folder.iterdir():
        file.unlink()
    run_and_die(f"""
import os, signal
from mobilellm_pro.data import prepare, shard_writer
shard_writer._BUFFER_TOKENS = 10
calls, end = [], shard_writer.ShardWriter.end_document
def end_or_die(self, name):
    calls.append(name)
    if len(calls) == 100:
        os.kill(os.getpid(), signal.SIGKILL)
    end(self, name)
shard_writer.ShardWriter.end_document = end_or_die
prepare.prepare({str(tmp_path / "killed/datasets.toml")!r}, workers=0)
""")
    assert list(folder.glob("*.tmp")), "it died in the middle of a shard"
    prepare(tmp_path / "killed/datasets.toml", workers=0)
    assert all_bytes(folder) == expected
    assert not list(folder.glob("*.tmp"))


def test_changes_before_an_unfinished_corpus_goes_on(tmp_path: Path, one_source_a_part: None):
    toml, folder = write_sources(tmp_path), tmp_path / "tokens/a"
    killed_after_two_parts(toml)
    write_text(tmp_path, {"new": "another size"}, "a1")
    write_text(tmp_path, {"new": "new"}, "a9")
    (tmp_path / "text/a2.jsonl").unlink()
    with pytest.raises(ValueError, match="prepared differently") as error:
        prepare(toml, workers=0)
    for difference in (r"a9\.jsonl is new", r"changed: \S+a1\.jsonl had", r"a2\.jsonl is gone"):
        assert re.search(difference, str(error.value)), difference
    assert len(list(folder.glob("part-*"))) == 2, "nothing was touched"
    with pytest.raises(ValueError, match="prepared differently: min_chars was 1, now 2"):
        prepare(write_sources(tmp_path, min_chars=2), workers=0)
    prepare(toml, overwrite=True, workers=0)
    assert len(read_manifest(folder).sources) == 5


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_record_costs_only_its_part(tmp_path: Path, one_source_a_part: None, workers: int):
    toml, folder = write_sources(tmp_path), tmp_path / "tokens/a"
    (tmp_path / "text/a1.jsonl").write_bytes(b'{"id": "ok", "text": "fine"}\n{"id": "x", "text": "\xff"}\n')
    with pytest.raises(ValueError, match=r"a1\.jsonl, record 2: invalid UTF-8"):
        prepare(toml, workers=workers)
    assert (folder / "part-00000.json").exists() and not list(folder.glob("*00001*"))
    shards = {path: path.stat().st_mtime_ns for path in folder.glob("*-00000-*")}
    write_text(tmp_path, {"ok": "fine", "x": "repaired"}, "a1")
    prepare(toml, workers=workers)
    assert shards and all(path.stat().st_mtime_ns == time for path, time in shards.items())
    assert read_manifest(folder).sources[1]["num_bytes"] == (tmp_path / "text/a1.jsonl").stat().st_size
    prepare(toml, workers=workers)


def test_all_errors_are_told(tmp_path: Path, one_source_a_part: None):
    """Both running parts are finished; the third is not begun."""
    toml = write_sources(tmp_path)
    for number in (0, 1):
        (tmp_path / f"text/a{number}.jsonl").write_text('{"id": "x"}\n')
    errors = [ValueError("first"), ValueError("second")]
    with pytest.raises(ValueError, match="first\nsecond"):
        part_workers.raise_all(errors)
    with pytest.raises(ValueError, match=r"no column 'text'"):
        prepare(toml, workers=2)
    assert not list((tmp_path / "tokens/a").glob("train-00003*"))


def test_full_disk(tmp_path: Path):
    """/dev/full answers every write with "no space left"."""
    (tmp_path / "train-00000-000.bin.tmp").symlink_to("/dev/full")
    message = r"train-00000-000\.bin\.tmp: cannot be written \(No space left on device; [\d.]+ MB free.*finished parts"
    with pytest.raises(ValueError, match=message), ShardWriter(tmp_path, "train", shard_tokens=10) as writer:
        writer.add(np.arange(100_000, dtype=np.int32))
    assert not list(tmp_path.iterdir())


def test_full_disk_while_preparing(tmp_path: Path):
    """A limit on the size of files stops the second of two parts; the first stays, and the rest is made later."""
    write_text(tmp_path, {"0": "short"}, "a0")
    write_text(tmp_path, {str(i): f"text {i} " * 1000 for i in range(100)}, "a1")
    toml = write_toml(tmp_path, ("a",), source=str(tmp_path / "text/a*.jsonl"), holdout=0.0)
    program = f"""
import resource
from mobilellm_pro.data import corpus_parts, prepare
corpus_parts.PART_BYTES = 1
resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, resource.RLIM_INFINITY))
prepare.prepare({str(toml)!r}, workers=0)
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, check=False, text=True
    )
    assert re.search(rf"a/train-00001-000\.bin\.tmp: cannot be written \({os.strerror(errno.EFBIG)}", result.stderr)
    folder = tmp_path / "tokens/a"
    assert sorted(path.name for path in folder.glob("*0000*")) == [
        "part-00000.json", "train-00000-000.bin", "train-00000-000.idx"
    ]  # fmt: skip
    prepare(toml, workers=0)
    Corpus.open(folder).verify()
    assert read_manifest(folder).documents("train") == 101


def test_two_at_once_are_refused(tmp_path: Path):
    import fcntl

    toml = write_sources(tmp_path)
    (tmp_path / "tokens/a").mkdir(parents=True)
    with (tmp_path / "tokens/a/prepare.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match=r"prepare\.lock: another `prepare` is making this corpus"):
            prepare(toml, workers=0)
    prepare(toml, workers=0)


def test_nothing_to_prepare(tmp_path: Path):
    write_text(tmp_path, {"x": " "})
    with pytest.raises(ValueError, match=r"dataset 'a': no documents in .*1 skipped \(1 short\).*correct `source`"):
        prepare(write_toml(tmp_path, ("a",)), workers=0)
    (tmp_path / "text/a.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match=r"dataset 'a': no file matches"):
        prepare(write_toml(tmp_path, ("a",)), workers=0)
    assert not (tmp_path / "tokens/a/manifest.json").exists()


class Terminal(io.StringIO):
    """Takes text, and says that it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_bar_in_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """All source bytes, the speed in text, and the remaining time."""
    monkeypatch.setattr(sys, "stderr", Terminal())
    toml = write_sources(tmp_path)
    prepare(toml, workers=0)
    last = sys.stderr.getvalue().rsplit("\r", 1)[-1]
    total = sum(file.stat().st_size for file in (tmp_path / "text").iterdir())
    assert last.startswith("100%") and f"{total / 1e3:.2f}k/{total / 1e3:.2f}k" in last
    assert re.search(r"\[\d\d:\d\d<\d\d:\d\d, .*text \d+\.\d MB/s\]", last)

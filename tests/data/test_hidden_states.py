"""The hidden-state cache: what comes back is what was put in, and whatever is wrong with a file is said."""

import errno
import hashlib
import json
import multiprocessing
import os
import pickle
import re
import resource
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from mobilellm_pro.data.hidden_state_files import (
    CacheKey,
    CorpusKey,
    decode,
    encode,
    read_header,
)
from mobilellm_pro.data.hidden_state_folder import check_cache, claim_cache, folder_problem
from mobilellm_pro.data.hidden_state_index import CorpusIndex, order_problems
from mobilellm_pro.data.hidden_states import ENTRY_TOKENS, HiddenStateReader, HiddenStateWriter

S, D = 32, 48
BF16 = CacheKey("0123456789abcdef", "none", "bfloat16", D, "teacher")
KINDS = {
    "bfloat16": BF16,
    "float32": replace(BF16, dtype="float32"),
    "float8": replace(BF16, cache_dtype="float8"),
    "float8 of float32": replace(BF16, dtype="float32", cache_dtype="float8"),
}
A = CorpusKey("train", "a", "11111111", S, 3, "stream", "block_causal", "continue")
B = replace(A, name="b", content="22222222")


def hidden(row: int, cache: CacheKey = BF16, seed: int = 0) -> torch.Tensor:
    """What "the teacher" says of a row, [S, D]: large and small tokens beside each other."""
    generator = torch.Generator().manual_seed(1000 * seed + row)
    scale = torch.logspace(-3, 3, S).unsqueeze(1)
    return (torch.randn(S, D, generator=generator) * scale).to(getattr(torch, cache.dtype))


@contextmanager
def writing(folder: Path, cache: CacheKey = BF16, file_bytes: int = 2**30) -> Iterator[HiddenStateWriter]:
    writer = HiddenStateWriter(folder, cache, [A, B], file_bytes=file_bytes, teacher_path="there")
    yield writer
    writer.close()


def write(folder: Path, rows: list[int], cache: CacheKey = BF16, parts: int = 1, **options: int) -> None:
    """Writes rows of corpus A, each in so many parts."""
    size = S // parts
    with writing(folder, cache, **options) as writer:
        for row in rows:
            for first in range(0, S, size):
                writer.add([A], [row], hidden(row, cache)[None, first : first + size], first=first)


def reader(folder: Path, cache: CacheKey = BF16, pieces: Sequence[tuple[int, int]] | None = None) -> HiddenStateReader:
    return HiddenStateReader([CorpusIndex.open(folder, cache, key) for key in (A, B)], cache, pieces=pieces)


def files(folder: Path) -> list[Path]:
    return sorted((folder / "a").glob("*.safetensors"))


def num_tokens(index: CorpusIndex) -> int:
    """Tokens in an index, each counted once."""
    intervals = zip(index.table["begin"].tolist(), index.table["end"].tolist(), strict=True)
    return len({token for begin, end in intervals for token in range(begin, end)})


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_read_is_what_was_written(tmp_path: Path, kind: str):
    cache = KINDS[kind]
    with writing(tmp_path, cache) as writer:
        both = torch.stack([hidden(5, cache), hidden(2, cache, seed=1)])
        writer.add([A, B], [5, 2], both)
        writer.add([A], [0], hidden(0, cache)[None])
    found = reader(tmp_path, cache).read([1, 0, 0], [2, 0, 5])
    expected = torch.stack([hidden(2, cache, seed=1), hidden(0, cache), hidden(5, cache)])
    assert found.dtype == expected.dtype
    if cache.cache_dtype == "teacher":
        assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8))
        return
    # e4m3 has three bits after the leading one, and numbers down to 2^-9 of a token's 448 are exact multiples.
    error = (found.float() - expected.float()).abs()
    largest = expected.float().abs().amax(-1, keepdim=True)
    rounding = 2**-8 if cache.dtype == "bfloat16" else 0  # of the result
    assert (error <= expected.float().abs() * (2**-4 + rounding) + largest / 448 * 2**-10).all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="hidden states of a GPU need a GPU")
@pytest.mark.parametrize("kind", KINDS)
def test_hidden_states_of_a_gpu(tmp_path: Path, kind: str):
    """The same as from the CPU, float8 up to the last bit of a scale."""
    cache = KINDS[kind]
    for folder, device in ((tmp_path / "cpu", "cpu"), (tmp_path / "gpu", "cuda")):
        with writing(folder, cache) as writer:
            writer.add([A], [0], hidden(0, cache)[None].to(device))
    ours, expected = (reader(tmp_path / name, cache).read([0], [0]).float() for name in ("gpu", "cpu"))
    tolerance = 0.0 if cache.cache_dtype == "teacher" else 2**-3  # one step of e4m3, where the scale tips a tie
    torch.testing.assert_close(ours, expected, rtol=tolerance, atol=0)
    assert (ours == expected).float().mean() > 0.9


def test_float8_of_zeros_and_of_the_largest_numbers():
    rows = torch.zeros(3, D)
    rows[1] = torch.finfo(torch.float32).max
    rows[2, 0] = torch.finfo(torch.float32).smallest_normal
    values, scale = encode(rows, KINDS["float8 of float32"])
    back = torch.empty_like(rows)
    decode(values, scale, back)
    assert torch.equal(back, values.float() * scale[:, None])
    assert torch.isfinite(back).all() and torch.equal(back[0], rows[0])
    torch.testing.assert_close(back[1], rows[1], rtol=1e-6, atol=0)


def test_other_hidden_states_are_refused(tmp_path: Path):
    with writing(tmp_path) as writer, pytest.raises(ValueError, match="the cache holds bfloat16 of width 48"):
        writer.add([A], [0], hidden(0)[None].float())


def test_files_are_safetensors_of_bounded_size(tmp_path: Path):
    """Any reader of safetensors sees the same tensors; no file is larger than the bound and its header."""
    write(tmp_path, list(range(20)), file_bytes=5 * S * D * 2)
    assert len(files(tmp_path)) == 4 and not list(tmp_path.rglob("*.tmp"))
    for path in files(tmp_path):
        metadata, _, start = read_header(path)
        assert path.stat().st_size - start == 5 * S * D * 2
        with safe_open(path, "pt") as file:
            for name in file.keys():
                values = file.get_tensor(name)
                row, first = map(int, name.split(":"))
                assert first == 0 and torch.equal(values, hidden(row))
                digest = hashlib.sha256(values.view(torch.uint8).numpy()).hexdigest()
                assert metadata["sha256"][name] == digest
    large = tmp_path / "large"
    write(large, [0, 1], file_bytes=10)
    assert len(files(large)) == 2


def test_the_largest_corpus_gives_a_file_first(tmp_path: Path):
    """A corpus of little weight does not get many small files, and all of them together stay within the bound."""
    with writing(tmp_path, file_bytes=4 * S * D * 2) as writer:
        for row in range(9):
            writer.add([A], [row], hidden(row)[None])
            if row % 4 == 0:
                writer.add([B], [row], hidden(row)[None])
        writer.flush()
        assert len(list((tmp_path / "b").iterdir())) == 1 and len(files(tmp_path)) == 4


@pytest.mark.parametrize(
    ("parts", "first", "num_tokens"), [(1, 0, 32), (2, 8, 16), (4, 0, 32), (4, 10, 3), (1, 16, 16)]
)
def test_rows_in_parts(tmp_path: Path, parts: int, first: int, num_tokens: int):
    """Written under one degree of context parallelism, read under another."""
    for kind in ("bfloat16", "float8"):
        folder = tmp_path / kind
        write(folder, [3, 4], KINDS[kind], parts)
        whole = reader(folder, KINDS[kind]).read([0], [4])
        part = reader(folder, KINDS[kind], [(first, first + num_tokens)]).read([0], [4])
        assert torch.equal(part, whole[:, first : first + num_tokens])
        if kind == "bfloat16":
            assert torch.equal(whole[0], hidden(4))


def test_a_long_row_is_read_in_pieces(tmp_path: Path):
    """A part of a row needs the entries that hold it and no other, whoever wrote them; missing pieces are added."""
    assert ENTRY_TOKENS == 4096
    long = replace(A, seq_len=10_000)
    row_SD = torch.randn(10_000, D, generator=torch.Generator().manual_seed(0)).bfloat16()

    def add(first: int, end: int) -> None:
        with closing(HiddenStateWriter(tmp_path, BF16, [long], file_bytes=2**30, teacher_path="there")) as writer:
            writer.add([long], [3], row_SD[None, first:end], first=first)

    def places(first: int, end: int) -> list[tuple[int, int]]:
        found = CorpusIndex.open(tmp_path, BF16, long).places(30_000 + first, 30_000 + end)
        return [(place.begin - 30_000, place.end - 30_000) for place in found]

    add(2500, 5000)
    assert places(0, 10_000) == [(2500, 4096), (4096, 5000)]
    add(0, 10_000)
    assert places(0, 10_000) == [(0, 4096), (4096, 8192), (8192, 10_000)]
    add(5000, 10_000)
    add(0, 10_000)
    assert len(files(tmp_path)) == 2 and places(8192, 9000) == [(8192, 10_000)]
    for first, end in ((0, 10_000), (0, 5000), (5000, 10_000), (8192, 8200)):
        part = HiddenStateReader([CorpusIndex.open(tmp_path, BF16, long)], BF16, pieces=[(first, end)])
        assert torch.equal(part.read([0], [3])[0], row_SD[first:end])
    path = CorpusIndex.open(tmp_path, BF16, long).places(38_192, 38_193)[0].path
    path.write_bytes(path.read_bytes()[:-2] + b"xx")  # in the last piece
    index = CorpusIndex.open(tmp_path, BF16, long)
    first_half = HiddenStateReader([index], BF16, pieces=[(0, 5000)]).read([0], [3])
    assert torch.equal(first_half[0], row_SD[:5000])
    with pytest.raises(ValueError, match="sha256 differs"):
        HiddenStateReader([index], BF16, pieces=[(5000, 10_000)]).read([0], [3])


def test_a_process_reads_a_header_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """What was added, replaced or removed in between is seen."""
    read: list[Path] = []
    monkeypatch.setattr(
        "mobilellm_pro.data.hidden_state_index.read_header", lambda path: read.append(path) or read_header(path)
    )

    def opened() -> CorpusIndex:
        read.clear()
        return CorpusIndex.open(tmp_path, BF16, A)

    write(tmp_path, [0, 1])
    (first,) = files(tmp_path)
    assert opened().missing_rows(2).tolist() == [] and opened().missing_rows(3).tolist() == [2] and read == []
    write(tmp_path, [2])
    index = opened()
    assert read == [path for path in files(tmp_path) if path != first] and index.missing_rows(3).tolist() == []
    found = HiddenStateReader([index], BF16).read([0, 0, 0], [0, 1, 2])
    assert torch.equal(found, torch.stack([hidden(row) for row in range(3)]))
    with pytest.raises(ValueError, match="fingerprint is"):  # another cache's index is another one
        CorpusIndex.open(tmp_path, replace(BF16, fingerprint="other"), A)
    replaced = first.with_name("new")
    replaced.write_bytes(first.read_bytes())
    os.replace(replaced, first)
    assert opened().missing_rows(3).tolist() == [] and sorted(read) == files(tmp_path)
    first.unlink()
    assert opened().missing_rows(3).tolist() == [0, 1] and read == files(tmp_path)


def test_overlapping_entries(tmp_path: Path):
    """Runs of several layouts, none of which saw the others' entries: every token is there, and counted once."""
    size = S // 4
    for first, last in ((0, 3), (1, 2), (2, 4), (1, 4)):
        with writing(tmp_path) as writer:
            writer._indexes[A] = CorpusIndex.open(tmp_path / "none", BF16, A)
            writer.add([A], [7], hidden(7)[None, first * size : last * size], first=first * size)
    index = CorpusIndex.open(tmp_path, BF16, A)
    assert num_tokens(index) == S and len(index.table) == 2
    assert index.holds(7 * S, 8 * S) and not index.holds(7 * S - 1, 8 * S) and not index.holds(7 * S, 8 * S + 1)
    assert torch.equal(reader(tmp_path).read([0], [7])[0], hidden(7))


def test_rows_that_are_there_are_not_written_again(tmp_path: Path):
    write(tmp_path, [0, 1, 2])
    before = files(tmp_path)
    write(tmp_path, [0, 1, 2])
    write(tmp_path, [0, 1, 2], parts=2)
    assert files(tmp_path) == before
    write(tmp_path, [1, 3, 3])
    assert len(files(tmp_path)) == 2 and num_tokens(CorpusIndex.open(tmp_path, BF16, A)) == 4 * S


@pytest.mark.parametrize("seed", range(20))
def test_missing_rows_against_a_table(seed: int):
    """The arithmetic on intervals equals marking every token."""
    random = np.random.default_rng(seed)
    num_rows = int(random.integers(1, 12))
    begins = random.integers(0, num_rows * S + 20, size=int(random.integers(0, 12)))
    ends = begins + random.integers(1, 3 * S, size=len(begins))
    there = np.zeros((num_rows + 5) * S, dtype=bool)
    for begin, end in zip(begins, ends, strict=True):
        there[begin:end] = True
    index = CorpusIndex(A, [Path()], _table(begins, ends))
    expected = np.flatnonzero(~there[: num_rows * S].reshape(num_rows, S).all(axis=1))
    assert index.missing_rows(num_rows).tolist() == expected.tolist()
    assert num_tokens(index) == there.sum()
    for begin in range(0, num_rows * S - 10, 7):
        assert index.holds(begin, begin + 10) == there[begin : begin + 10].all()


def _table(begins: np.ndarray, ends: np.ndarray) -> np.ndarray:
    from mobilellm_pro.data.hidden_state_index import _COLUMNS, _sorted

    table = np.zeros(len(begins), _COLUMNS)
    table["begin"], table["end"] = begins, ends
    return _sorted(table)


def test_a_hole_is_named(tmp_path: Path):
    write(tmp_path, [0, 1, 3])
    with writing(tmp_path) as writer:
        writer.add([A], [2], hidden(2)[None, :20])
    assert CorpusIndex.open(tmp_path, BF16, A).missing_rows(5).tolist() == [2, 4]
    with pytest.raises(ValueError, match=r"lacks row 2 of a \(train\) from its token 20 on"):
        reader(tmp_path).read([0], [2])
    with pytest.raises(ValueError, match=r"lacks row 0 of b \(train\) from its token 0 on"):
        reader(tmp_path).read([1], [0])


def test_a_changed_file_is_named_with_corpus_and_row(tmp_path: Path):
    write(tmp_path, [0, 1])
    (path,) = files(tmp_path)
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    found = reader(tmp_path)
    assert torch.equal(found.read([0], [0])[0], hidden(0))
    with pytest.raises(ValueError, match=rf"{path.name}: hidden states of a \(train\), row 1: sha256 differs"):
        found.read([0], [1])
    path.write_bytes(content[:-5])  # while a run reads it
    with pytest.raises(ValueError, match=r"row 1: ends at byte [\d,]+: delete it"):
        found.read([0], [1])
    with pytest.raises(ValueError, match=rf"{path.name}: truncated or changed: [\d,]+ bytes, its header promises"):
        reader(tmp_path)
    path.write_bytes(content[:100])
    with pytest.raises(ValueError, match=rf"{path.name}: truncated, or no file of hidden states \(its header is cut"):
        reader(tmp_path)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=rf"{path.name}: truncated, or no file of hidden states"):
        reader(tmp_path)
    path.unlink()
    with pytest.raises(ValueError, match=r"row 1: \[Errno 2\] No such file"):
        found.read([0], [1])


def change_metadata(path: Path, **changed: object) -> None:
    """Replaces entries of the metadata in place."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header["__metadata__"] |= {name: json.dumps(value) for name, value in changed.items()}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


def test_a_file_that_came_from_elsewhere_is_named(tmp_path: Path):
    write(tmp_path, [0])
    (path,) = files(tmp_path)
    change_metadata(path, teacher=replace(BF16, fingerprint="other").__dict__)
    with pytest.raises(ValueError, match=rf"{path.name}: changed, .*fingerprint is 'other' there and '0123"):
        reader(tmp_path)
    change_metadata(path, teacher=BF16.__dict__, corpus=replace(A, seed=9).__dict__)
    with pytest.raises(ValueError, match="seed is 9 there and 3 here"):
        reader(tmp_path)
    change_metadata(path, corpus=A.__dict__, version=2)
    with pytest.raises(ValueError, match="version 2, expected 1"):
        reader(tmp_path)


def test_another_order_of_the_data_is_named(tmp_path: Path):
    write(tmp_path, [0])
    for changed in ({"seed": 4}, {"seq_len": 64}, {"content": "x"}, {"packing": "best_fit"}, {"positions": "reset"},
                    {"teacher_mask": "causal"}):  # fmt: skip
        key = replace(A, **changed)
        (name, value) = next(iter(changed.items()))
        problem = order_problems(tmp_path, key)
        assert f"{name} is {getattr(A, name)!r} there and {value!r} here" in problem and problem.count(" is ") == 1
        assert f"{tmp_path}/a" in problem and "a (train)" in problem
        assert CorpusIndex.open(tmp_path, BF16, key).missing_rows(1).tolist() == [0]
    assert order_problems(tmp_path, A) == "" == order_problems(tmp_path, B) == order_problems(tmp_path / "none", A)


def test_a_cache_has_one_teacher_and_one_format(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"cache.json does not exist: teacher.cache_path is no cache"):
        check_cache(tmp_path, BF16, "here")
    claim_cache(tmp_path, BF16, "there")
    claim_cache(tmp_path, BF16, "a copy of it elsewhere")
    assert [path.name for path in tmp_path.iterdir()] == ["cache.json"]
    other = replace(BF16, fingerprint="fedcba9876543210", cache_dtype="float8")
    words = (
        r"the teacher there; the job's is here: fingerprint is '0123456789abcdef' there and 'fedcba9876543210' here, "
        "cache_dtype is 'teacher' there and 'float8' here"
    )
    for function in (check_cache, claim_cache):
        with pytest.raises(ValueError, match=words):
            function(tmp_path, other, "here")
    (tmp_path / "cache.json").write_text('{"version": 1}')
    with pytest.raises(ValueError, match="not the file of a cache"):
        check_cache(tmp_path, BF16, "here")
    (tmp_path / "cache.json").write_text(json.dumps({"version": 7, "teacher_path": ""}))
    with pytest.raises(ValueError, match="version 7, expected 1"):
        check_cache(tmp_path, BF16, "here")


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A file in the way, and a file system without hard links; nothing remains of the attempt."""
    (tmp_path / "file").touch()
    folder = tmp_path / "deep/er"
    assert folder_problem(folder, "ab") == ""
    for wrong in (tmp_path / "file", tmp_path / "file/cache"):
        words = rf"teacher.cache_path = '{wrong}': no cache can be written in .*\(.+\): choose a folder"
        assert re.match(words, folder_problem(wrong, "ab"))
        with pytest.raises(ValueError, match=words):
            claim_cache(wrong, BF16, "there")

    def no_links(source: Path, target: Path) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted", source)

    monkeypatch.setattr(os, "link", no_links)
    words = rf"no cache can be written in {tmp_path} \(Operation not permitted\): .* with hard links"
    assert re.search(words, folder_problem(folder, "ab"))
    with pytest.raises(ValueError, match=words.replace(str(tmp_path), str(folder))):
        claim_cache(folder, BF16, "there")
    assert not list(folder.iterdir()) and {path.name for path in tmp_path.iterdir()} == {"file", "deep"}
    (folder / "cache.json").touch()  # the only file that is linked
    assert folder_problem(folder, "ab") == ""
    (folder / "b").touch()
    assert f"no cache can be written in {folder}/b (" in folder_problem(folder, "ab")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_is_named(tmp_path: Path):
    tmp_path.chmod(0o500)
    assert f"no cache can be written in {tmp_path} (Permission denied)" in folder_problem(tmp_path / "cache", "ab")
    with pytest.raises(ValueError, match="Permission denied"):
        claim_cache(tmp_path / "cache", BF16, "there")


def test_many_claim_a_cache_at_once(tmp_path: Path):
    """Equal keys all succeed; of different ones all but the first are told so."""
    keys = [replace(BF16, fingerprint=name) for name in ("one", "one", "two", "two")]
    barrier, outcomes = threading.Barrier(len(keys)), []

    def claim(key: CacheKey) -> None:
        barrier.wait()
        try:
            claim_cache(tmp_path, key, "there")
            outcomes.append((key.fingerprint, True))
        except ValueError:
            outcomes.append((key.fingerprint, False))

    threads = [threading.Thread(target=claim, args=(key,)) for key in keys]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    winner = json.loads((tmp_path / "cache.json").read_text())["fingerprint"]
    assert len(outcomes) == 4 and all(won == (name == winner) for name, won in outcomes)
    assert [path.name for path in tmp_path.iterdir()] == ["cache.json"]


def full_disk(folder: str) -> str:
    """The message of a writer whose files may not grow beyond 3,000 bytes: a whole row does not fit."""
    import signal

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    writer = HiddenStateWriter(Path(folder), BF16, [A], file_bytes=10, teacher_path="there")
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
    try:
        for row in range(4):
            writer.add([A], [row], hidden(row)[None, : S if row else 4])
        writer.close()
    except ValueError as error:
        return str(error)
    return "no error"


def test_a_full_disk_is_named_and_leaves_nothing_half_written(tmp_path: Path):
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        message = pool.apply(full_disk, (str(tmp_path / "cache"),))
    assert "File too large" in message and "hidden states of a (train) cannot be written" in message
    assert str(tmp_path / "cache/a/train-") in message and "free space" in message
    (complete,) = (tmp_path / "cache/a").iterdir()  # the first, which fitted
    assert num_tokens(CorpusIndex.open(tmp_path / "cache", BF16, A)) == 4 and complete.suffix == ".safetensors"


def test_what_a_killed_process_left_is_ignored_and_later_removed(tmp_path: Path):
    write(tmp_path, [0])
    old, new = ((tmp_path / f"a/{A.prefix}{name}.safetensors.tmp") for name in ("old", "new"))
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (0, 0))
    write(tmp_path, [1])
    assert new.exists() and not old.exists()
    assert CorpusIndex.open(tmp_path, BF16, A).missing_rows(2).tolist() == []


def test_a_reader_is_cheap_to_send(tmp_path: Path):
    write(tmp_path, list(range(50)), file_bytes=5 * S * D * 2)
    found = reader(tmp_path)
    sent = pickle.dumps(found)
    assert len(sent) < 20_000
    assert torch.equal(pickle.loads(sent).read([0, 0], [49, 0]), found.read([0, 0], [49, 0]))

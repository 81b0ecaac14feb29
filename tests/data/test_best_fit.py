"""Best-fit packing: nothing is lost, nothing short is split, and little is padded."""

import pickle
import time
from pathlib import Path

import numpy as np
import pytest

from mobilellm_pro.data import row_assignment
from mobilellm_pro.data.best_fit import BestFitRows
from mobilellm_pro.data.document_limits import DocumentLimits
from mobilellm_pro.data.packing import IGNORE, write_rows
from mobilellm_pro.data.row_assignment import RowAssignment, best_fit
from mobilellm_pro.data.shards import Corpus
from tests.data.shard_files import random_documents, write_corpus

SEQ_LEN = 31
# Some longer than two rows, and lengths around the room of 32.
DOCUMENTS = [*random_documents(90, 30), *random_documents(20, 90, seed=1), [5] * 31, [6] * 32, [7] * 33, [8] * 64]


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    return Corpus.open(write_corpus(tmp_path / "a", DOCUMENTS, per_shard=20, vocab_size=1000))


@pytest.fixture(params=[16, 65_536], ids=["small windows", "one window"])
def rows(corpus: Corpus, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> BestFitRows:
    monkeypatch.setattr(row_assignment, "WINDOW_DOCUMENTS", request.param)
    return BestFitRows(corpus, seq_len=SEQ_LEN, seed=1)


def read_row(rows: BestFitRows, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    row = tuple(np.full((1, rows.seq_len), 77, dtype) for dtype in (np.int64, np.int64, np.int32))
    write_rows([(rows.corpus, rows.pieces(index))], *row)
    return tuple(array[0] for array in row)


def parts_of_row(rows: BestFitRows, index: int) -> list[list[int]]:
    """The parts of documents in a row, read back from its tensors."""
    input_S, labels_S, document_ids_S = read_row(rows, index)
    parts = []
    for number in range(document_ids_S[-1] + 1):
        inside = document_ids_S == number
        part, labels = input_S[inside].tolist(), labels_S[inside].tolist()
        assert labels[:-1] == part[1:] or (labels == [IGNORE] * len(part) and not any(part)), "padding"
        if labels[-1] != IGNORE:
            assert inside[-1], "only the last label may lie outside the row"
            part.append(labels[-1])
        if labels[:-1] == part[1 : len(labels)]:
            parts.append(part)
    return parts


def naive_best_fit(lengths: list[int], capacity: int) -> list[int]:
    """The definition: the row with the least room that holds the length; of equals, the one that was used last."""
    room: list[int] = []
    used: list[int] = []
    rows = []
    for time_, length in enumerate(lengths):
        fitting = [row for row in range(len(room)) if room[row] >= length]
        if not fitting:
            room.append(capacity)
            used.append(0)
            fitting = [len(room) - 1]
        row = min(fitting, key=lambda row: (room[row], -used[row]))
        room[row], used[row] = room[row] - length, time_
        rows.append(row)
    return rows


def test_best_fit_by_hand():
    """The second 5 prefers the room of 5 to none, 4 takes the room of 4 that is left, and 1 finds both rows full."""
    assert best_fit(np.array([6, 5, 5, 4, 1]), 10).tolist() == [0, 1, 1, 0, 2]
    assert best_fit(np.array([7, 6, 3, 3]), 10).tolist() == [0, 1, 0, 1]


@pytest.mark.parametrize("capacity", [20, 511, 512, 513, 5000])
def test_best_fit_is_its_definition(capacity: int):
    lengths = np.sort(np.random.default_rng(capacity).integers(1, capacity // 2 + capacity % 3, 300))[::-1]
    assert best_fit(lengths, capacity).tolist() == naive_best_fit(lengths.tolist(), capacity)
    shuffled = np.random.default_rng(1).permutation(lengths)
    assert best_fit(shuffled, capacity).tolist() == naive_best_fit(shuffled.tolist(), capacity)


def test_time_does_not_grow_with_the_square():
    """50,000 pieces against thousands of open rows, one by one, would take minutes."""
    lengths = np.sort(np.random.default_rng(0).integers(1, 2049, 50_000))[::-1]
    begin = time.process_time()
    best_fit(lengths, 2049)
    assert time.process_time() - begin < 2


def test_every_token_once_and_short_documents_whole(rows: BestFitRows):
    """The assignment: pieces of a document cover it, and only documents longer than a row have several."""
    found: dict[int, list[tuple[int, int]]] = {}
    for number in range(rows._assignment.num_rows):
        row = rows._assignment.row(number)
        assert 1 <= row["length"].sum() <= SEQ_LEN + 1
        for document, start, length in row.tolist():
            found.setdefault(document, []).append((start, start + length))
    for document, ids in enumerate(DOCUMENTS):
        cuts = sorted(found.pop(document, []))
        borders = [0, *(end for _, end in cuts)]
        assert [start for start, _ in cuts] == borders[:-1] and borders[-1] == len(ids)
        assert len(cuts) == -(-len(ids) // (SEQ_LEN + 1))
    assert not found


@pytest.mark.parametrize("epoch", [0, 3])
def test_rows_hold_every_document_once(rows: BestFitRows, epoch: int):
    """The tensors: what one epoch of rows shows is all documents, long ones in their pieces."""
    size = int(rows.rows_per_epoch)
    indexes = range(epoch * size, (epoch + 1) * size)
    assert rows.epochs(3 * size) == 3
    parts = [part for index in indexes for part in parts_of_row(rows, index)]
    step = SEQ_LEN + 1
    expected = [ids[start : start + step] for ids in DOCUMENTS for start in range(0, len(ids), step)]
    assert sorted(part for part in parts if any(part)) == sorted(part for part in expected if any(part))


def test_less_padding_than_first_come(corpus: Corpus):
    """First come: a row ends when the next document does not fit."""
    num_rows, room = 0, 0
    for length in (n % (SEQ_LEN + 1) for n in map(len, DOCUMENTS)):
        if length > room:
            num_rows, room = num_rows + 1, SEQ_LEN + 1
        room -= length
    num_rows += sum(len(ids) // (SEQ_LEN + 1) for ids in DOCUMENTS)
    ours = BestFitRows(corpus, seq_len=SEQ_LEN, seed=1).rows_per_epoch
    least = corpus.num_tokens / (SEQ_LEN + 1)
    assert least <= ours
    assert ours - least < (num_rows - least) / 3, (least, ours, num_rows)


def test_epochs_and_seeds_order_the_same_rows(corpus: Corpus):
    rows = {seed: BestFitRows(corpus, seq_len=SEQ_LEN, seed=seed) for seed in (1, 2)}
    size = int(rows[1].rows_per_epoch)
    orders = [
        [tuple(np.concatenate(read_row(rows[seed], index)).tolist()) for index in range(first, first + size)]
        for seed, first in ((1, 0), (1, size), (2, 0))
    ]
    assert orders[0] != orders[1] != orders[2] != orders[0]
    assert sorted(orders[0]) == sorted(orders[1]) == sorted(orders[2])
    copy = pickle.loads(pickle.dumps(rows[1]))
    assert np.array_equal(read_row(copy, 5), read_row(rows[1], 5))
    assert len(pickle.dumps(rows[1]._assignment)) < 500, "a worker maps the files"


def test_first_tokens_of_every_document(corpus: Corpus):
    rows = BestFitRows(corpus, seq_len=SEQ_LEN, seed=1, max_document_tokens=10)
    assert rows._assignment.pieces["length"].sum() == sum(min(10, len(ids)) for ids in DOCUMENTS)
    assert rows._assignment.pieces["length"].max() == 10 and not rows._assignment.pieces["start"].any()
    assert rows.options == "best_fit, max_document_tokens 10"


@pytest.mark.parametrize(("least", "most"), [(20, None), (20, 10), (64, None)])
@pytest.mark.parametrize("window", [16, 65_536])
def test_long_documents_only(
    corpus: Corpus, least: int, most: int | None, window: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(row_assignment, "WINDOW_DOCUMENTS", window)
    rows = BestFitRows(corpus, seq_len=SEQ_LEN, seed=1, min_document_tokens=least, max_document_tokens=most)
    read = [ids[:most] for ids in DOCUMENTS if len(ids) >= least]
    parts = [part for index in range(int(rows.rows_per_epoch)) for part in parts_of_row(rows, index)]
    expected = [ids[start : start + SEQ_LEN + 1] for ids in read for start in range(0, len(ids), SEQ_LEN + 1)]
    assert sorted(part for part in parts if any(part)) == sorted(part for part in expected if any(part))
    limits = f"min_document_tokens {least}" + (f", max_document_tokens {most}" if most else "")
    assert rows.options == f"best_fit, {limits}"


def test_windows_hold_documents_that_are_read(corpus: Corpus, monkeypatch: pytest.MonkeyPatch):
    """Where few documents are read, a window of as many neighbours would leave rows half empty."""
    monkeypatch.setattr(row_assignment, "WINDOW_DOCUMENTS", 8)
    limits = DocumentLimits(min_document_tokens=25)
    windows = [documents for documents, _ in row_assignment._windows(corpus, limits)]
    kept = [number for number, ids in enumerate(DOCUMENTS) if len(ids) >= 25]
    assert np.concatenate(windows).tolist() == kept
    assert all(8 <= len(documents) < 16 for documents in windows[:-1]) and len(windows) > 1


def test_every_limit_has_files_of_its_own(corpus: Corpus):
    limits = [DocumentLimits(*pair) for pair in ((None, None), (None, 20), (20, None), (20, 20), (2, None))]
    kept = [RowAssignment.of(corpus, 32, limit) for limit in limits]
    assert len({assignment.files for assignment in kept}) == len(limits)
    assert all(file.exists() for assignment in kept for file in assignment.files or ()), "none is stale for another"


def test_assignment_is_kept(corpus: Corpus, monkeypatch: pytest.MonkeyPatch):
    first = RowAssignment.of(corpus, 32)
    files = sorted(corpus.folder.glob("best_fit*"))
    assert [file.name.rpartition("-")[0] for file in files] == ["best_fit-train-31-whole"] * 2
    with monkeypatch.context() as patch:
        patch.setattr(row_assignment, "assign", None)
        again = RowAssignment.of(corpus, 32)
    assert np.array_equal(first.pieces, again.pieces) and np.array_equal(first.first_piece, again.first_piece)
    RowAssignment.of(corpus, 16)
    manifest = corpus.folder / "manifest.json"
    manifest.write_text(manifest.read_text() + "\n")
    changed = RowAssignment.of(corpus, 32)
    assert np.array_equal(first.pieces, changed.pieces)
    left = sorted(corpus.folder.glob("best_fit*"))
    assert len(left) == 4 and not set(files) & set(left), "files of the old manifest are gone, other lengths stay"
    assert not list(corpus.folder.glob("*.tmp"))


@pytest.mark.parametrize("where", ["mkstemp", "write"])
def test_folder_that_cannot_be_written(corpus: Corpus, where: str, monkeypatch: pytest.MonkeyPatch):
    kept = RowAssignment.of(corpus, 32)

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError("read-only")

    with monkeypatch.context() as patch:
        patch.setattr(
            *((row_assignment.tempfile, "mkstemp") if where == "mkstemp" else (row_assignment, "_write_header")), refuse
        )
        with pytest.warns(UserWarning, match="rows are packed at every start"):
            held = RowAssignment.of(corpus, 33)
    assert held.files is None and held.pieces["length"].sum() == kept.pieces["length"].sum()
    assert held.first_piece[0] == 0 and held.first_piece[-1] == len(held.pieces)
    assert not list(corpus.folder.glob("*.tmp"))
    copy = pickle.loads(pickle.dumps(held))
    assert np.array_equal(copy.row(3), held.row(3))


def test_damaged_files(corpus: Corpus):
    RowAssignment.of(corpus, 32)
    pieces = next(corpus.folder.glob("best_fit*.pieces.npy"))
    pieces.write_bytes(pieces.read_bytes()[:-40])
    with pytest.raises(ValueError, match=r"pieces\.npy and .*rows\.npy: damaged .*delete both"):
        RowAssignment.of(corpus, 32)


def test_bad_arguments(corpus: Corpus, tmp_path: Path):
    with pytest.raises(ValueError, match="seq_len = 0"):
        BestFitRows(corpus, seq_len=0, seed=1)
    with pytest.raises(ValueError, match="min_document_tokens = 0: expected at least 1"):
        BestFitRows(corpus, seq_len=8, seed=1, min_document_tokens=0)
    with pytest.raises(ValueError, match=r"has 0 tokens in .* at least min_document_tokens = 999 .*: lower min_doc"):
        BestFitRows(corpus, seq_len=8, seed=1, min_document_tokens=999)
    empty = Corpus.open(write_corpus(tmp_path / "empty", [[], []]))
    with pytest.raises(ValueError, match="has 0 tokens, fewer than one sequence"):
        BestFitRows(empty, seq_len=8, seed=1)

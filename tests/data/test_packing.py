"""The stream of one corpus: every token of an epoch once, in an order that depends on the seed alone."""

import pickle
from pathlib import Path

import numpy as np
import pytest

from mobilellm_pro.data import shuffle
from mobilellm_pro.data.packing import IGNORE, CorpusStream, write_rows
from mobilellm_pro.data.shards import Corpus
from mobilellm_pro.data.shuffle import BlockShuffle, hash_key, permutation, sum_blocks
from tests.data.shard_files import random_documents, write_corpus

GOLDEN = ([0, 3, 7, 4, 6, 5, 1, 2], [0, 3, 5, 6, 4, 7, 1, 2])
DOCUMENTS = random_documents(60, 50)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return Corpus.open(write_corpus(tmp_path_factory.mktemp("packing") / "a", DOCUMENTS, per_shard=9, vocab_size=1000))


def read_row(rows: CorpusStream, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(input, labels, document ids) of a row, into memory that held something else."""
    row = tuple(np.full((1, rows.seq_len), 77, dtype) for dtype in (np.int64, np.int64, np.int32))
    write_rows([(rows.corpus, rows.pieces(index))], *row)
    return tuple(array[0] for array in row)


def expected_stream(documents: list[list[int]], name: str, seed: int, epochs: int) -> tuple[np.ndarray, np.ndarray]:
    """The definition: tokens of all epochs one after another, and whether each begins a document."""
    ordered = [documents[i] for e in range(epochs) for i in permutation(len(documents), hash_key(seed, name), e)]
    return np.concatenate(ordered).astype(int), np.concatenate([np.arange(len(ids)) == 0 for ids in ordered])


def check_rows(rows: CorpusStream, indexes: range, tokens: np.ndarray, begins: np.ndarray) -> None:
    size = rows.seq_len
    for index in indexes:
        window = slice(index * size, (index + 1) * size)
        following = slice(window.start + 1, window.stop + 1)
        input_S, labels_S, document_ids_S = read_row(rows, index)
        assert np.array_equal(input_S, tokens[window])
        assert np.array_equal(labels_S, np.where(begins[following], IGNORE, tokens[following]))
        assert np.array_equal(document_ids_S, np.cumsum(begins[window]) - begins[window.start])


@pytest.mark.parametrize("seq_len", [1, 7, 64, 333])
def test_rows_cut_the_stream(corpus: Corpus, seq_len: int):
    rows = CorpusStream(corpus, seq_len=seq_len, seed=1)
    tokens, begins = expected_stream(DOCUMENTS, "a", 1, 4)
    count = 3 * corpus.num_tokens // seq_len
    check_rows(rows, range(count), tokens, begins)
    assert rows.epochs(count) == pytest.approx(count / rows.rows_per_epoch) == pytest.approx(3, abs=seq_len / 500)
    assert rows.options == ""


def test_first_tokens_of_every_document(corpus: Corpus):
    rows = CorpusStream(corpus, seq_len=64, seed=1, max_document_tokens=11)
    tokens, begins = expected_stream([ids[:11] for ids in DOCUMENTS], "a", 1, 4)
    total = sum(min(len(ids), 11) for ids in DOCUMENTS)
    assert rows.num_tokens == total and rows.options == "max_document_tokens 11"
    check_rows(rows, range(3 * total // 64), tokens, begins)


@pytest.mark.parametrize(("least", "most"), [(1, None), (30, None), (30, 11), (11, 30), (50, 50)])
def test_long_documents_only(corpus: Corpus, least: int, most: int | None):
    """The seeded order with the short documents left out, and then the beginnings of the others."""
    rows = CorpusStream(corpus, seq_len=64, seed=1, min_document_tokens=least, max_document_tokens=most)
    read = [ids[:most] if len(ids) >= least else [] for ids in DOCUMENTS]
    assert rows.num_tokens == sum(map(len, read))
    assert rows.options == f"min_document_tokens {least}" + (f", max_document_tokens {most}" if most else "")
    assert rows.epochs(10) == 640 / rows.num_tokens
    check_rows(rows, range(3 * rows.num_tokens // 64), *expected_stream(read, "a", 1, 5))


def test_long_documents_are_few(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Groups without a document that is read, and rows that reach over many of them."""
    monkeypatch.setattr(shuffle, "GROUP_BLOCKS", 4)
    monkeypatch.setattr(shuffle, "GROUP_ITEMS", 1)
    documents = random_documents(500, 30)
    least = sorted(map(len, documents))[-12]
    corpus = Corpus.open(write_corpus(tmp_path / "f", documents, per_shard=100, vocab_size=1000))
    read = [ids if len(ids) >= least else [] for ids in documents]
    rows = CorpusStream(corpus, seq_len=100, seed=1, min_document_tokens=least)
    check_rows(rows, range(3 * rows.num_tokens // 100), *expected_stream(read, "f", 1, 4))


@pytest.mark.parametrize("blocks", [7, 150])
def test_long_documents_in_blocks(tmp_path: Path, blocks: int, monkeypatch: pytest.MonkeyPatch):
    """More documents than blocks: what is read comes once an epoch, in the order of the same corpus without a limit."""
    monkeypatch.setattr(shuffle, "MAX_BLOCKS", blocks)
    monkeypatch.setattr(shuffle, "GROUP_BLOCKS", 4)
    monkeypatch.setattr(shuffle, "GROUP_ITEMS", 1)
    documents = random_documents(200, 9)
    corpus = Corpus.open(write_corpus(tmp_path / "b", documents, per_shard=70, vocab_size=1000))
    rows = CorpusStream(corpus, seq_len=13, seed=1, min_document_tokens=7)
    num_groups = -(-blocks // 4)
    ordered = [i for epoch in range(2) for group in range(num_groups) for i in rows._shuffle.items(epoch, group)]
    read = [documents[i] for i in ordered if len(documents[i]) >= 7]
    assert sorted(read) == sorted([ids for ids in documents if len(ids) >= 7] * 2)
    begins = np.concatenate([np.arange(len(ids)) == 0 for ids in read])
    check_rows(rows, range(2 * rows.num_tokens // 13 - 1), np.concatenate(read).astype(int), begins)


def test_rows_as_long_as_an_epoch(corpus: Corpus):
    """A row may cross the border of two epochs, or almost span one."""
    rows = CorpusStream(corpus, seq_len=corpus.num_tokens - 1, seed=1)
    check_rows(rows, range(3), *expected_stream(DOCUMENTS, "a", 1, 4))


def test_uint16(tmp_path: Path):
    corpus = Corpus.open(write_corpus(tmp_path / "u", DOCUMENTS, dtype="uint16", vocab_size=1000))
    check_rows(CorpusStream(corpus, seq_len=20, seed=1), range(50), *expected_stream(DOCUMENTS, "u", 1, 2))


def test_order_of_reading_does_not_matter(corpus: Corpus):
    forward = CorpusStream(corpus, seq_len=50, seed=3)
    rows = [read_row(forward, index) for index in range(200)]
    backward = CorpusStream(corpus, seq_len=50, seed=3)
    for index in np.random.default_rng(0).permutation(200):
        assert np.array_equal(read_row(backward, int(index)), rows[index])
    copy = pickle.loads(pickle.dumps(backward))
    assert len(copy._groups) == 0, "what is quickly made again is not sent"
    assert np.array_equal(read_row(copy, 7), rows[7])


def test_seed_changes_the_order(corpus: Corpus):
    first, second = (read_row(CorpusStream(corpus, seq_len=500, seed=seed), 0)[0] for seed in (1, 2))
    assert not np.array_equal(first, second)


def test_far_ahead_is_as_near(corpus: Corpus):
    rows = CorpusStream(corpus, seq_len=50, seed=1)
    read_row(rows, 10**12)
    assert rows.epochs(10**12) == 10**12 * 50 / corpus.num_tokens


@pytest.mark.parametrize("blocks", [3, 17, 150])
def test_many_documents_in_blocks(tmp_path: Path, blocks: int, monkeypatch: pytest.MonkeyPatch):
    """More documents than blocks: still each once an epoch, and rows that follow the order of the groups."""
    monkeypatch.setattr(shuffle, "MAX_BLOCKS", blocks)
    monkeypatch.setattr(shuffle, "GROUP_BLOCKS", 4)
    monkeypatch.setattr(shuffle, "GROUP_ITEMS", 1)
    documents = random_documents(200, 9)
    corpus = Corpus.open(write_corpus(tmp_path / "b", documents, per_shard=70, vocab_size=1000))
    rows = CorpusStream(corpus, seq_len=13, seed=1)
    num_groups = -(-len(rows._shuffle._weights) // 4)
    ordered = [
        documents[i] for epoch in range(2) for group in range(num_groups) for i in rows._shuffle.items(epoch, group)
    ]
    assert sorted(ordered) == sorted(documents * 2)
    begins = np.concatenate([np.arange(len(ids)) == 0 for ids in ordered])
    check_rows(rows, range(2 * corpus.num_tokens // 13 - 1), np.concatenate(ordered).astype(int), begins)


def test_one_item_a_block_is_the_plain_order(monkeypatch: pytest.MonkeyPatch):
    """Groups only cut the permutation, so an order does not change with how much of it is laid out."""
    monkeypatch.setattr(shuffle, "GROUP_ITEMS", 64)
    weights = np.random.default_rng(0).integers(0, 9, 1000)
    orders = BlockShuffle(1000, 42, sum_blocks(1000, lambda first, last: weights[first:last]))
    for epoch in range(3):
        plain = permutation(1000, 42, epoch)
        assert np.array_equal(np.concatenate([orders.items(epoch, group) for group in range(16)]), plain)
        ends = np.cumsum(weights[plain])
        for offset in range(0, orders.total, 97):
            group, inside = orders.find(epoch, offset)
            before = int(ends[64 * group - 1]) if group else 0
            assert before + inside == offset and 0 <= inside < ends[min(64 * group + 63, 999)] - before


def test_blocks(monkeypatch: pytest.MonkeyPatch):
    """Every item once, the neighbours of a block in one group but not side by side, groups from many places."""
    monkeypatch.setattr(shuffle, "MAX_BLOCKS", 1000)
    monkeypatch.setattr(shuffle, "_CHUNK_ITEMS", 64)
    size = 19_990
    sums = sum_blocks(size, lambda first, last: np.arange(first, last))
    assert len(sums) == 1000 and sums.sum() == size * (size - 1) // 2 and sums[-1] == sum(range(19_980, size))
    orders = BlockShuffle(size, 7, sums)
    groups = [orders.items(0, group) for group in range(16)]
    assert sorted(np.concatenate(groups)) == list(range(size))
    for group in groups[:-1]:
        assert len(np.unique(group // 20)) == 64
        assert len(np.unique(group // 2000)) == 10, "from everywhere in the corpus"
        assert np.mean(np.diff(group) == 1) < 0.01
    assert not np.array_equal(groups[0], orders.items(1, 0))


def test_permutation_is_written_down():
    """Golden values: a change here would reorder the data of every running experiment."""
    assert permutation(8, key=hash_key(1, "wiki"), epoch=0).tolist() == GOLDEN[0]
    assert permutation(8, key=hash_key(1, "wiki"), epoch=1).tolist() == GOLDEN[1]
    assert sorted(permutation(1000, key=5, epoch=9)) == list(range(1000))


def test_permutation_looks_random():
    """Each number stands at each place about equally often (chi square with 81 degrees of freedom)."""
    counts = np.zeros((10, 10))
    for epoch in range(5000):
        counts[np.arange(10), permutation(10, key=hash_key(3, "x"), epoch=epoch)] += 1
    assert ((counts - 500) ** 2 / 500).sum() < 140


@pytest.mark.parametrize("bad", [-1, -100, 10, 2**30])
@pytest.mark.parametrize("seq_len", [8, 9])
def test_illegal_id(tmp_path: Path, bad: int, seq_len: int):
    """Of a file that changed after it was opened; also where the id is the last label of a row."""
    corpus = Corpus.open(write_corpus(tmp_path / "c", [[1, 2, 3, 4, 5, 6, 7, 8, bad if bad < 0 else 9, 1]]))
    path = tmp_path / "c" / "train-00000.bin"
    path.write_bytes(np.array([1, 2, 3, 4, 5, 6, 7, 8, bad, 1], dtype="<i4").tobytes())
    rows = CorpusStream(corpus, seq_len=seq_len, seed=1)
    with pytest.raises(ValueError, match=rf"train-00000\.bin: document 0 holds id {bad}, outside .* of 10.*`prepare`"):
        read_row(rows, 0)


def test_corpus_smaller_than_a_row(corpus: Corpus):
    read_row(CorpusStream(corpus, seq_len=corpus.num_tokens - 1, seed=1), 0)
    with pytest.raises(ValueError, match=rf"has {corpus.num_tokens} tokens, fewer than one sequence .*shorten seq_len"):
        CorpusStream(corpus, seq_len=corpus.num_tokens, seed=1)
    with pytest.raises(ValueError, match=r"has 5\d tokens, fewer than one sequence"):
        CorpusStream(corpus, seq_len=64, seed=1, max_document_tokens=1)
    longest = max(map(len, DOCUMENTS))
    message = (
        rf"{corpus.folder}: .*'train' has 0 tokens in documents of at least min_document_tokens = {longest + 1} "
        rf"\(the longest has {longest}\), fewer than .* = 9: lower min_document_tokens, shorten seq_len"
    )
    with pytest.raises(ValueError, match=message):
        CorpusStream(corpus, seq_len=8, seed=1, min_document_tokens=longest + 1)
    with pytest.raises(ValueError, match=r"has \d+ tokens in documents of at least min_document_tokens = 49"):
        CorpusStream(corpus, seq_len=1000, seed=1, min_document_tokens=49)
    with pytest.raises(ValueError, match="seq_len = 0"):
        CorpusStream(corpus, seq_len=0, seed=1)
    with pytest.raises(ValueError, match="min_document_tokens = -1: expected at least 1"):
        CorpusStream(corpus, seq_len=8, seed=1, min_document_tokens=-1)
    with pytest.raises(ValueError, match="max_document_tokens = 0"):
        CorpusStream(corpus, seq_len=8, seed=1, max_document_tokens=0)

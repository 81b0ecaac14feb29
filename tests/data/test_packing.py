"""The stream of one corpus: every token of an epoch once, in an order that depends on the seed alone."""

import pickle

import numpy as np
import pytest

from mobilellm_pro.data.packing import CorpusStream, hash_key, permutation
from mobilellm_pro.data.shards import Corpus
from tests.data.synthetic import make_corpora

GOLDEN = ([0, 3, 7, 4, 6, 5, 1, 2], [0, 3, 5, 6, 4, 7, 1, 2])


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return Corpus.open(make_corpora(tmp_path_factory.mktemp("packing"), ("a",), documents=60)["a"])


def stream_of(corpus: Corpus, seq_len: int, rows: range, seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and document starts of consecutive rows, glued together by their inputs."""
    stream = CorpusStream(corpus, seq_len=seq_len, seed=seed)
    tokens, starts, last_token = [], [], None
    for row in map(stream.sequence, rows):
        assert row.tokens.dtype == row.document_ids.dtype == np.int32
        assert row.tokens.shape == row.document_ids.shape == (seq_len + 1,)
        assert row.document_ids[0] == 0
        if last_token is not None:
            assert row.tokens[0] == last_token, "the last label is the next row's first input"
        last_token = row.tokens[-1]
        tokens.append(row.tokens[:-1])
        starts.append(np.diff(row.document_ids))
    return np.concatenate(tokens), np.concatenate(starts)


def documents_of(corpus: Corpus) -> list[tuple[int, ...]]:
    return [tuple(corpus.tokens(i, 0, int(corpus.document_lengths[i])).tolist()) for i in range(corpus.num_documents)]


@pytest.mark.parametrize("seq_len", [1, 7, 64, 333])
def test_every_document_of_an_epoch_once(corpus: Corpus, seq_len: int):
    """The definition: the stream is epoch after epoch, each all documents in some order, and rows cut it."""
    total = corpus.num_tokens
    tokens, starts = stream_of(corpus, seq_len, range(3 * total // seq_len))
    expected = sorted(documents_of(corpus))
    orders = []
    for epoch in range(len(tokens) // total):
        part = tokens[epoch * total : (epoch + 1) * total]
        # The debug tokenizer's bos begins every document and occurs nowhere else.
        borders = np.flatnonzero(part == 4077)
        found = [tuple(document.tolist()) for document in np.split(part, borders[1:])]
        assert sorted(found) == expected
        orders.append(found)
    assert len(orders) >= 2
    assert orders[0] != orders[1], "every epoch has its own order"
    assert np.array_equal(starts == 1, np.append(tokens[1:] == 4077, starts[-1] == 1))


def test_rows_longer_than_an_epoch_boundary(corpus: Corpus):
    """A row may cross the border of two epochs, or almost span one."""
    seq_len = corpus.num_tokens - 1
    tokens, _ = stream_of(corpus, seq_len, range(3))
    whole, _ = stream_of(corpus, 10, range(3 * seq_len // 10))
    assert np.array_equal(tokens[: len(whole)], whole)


def test_order_of_reading_does_not_matter(corpus: Corpus):
    forward = CorpusStream(corpus, seq_len=50, seed=3)
    rows = [forward.sequence(index) for index in range(200)]
    backward = CorpusStream(corpus, seq_len=50, seed=3)
    for index in np.random.default_rng(0).permutation(200):
        row = backward.sequence(int(index))
        assert np.array_equal(row.tokens, rows[index].tokens)
        assert np.array_equal(row.document_ids, rows[index].document_ids)
        assert row.epoch == rows[index].epoch == index * 50 // corpus.num_tokens
    copy = pickle.loads(pickle.dumps(backward))
    assert np.array_equal(copy.sequence(7).tokens, rows[7].tokens)
    assert len(copy._epochs) == 1


def test_seed_changes_the_order(corpus: Corpus):
    first, _ = stream_of(corpus, 50, range(10), seed=1)
    second, _ = stream_of(corpus, 50, range(10), seed=2)
    assert not np.array_equal(first, second)


def test_far_ahead_is_as_near(corpus: Corpus):
    stream = CorpusStream(corpus, seq_len=50, seed=1)
    row = stream.sequence(10**12)
    assert row.epoch == 10**12 * 50 // corpus.num_tokens


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


def test_corpus_smaller_than_a_row(corpus: Corpus):
    CorpusStream(corpus, seq_len=corpus.num_tokens - 1, seed=1).sequence(0)
    with pytest.raises(ValueError, match=rf"has {corpus.num_tokens} tokens, fewer than one sequence .*shorten seq_len"):
        CorpusStream(corpus, seq_len=corpus.num_tokens, seed=1)
    with pytest.raises(ValueError, match="seq_len = 0"):
        CorpusStream(corpus, seq_len=0, seed=1)

"""The order of a mixture: shares at every scale, purity, and what a batch holds."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from mobilellm_pro.data.best_fit import BestFitRows
from mobilellm_pro.data.mixture import Mixture, batch, check_weights
from mobilellm_pro.data.packing import CorpusStream, write_rows
from mobilellm_pro.data.shards import Corpus
from tests.data.shard_files import random_documents, write_corpus

PAPER = [89.75, 4.66, 1.92, 1.35, 1.02, 1.02, 0.24]


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> list[Corpus]:
    folder = tmp_path_factory.mktemp("mixture")
    return [
        Corpus.open(write_corpus(folder / name, random_documents(60, 50, seed=seed), per_shard=20, vocab_size=1000))
        for seed, name in enumerate("abc")
    ]


def make_mixture(
    corpora: list[Corpus], weights: list[float], *, seq_len: int = 32, seed: int = 1, rows=CorpusStream, **options
) -> Mixture:
    streams = [rows(corpora[i % len(corpora)], seq_len=seq_len, seed=seed) for i in range(len(weights))]
    return Mixture(streams, weights, seed=seed, **options)


@pytest.mark.parametrize("weights", [PAPER, [1.0], [50, 50], [20] * 5, [60, 25, 10, 4, 1], [99.99, 0.01]])
def test_shares_over_any_10000_rows(corpora: list[Corpus], weights: list[float]):
    """Within 0.1 % of the weights over every window of 10,000 rows, borders of the period included."""
    mixture = make_mixture(corpora, weights, renormalize=True)
    shares = np.array(weights) / sum(weights)
    twice = np.concatenate([mixture._schedule, mixture._schedule])
    for corpus, share in enumerate(shares):
        before = np.concatenate(([0], np.cumsum(twice == corpus)))
        for window in (100, 10_000):
            taken = before[window:] - before[:-window]
            assert np.abs(taken - window * share).max() <= 10, (corpus, window)


def test_every_row_of_a_corpus_once_and_in_order(corpora: list[Corpus]):
    mixture = make_mixture(corpora, [0.5, 0.3, 0.2], period=1000)
    places = [mixture.place(index) for index in range(3500)]
    for corpus in range(3):
        rows = [row for which, row in places if which == corpus]
        assert rows == list(range(len(rows)))
        assert mixture.counts(3500)[corpus] == len(rows)
    passed = mixture.counts(3500) * 32 / [corpus.num_tokens for corpus in corpora]
    np.testing.assert_allclose(mixture.epochs(3500), passed)


@pytest.mark.parametrize("rows", [CorpusStream, BestFitRows])
def test_rows_are_a_function_of_seed_and_number(corpora: list[Corpus], rows: type):
    """However ranks and batches cut the rows, and in whichever process."""
    mixture = make_mixture(corpora, [0.5, 0.3, 0.2], rows=rows)
    whole = batch(mixture, 40, 24)
    for ranks in (2, 3, 4, 8):
        size = 24 // ranks
        fresh = pickle.loads(pickle.dumps(make_mixture(corpora, [0.5, 0.3, 0.2], rows=rows)))
        parts = {rank: batch(fresh, 40 + rank * size, size) for rank in reversed(range(ranks))}
        for key, value in whole.items():
            assert torch.equal(torch.cat([parts[rank][key] for rank in range(ranks)]), value)
    other = batch(make_mixture(corpora, [0.5, 0.3, 0.2], rows=rows, seed=2), 40, 24)
    assert not torch.equal(other["input"], whole["input"])


@pytest.mark.parametrize("rows", [CorpusStream, BestFitRows])
def test_batch(corpora: list[Corpus], rows: type):
    """Each row is what the corpus of its place writes into empty memory."""
    mixture = make_mixture(corpora, [0.5, 0.3, 0.2], rows=rows)
    found = batch(mixture, 0, 6)
    kinds = {"input": torch.int64, "labels": torch.int64, "document_ids": torch.int32, "corpus": torch.int32}
    kinds["row"] = torch.int64
    assert {key: value.dtype for key, value in found.items()} == kinds
    assert found["input"].shape == found["labels"].shape == found["document_ids"].shape == (6, 32)
    for b in range(6):
        corpus, row = mixture.place(b)
        alone = [torch.zeros(1, 32, dtype=kinds[key]) for key in ("input", "labels", "document_ids")]
        stream = mixture.streams[corpus]
        write_rows([(stream.corpus, stream.pieces(row))], *(tensor.numpy() for tensor in alone))
        assert (found["corpus"][b], found["row"][b]) == (corpus, row)
        for key, tensor in zip(("input", "labels", "document_ids"), alone, strict=True):
            assert torch.equal(found[key][b], tensor[0])


def test_identity(corpora: list[Corpus]):
    """Checkpoints hold it: the words of the defaults must stay, and every option must change them."""
    tokens = [corpus.num_tokens for corpus in corpora]
    a, b, c = (corpus.content for corpus in corpora)
    assert len({a, b, c}) == 3
    shares = f"a:{tokens[0]}x0.5#{a}, b:{tokens[1]}x0.3#{b}, c:{tokens[2]}x0.2#{c}"
    words = f"seed 1, seq_len 32, corpora (tokens x weight) {shares}"
    assert make_mixture(corpora, [0.5, 0.3, 0.2]).identity == words
    streams = [
        CorpusStream(corpora[0], seq_len=32, seed=1, max_document_tokens=20),
        BestFitRows(corpora[1], seq_len=32, seed=1),
    ]
    words = f"a:{tokens[0]}x0.5#{a} (max_document_tokens 20), b:{tokens[1]}x0.5#{b} (best_fit)"
    assert Mixture(streams, [0.5, 0.5], seed=1).identity.endswith(words)


@pytest.mark.parametrize("rows", [CorpusStream, BestFitRows])
@pytest.mark.parametrize(
    "limits", [[1.0, None, None], [0.5, 0.7, 2.5], [3, 2, 1], [None, None, 1e-9], [None, 7.3, None]]
)
def test_rows_until(corpora: list[Corpus], limits: list[float | None], rows: type):
    """Against walking: the longest start of the mixture that passes no limit."""
    mixture = make_mixture(corpora, [0.5, 0.3, 0.2], rows=rows, period=100)
    end, name = mixture.rows_until(limits)
    passed = [
        np.array([np.inf if limit is None else limit for limit in limits]) < mixture.epochs(n) for n in (end, end + 1)
    ]
    assert not passed[0].any()
    assert [n for n, over in zip("abc", passed[1], strict=True) if over] == [name]


def test_rows_without_limits(corpora: list[Corpus]):
    mixture = make_mixture(corpora, [0.5, 0.3, 0.2])
    assert mixture.rows_until([None] * 3) is mixture.rows_until(()) is None
    with pytest.raises(ValueError, match="corpus 'b': max_epochs = 0, expected more than 0"):
        mixture.rows_until([None, 0, None])
    with pytest.raises(ValueError, match="2 limits for 3 corpora"):
        mixture.rows_until([1, 2])


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([0.5, 0.5, 0.0], "corpus 'c': weight = 0, expected more than 0"),
        ([0.7, -0.2, 0.5], "corpus 'b': weight = -0.2"),
        ([float("nan"), 0.5, 0.5], "corpus 'a': weight = nan"),
        ([0.5, 0.3, 0.1], "weights of a, b, c sum to 0.9, expected 1"),
        ([0.5, 0.3, 0.1995], "sum to 0.9995, expected 1"),
        ([0.5, 0.5], "2 weights for 3 corpora"),
    ],
)
def test_bad_weights(weights: list[float], message: str):
    with pytest.raises(ValueError, match=message):
        check_weights(["a", "b", "c"], weights)


def test_renormalize():
    np.testing.assert_allclose(check_weights(["a", "b"], [3, 1], renormalize=True), [0.75, 0.25])
    assert check_weights(["a", "b"], [0.5002, 0.5], renormalize=True).sum() == pytest.approx(1, abs=1e-15)


def test_weights_are_shares_of_tokens_not_of_padding(tmp_path: Path):
    """Documents that fill two thirds of a best-fit row, and short ones that fill it all but wholly."""
    folders = [write_corpus(tmp_path / "x", [[1] * 22] * 300), write_corpus(tmp_path / "y", [[2] * 3] * 3000)]
    streams = [BestFitRows(Corpus.open(folder), seq_len=32, seed=1) for folder in folders]
    mixture = Mixture(streams, [0.5, 0.5], seed=1)
    found = batch(mixture, 0, 2000)
    counts = [int((found["input"] == token).sum()) for token in (1, 2)]
    assert counts[0] / sum(counts) == pytest.approx(0.5, abs=0.002)


def test_bad_mixtures(corpora: list[Corpus]):
    with pytest.raises(ValueError, match="0 weights for 0 corpora"):
        Mixture([], [], seed=1)
    with pytest.raises(ValueError, match=r"need one seq_len, found \[8, 16\]"):
        Mixture([CorpusStream(corpora[0], seq_len=n, seed=1) for n in (8, 16)], [0.5, 0.5], seed=1)
    with pytest.raises(ValueError, match=r"corpus 'b': a weight below 1/100 is never drawn"):
        make_mixture(corpora, [0.9999, 0.0001], period=100)


def test_files_survive_in_worker_processes(corpora: list[Corpus], tmp_path: Path):
    class Rows(torch.utils.data.Dataset):
        def __init__(self, mixture: Mixture) -> None:
            self.mixture = mixture

        def __len__(self) -> int:
            return 4

        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            return batch(self.mixture, 2 * index, 2)

    mixture = make_mixture(corpora, [0.5, 0.3, 0.2])
    loader = torch.utils.data.DataLoader(Rows(mixture), batch_size=None, num_workers=2)
    for index, rows in enumerate(loader):
        assert torch.equal(rows["input"], batch(mixture, 2 * index, 2)["input"])

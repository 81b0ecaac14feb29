"""Jobs that read some clusters of a corpus: which documents, in which order, and every way in which it cannot be."""

import dataclasses
import json
import pickle
from pathlib import Path

import numpy as np
import pytest

from mobilellm_pro.data import row_assignment
from mobilellm_pro.data.best_fit import BestFitRows
from mobilellm_pro.data.clusters import FILE, read_clusters, write_clusters
from mobilellm_pro.data.document_limits import DocumentLimits
from mobilellm_pro.data.mixture import Mixture, batch
from mobilellm_pro.data.packing import CorpusStream
from mobilellm_pro.data.row_assignment import RowAssignment
from mobilellm_pro.data.shards import Corpus
from tests.data.shard_files import random_documents, write_corpus, write_labels_of
from tests.data.test_packing import check_rows, expected_stream

DOCUMENTS = random_documents(90, 40)
LABELS = np.random.default_rng(3).integers(0, 4, len(DOCUMENTS)).tolist()


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    folder = write_corpus(tmp_path / "a", DOCUMENTS, per_shard=20, vocab_size=1000)
    write_labels_of(folder, LABELS, 4)
    return Corpus.open(folder)


def chosen(clusters: tuple[int, ...], least: int = 0) -> list[list[int]]:
    """The documents, those that are left out empty."""
    return [ids if label in clusters and len(ids) >= least else [] for ids, label in zip(DOCUMENTS, LABELS)]


@pytest.mark.parametrize("clusters", [(2,), (3, 1), (0, 1, 2, 3)])
def test_a_stream_has_the_order_of_the_whole_corpus(corpus: Corpus, clusters: tuple[int, ...]):
    """With the documents of other clusters left out of it."""
    rows = CorpusStream(corpus, seq_len=50, seed=1, clusters=clusters)
    read = chosen(clusters)
    assert rows.num_tokens == sum(map(len, read))
    check_rows(rows, range(3 * rows.num_tokens // 50), *expected_stream(read, "a", 1, 5))


def test_clusters_and_limits_on_the_length(corpus: Corpus):
    rows = CorpusStream(
        corpus, seq_len=40, seed=1, clusters=[1, 2], min_document_tokens=15, max_document_tokens=22
    )  # fmt: skip
    read = [ids[:22] for ids in chosen((1, 2), least=15)]
    check_rows(rows, range(3 * rows.num_tokens // 40), *expected_stream(read, "a", 1, 5))
    content = corpus.clusters.content
    assert rows.options == f"min_document_tokens 15, max_document_tokens 22, clusters 1 2 of {content}"


@pytest.mark.parametrize("window", [16, 65_536])
def test_best_fit(corpus: Corpus, window: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(row_assignment, "WINDOW_DOCUMENTS", window)
    rows = BestFitRows(corpus, seq_len=63, seed=1, clusters=(0, 3))
    parts = [part.tolist() for index in range(int(rows.rows_per_epoch)) for part in rows.pieces(index).ids]
    assert sorted(parts) == sorted(ids for ids in chosen((0, 3)) if ids), "no document is longer than a row"
    assert rows.options == f"best_fit, clusters 0 3 of {corpus.clusters.content}"


def test_every_choice_and_every_clustering_has_an_assignment_of_its_own(corpus: Corpus):
    limits = [DocumentLimits(clusters=clusters) for clusters in (None, (1,), (1, 2))]
    files = [RowAssignment.of(corpus, 64, limit).files for limit in limits]
    assert len(set(files)) == 3 and RowAssignment.of(corpus, 64, DocumentLimits(clusters=(2, 1))).files == files[2]
    write_labels_of(corpus.folder, [3 - label for label in LABELS], 4)
    again = RowAssignment.of(Corpus.open(corpus.folder), 64, limits[1])
    assert again.files not in files and not files[1][0].exists(), "of other documents, and the old one is gone"
    assert files[0][0].exists() and files[2][0].exists()


def test_one_corpus_twice_is_the_whole_corpus(corpus: Corpus):
    """Two tables that share its clusters; in worker processes too."""
    mixture = Mixture(
        [CorpusStream(corpus, seq_len=30, seed=1, clusters=c) for c in ((0, 2), (1, 3))], [0.5, 0.5], seed=1
    )
    tokens = sum(stream.num_tokens for stream in mixture.streams)
    assert tokens == corpus.num_tokens
    copy = pickle.loads(pickle.dumps(mixture))
    assert np.array_equal(batch(copy, 5, 8)["input"], batch(mixture, 5, 8)["input"])
    assert mixture.identity.count(f" of {corpus.clusters.content})") == 2 and "(clusters 0 2 of" in mixture.identity
    numbers = [{n for i in range(9) for n in stream.pieces(i).documents} for stream in mixture.streams]
    assert not numbers[0] & numbers[1]


@pytest.mark.parametrize("rows", [CorpusStream, BestFitRows])
def test_what_is_recorded_changes_with_the_clustering(corpus: Corpus, rows: type):
    """A number alone would mean other documents."""
    before = rows(corpus, seq_len=20, seed=1, clusters=[1]).options
    assert rows(corpus, seq_len=20, seed=1, clusters=[2]).options != before
    write_labels_of(corpus.folder, LABELS[::-1], 4)
    assert rows(Corpus.open(corpus.folder), seq_len=20, seed=1, clusters=[1]).options != before


@pytest.mark.parametrize("rows", [CorpusStream, BestFitRows])
def test_choices_that_cannot_be(corpus: Corpus, rows: type, tmp_path: Path):
    options = {"seq_len": 20, "seed": 1}
    with pytest.raises(ValueError, match=r"a: no cluster 4, -1; clusters\.md there describes the clusters 0 to 3"):
        rows(corpus, clusters=[1, 4, -1], **options)
    for wrong in ([], [1, 1]):
        with pytest.raises(ValueError, match=r"clusters = .*: expected at least one number, each once"):
            rows(corpus, clusters=wrong, **options)
    least = sum(map(len, chosen((1,))))
    with pytest.raises(ValueError, match=rf"has {least} tokens in the clusters 1, fewer than .*: name more clusters"):
        rows(corpus, clusters=[1], seq_len=least, seed=1)
    plain = Corpus.open(write_corpus(tmp_path / "plain", DOCUMENTS, vocab_size=1000))
    with pytest.raises(ValueError, match=r"clusters\.json does not exist, .* run `prepare --cluster`, or leave"):
        rows(plain, clusters=[1], **options)


def test_damaged_and_foreign_clusters(corpus: Corpus):
    folder, record = corpus.folder, read_clusters(corpus.folder)
    assert record is not None
    labels = folder / record.files["train"]["name"]
    whole = labels.read_bytes()
    labels.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ValueError, match=r"\.npy: damaged \(its sha256 is not the recorded one\): run `prepare --clus"):
        Corpus.open(folder).clusters  # noqa: B018
    assert Corpus.open(folder, check_index=False).clusters.number == 4, "preflight has looked at every byte"
    labels.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=r"\.npy: damaged"):
        Corpus.open(folder, check_index=False).clusters  # noqa: B018
    labels.unlink()
    with pytest.raises(ValueError, match=r"\.npy: damaged \(.*No such file"):
        Corpus.open(folder).clusters  # noqa: B018
    write_clusters(folder, dataclasses.replace(record, corpus={"train": "0" * 8}))
    with pytest.raises(ValueError, match=r"made for other documents than the split 'train' holds now: run `prepare"):
        Corpus.open(folder).clusters  # noqa: B018
    (folder / FILE).write_text(json.dumps({"version": 7}))
    with pytest.raises(ValueError, match="version 7, expected 1: run `prepare --cluster --overwrite`"):
        Corpus.open(folder).clusters  # noqa: B018
    (folder / FILE).write_text("{")
    with pytest.raises(ValueError, match=r"clusters\.json: not a record of clusters"):
        Corpus.open(folder).clusters  # noqa: B018

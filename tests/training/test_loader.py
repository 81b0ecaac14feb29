"""The loader: what is in step k is a function of (seed, k), however the work is divided and however often it stops."""

import hashlib
from pathlib import Path

import numpy as np
import pytest

from mobilellm_pro.config.job_config import Data, Dataset, JobConfig
from mobilellm_pro.data.mixture import Mixture
from mobilellm_pro.data.shards import Corpus
from mobilellm_pro.training.loader import MixtureLoader, last_step, open_mixture
from mobilellm_pro.training.run_folder import describe_data
from tests.data.shard_files import write_labels_of
from tests.data.synthetic import DEBUG_TOKENIZER, make_corpora

ROWS = 24  # of a global step
STEPS = 21


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    folders = make_corpora(tmp_path_factory.mktemp("loader"), ("a", "b"), documents=300)
    datasets = [Dataset("a", str(folders["a"]), 0.7), Dataset("b", str(folders["b"]), 0.3)]
    return Data(tokenizer=str(DEBUG_TOKENIZER), datasets=datasets, seed=5)


def steps_read(mixture: Mixture, ranks: int, *, workers: int = 0, restart: int = STEPS, rows: int = ROWS) -> list[str]:
    """A hash of all tensors of each global step of ROWS rows, in the order of ranks and micro-batches.

    Args:
        mixture: what is read.
        ranks: loaders side by side.
        workers: processes of each.
        restart: steps after which all loaders are made anew from their states.
        rows: of a micro-batch of all ranks together.
    """
    hashes: list[str] = []
    states: list[dict] = []
    while len(hashes) < STEPS:
        loaders = [MixtureLoader(mixture, rows // ranks, rank, ranks, num_workers=workers) for rank in range(ranks)]
        for loader, state in zip(loaders, states, strict=False):
            loader.load_state_dict(state)
        iterators = [iter(loader) for loader in loaders]
        for _ in range(min(restart, STEPS - len(hashes))):
            digest = hashlib.sha256()
            for _ in range(ROWS // rows):
                for inputs, labels in map(next, iterators):
                    for row in range(len(labels)):
                        for tensor in (inputs["input"], labels, inputs["document_ids"], inputs["corpus"]):
                            digest.update(tensor[row].numpy().tobytes())
            hashes.append(digest.hexdigest())
        states = [loader.state_dict() for loader in loaders]
    return hashes


@pytest.mark.parametrize("packing", ["stream", "best_fit"])
def test_steps_are_the_same_on_any_number_of_ranks(data: Data, packing: str) -> None:
    settings = Data(**{**data.__dict__, "packing": packing})
    expected = steps_read(open_mixture(settings, "train", 64), 1)
    assert len(set(expected)) == STEPS
    for ranks in (2, 3, 4, 8):
        assert steps_read(open_mixture(settings, "train", 64), ranks) == expected


@pytest.mark.parametrize("packing", ["stream", "best_fit"])
def test_long_documents_only(data: Data, packing: str) -> None:
    """Fewer documents, by the same rules; what is left out is named wherever a mixture is recorded."""
    settings = Data(**{**data.__dict__, "packing": packing, "min_document_tokens": 40, "max_document_tokens": 45})
    mixture = open_mixture(settings, "train", 64)
    expected = steps_read(mixture, 1)
    assert expected != steps_read(open_mixture(Data(**{**data.__dict__, "packing": packing}), "train", 64), 1)
    assert steps_read(open_mixture(settings, "train", 64), 3, workers=2, restart=7, rows=12) == expected
    shortest, longest = (float("inf"), 0)
    for stream in mixture.streams:
        for index in range(int(stream.rows_per_epoch)):
            corpus, pieces = stream.corpus, stream.pieces(index)
            lengths = [int(corpus.lengths(number, number + 1)[0]) for number in pieces.documents]
            shortest, longest = min(shortest, *lengths), max(longest, *map(len, pieces.ids))
    assert shortest >= 40 and longest == 45
    described = describe_data(JobConfig(data=settings), mixture)["identity"]
    assert described == mixture.identity and described.count("min_document_tokens 40, max_document_tokens 45") == 2


@pytest.mark.parametrize("packing", ["stream", "best_fit"])
def test_some_clusters_only(data: Data, packing: str) -> None:
    """One corpus under two names; whatever records or resumes a mixture knows its clusters."""
    (folder,) = {dataset.path for dataset in data.datasets if dataset.name == "a"}
    labels = np.arange(Corpus.open(folder).num_documents) % 3
    write_labels_of(Path(folder), labels.tolist(), 3)
    datasets = [Dataset("first", folder, 0.5, clusters=[0, 2]), Dataset("second", folder, 0.5, clusters=[1])]
    settings = Data(**{**data.__dict__, "packing": packing, "datasets": datasets})
    mixture = open_mixture(settings, "train", 64)
    read = [{n for row in range(30) for n in stream.pieces(row).documents} for stream in mixture.streams]
    assert set(labels[list(read[0])]) == {0, 2} and set(labels[list(read[1])]) == {1}
    expected = steps_read(mixture, 1)
    assert steps_read(open_mixture(settings, "train", 64), 3, workers=2, restart=7, rows=12) == expected
    described = describe_data(JobConfig(data=settings), mixture)
    assert [corpus["clusters"] for corpus in described["corpora"]] == [[0, 2], [1]]
    assert "clusters 0 2 of" in described["identity"]
    state = MixtureLoader(mixture, 4, 0, 2).state_dict()
    datasets[1] = Dataset("second", folder, 0.5, clusters=[1, 2])
    changed = MixtureLoader(open_mixture(settings, "train", 64), 4, 0, 2)
    with pytest.raises(ValueError, match=r"data were .*clusters 1 of .*the configuration's are .*clusters 1 2 of"):
        changed.load_state_dict(state)


def test_epochs_count_what_is_read(data: Data) -> None:
    """A pass over the long documents alone ends sooner."""
    long = open_mixture(Data(**{**data.__dict__, "min_document_tokens": 60}), "train", 64)
    for stream in long.streams:
        lengths = stream.corpus.lengths(0, stream.corpus.num_documents)
        assert stream.rows_per_epoch * 64 == lengths[lengths >= 60].sum() < stream.corpus.num_tokens
    limits = [1.0, None]
    assert last_step(long, limits, ROWS, 10_000) < last_step(open_mixture(data, "train", 64), limits, ROWS, 10_000)


@pytest.mark.parametrize(
    ("ranks", "workers", "restart", "rows"), [(1, 2, 7, 24), (2, 2, 7, 12), (3, 0, 7, 6), (2, 0, 1, 4)]
)
def test_workers_restarts_and_accumulation_change_nothing(
    data: Data, ranks: int, workers: int, restart: int, rows: int
) -> None:
    mixture = open_mixture(data, "train", 64)
    assert steps_read(mixture, ranks, workers=workers, restart=restart, rows=rows) == steps_read(mixture, 1)


def test_state_is_a_few_integers(data: Data) -> None:
    loader = MixtureLoader(open_mixture(data, "train", 64), 4, 0, 2)
    rows = iter(loader)
    next(rows), next(rows)
    state = loader.state_dict()
    assert state["next_sequence"] == 16 and set(state) == {"next_sequence", "rows_per_step", "mixture"}
    with pytest.raises(ValueError, match="steps have 8 rows, the configuration's 10"):
        MixtureLoader(open_mixture(data, "train", 64), 5, 0, 2).load_state_dict(state)
    other = MixtureLoader(open_mixture(data, "train", 64), 5, 0, 2, rows_per_step=8)
    other.load_state_dict(state)
    with pytest.raises(ValueError, match="cannot resume at sequence 16 with 2 data-parallel ranks of 5 rows"):
        next(iter(other))
    for limit in ("max_document_tokens", "min_document_tokens"):
        changed = MixtureLoader(open_mixture(Data(**{**data.__dict__, limit: 9}), "train", 64), 4, 0, 2)
        with pytest.raises(ValueError, match=rf"the configuration's are .*{limit} 9.*: restore them"):
            changed.load_state_dict(state)


def test_epochs_are_counted_and_limited(data: Data) -> None:
    mixture = open_mixture(data, "train", 64)
    tokens = {stream.corpus.name: stream.corpus.num_tokens for stream in mixture.streams}
    loader = MixtureLoader(mixture, 10, 0, 1, rows_per_step=20, max_epochs=[None, 1.0])
    last = loader.last_step(10_000)
    assert loader.last_step(3) == 3
    loader.next_sequence = 20 * last
    consumed = loader.consumed()
    assert consumed["tokens/b"] <= tokens["b"] < consumed["tokens/b"] + 20 * 64
    assert consumed["epochs/b"] == pytest.approx(consumed["tokens/b"] / tokens["b"], abs=1e-6)
    assert MixtureLoader(mixture, 10, 0, 1, max_epochs=[None, None]).last_step(10_000) == 10_000


def test_held_out_documents_are_in_no_training_row(data: Data, tmp_path: Path) -> None:
    def documents(split: str) -> set[bytes]:
        found = set()
        for stream in open_mixture(data, split, 64).streams:
            corpus = stream.corpus
            lengths = corpus.lengths(0, corpus.num_documents)
            found |= {corpus.tokens(i, 0, int(n)).tobytes() for i, n in enumerate(lengths)}
        return found

    assert documents("valid") and not documents("valid") & documents("train")

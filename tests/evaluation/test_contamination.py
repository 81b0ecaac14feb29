"""Overlaps of an evaluation with the training text: exactly those that sets of tuples find, and what is reported."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mobilellm_pro.data.shard_index import write_index
from mobilellm_pro.data.shards import Corpus
from mobilellm_pro.data.tokenizer import Tokenizer
from mobilellm_pro.evaluation import contamination as module
from mobilellm_pro.evaluation.contamination import NgramIndex, contamination, corpus_blocks, ngram_hashes
from tests.data.shard_files import random_documents, write_corpus
from tests.data.synthetic import DEBUG_TOKENIZER, make_corpora
from tests.evaluation.test_comparison import read_samples, write_evaluation, write_samples

TOKENIZER = Tokenizer.load(str(DEBUG_TOKENIZER))
IDS = st.lists(st.integers(0, 2), max_size=12)


def ngrams(ids: list[int], ngram: int) -> list[tuple[int, ...]]:
    return [tuple(ids[start : start + ngram]) for start in range(len(ids) - ngram + 1)]


def expected(documents: list[list[int]], corpus: list[list[int]], ngram: int) -> dict[int, int]:
    """Document -> the start of its first n-gram that some document of the corpus has."""
    trained = {one for ids in corpus for one in ngrams(ids, ngram)}
    found = {number: [start for start, one in enumerate(ngrams(ids, ngram)) if one in trained]
             for number, ids in enumerate(documents)}  # fmt: skip
    return {number: starts[0] for number, starts in found.items() if starts}


def arrays(documents: list[list[int]]) -> list[np.ndarray]:
    return [np.array(ids, dtype=np.int32) for ids in documents]


@given(
    documents=st.lists(IDS, min_size=1, max_size=6),
    corpus=st.lists(IDS, min_size=1, max_size=6).filter(any),
    ngram=st.integers(1, 7),
    block=st.integers(1, 20),
    weak=st.booleans(),
    dtype=st.sampled_from(["int32", "uint16"]),
)
@settings(max_examples=150, deadline=None)
def test_it_finds_what_sets_of_tuples_find(
    tmp_path_factory: pytest.TempPathFactory, documents: list[list[int]], corpus: list[list[int]], ngram: int,
    block: int, weak: bool, dtype: str,
) -> None:  # fmt: skip
    """Also where blocks are smaller than documents, and where the hash is of the last token only (many are equal)."""
    folder = write_corpus(tmp_path_factory.mktemp("corpus") / "c", corpus, dtype=dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_BLOCK_TOKENS", block)
        patch.setattr(module, "_CHUNK_DOCUMENTS", 3)
        patch.setattr(module, "_BITS", (4, 30))
        if weak:
            patch.setattr(module, "_BASE", 0)
        found = NgramIndex(arrays(documents), ngram).search(Corpus.open(folder, "train"))
    assert found == expected(documents, corpus, ngram)


@given(st.lists(st.integers(0, 2**18), max_size=40), st.integers(1, 17))
@settings(max_examples=60, deadline=None)
def test_hashes_are_the_polynomial(ids: list[int], ngram: int) -> None:
    sums = [
        sum(one * module._FACTOR * pow(module._BASE, ngram - 1 - place) for place, one in enumerate(window)) % 2**64
        for window in ngrams(ids, ngram)
    ]
    found = ngram_hashes(np.array(ids, dtype=np.int32), ngram)
    assert found.dtype == np.uint64 and found.tolist() == sums


def test_many_documents_with_long_ngrams(tmp_path: Path) -> None:
    """A few quotations of 13 tokens and more among random text, some of them across a border of documents."""
    corpus = random_documents(400, 60, vocab_size=5000)
    documents = random_documents(200, 40, seed=1, vocab_size=5000)
    long = [ids for ids in corpus if len(ids) > 20]
    documents[10] += long[0][3:16]
    documents[11] += long[1][:12]  # one too few
    documents[12] = long[2][-8:] + corpus[corpus.index(long[2]) + 1][:8]
    documents[13] = documents[10][:]
    found = NgramIndex(arrays(documents), 13).search(
        Corpus.open(write_corpus(tmp_path / "c", corpus, per_shard=50, vocab_size=5000))
    )
    assert found == expected(documents, corpus, 13) and {10, 13} <= found.keys() and not {11, 12} & found.keys()


def test_documents_that_do_not_follow_one_another(tmp_path: Path) -> None:
    """An index may skip text of its file and change the order: what it leaves out is not there."""
    folder = write_corpus(tmp_path / "c", [[1, 2, 3, 4], [5, 6, 7, 8]])
    index = folder / "train-00000.idx"
    write_index(index, np.array([3, 2], dtype=np.int32), starts=np.array([5, 0]))
    corpus = Corpus.open(folder, check_index=False)
    blocks = [(ids.tolist(), ends.tolist()) for ids, ends in corpus_blocks(corpus, 2)]
    assert blocks == [([6, 7, 8, 1, 2], [3, 5])]
    assert NgramIndex(arrays([[8, 1], [6, 7], [2, 3], [1, 2]]), 2).search(corpus) == {1: 0, 3: 0}


def test_blocks_hold_whole_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BLOCK_TOKENS", 4)
    corpus = Corpus.open(write_corpus(tmp_path / "c", [[1, 2], [3, 4], [], [5], [0, 1, 2, 3, 4, 5, 6, 7, 8]]))
    blocks = [(ids.tolist(), ends.tolist()) for ids, ends in corpus_blocks(corpus, 3)]
    assert blocks == [
        ([1, 2, 3, 4], [2, 4, 4]),
        ([5], [1]),
        ([0, 1, 2, 3, 4, 5], [6]),
        ([4, 5, 6, 7, 8], [5]),
        ([8], [1]),
    ]


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_corpora(tmp_path_factory.mktemp("corpora"), ("a", "b"), documents=60)


def first_text(folder: Path) -> str:
    """The longest training document, without bos and eos."""
    corpus = Corpus.open(folder)
    number = int(corpus.lengths(0, corpus.num_documents).argmax())
    return TOKENIZER.decode(corpus.tokens(number, 1, int(corpus.lengths(number, number + 1)[0]) - 1))


@pytest.fixture
def evaluation(tmp_path: Path, corpora: dict[str, Path]) -> Path:
    """Two columns; of hellaswag a document is of corpus a, one of both, one too short, and three are clean."""
    folder = write_evaluation(tmp_path / "run", {"hellaswag": [1.0, 1.0, 0.0, 1.0, 0.0, 0.0], "boolq": [1.0, 0.0]})
    clean = "Nothing in those corpora speaks about whales, sailors, harpoons or the sea; this does, at some length."
    ours, theirs = first_text(corpora["a"]), first_text(corpora["b"])
    for key, texts in {
        "hellaswag": [f"{clean} {ours}", f"{theirs}\n{clean}\n{ours}", "Too short", clean, clean, clean[8:]],
        "boolq": ["No", clean],
    }.items():
        lines = read_samples(folder, key)
        write_samples(folder, key, [line | {"text": text} for line, text in zip(lines, texts, strict=True)])
    return folder


def test_the_report(evaluation: Path, corpora: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    record = contamination(evaluation, corpora, TOKENIZER)
    assert json.loads((evaluation / "contamination.json").read_text()) == record
    hellaswag, boolq = record["columns"]["hellaswag"], record["columns"]["boolq"]
    counts = ("documents", "too_short", "overlapping", "share", "corpora")
    assert [hellaswag[key] for key in counts] == [6, 1, 2, 0.4, {"a": 2, "b": 1}]
    assert [boolq[key] for key in counts] == [2, 1, 0, 0.0, {"a": 0, "b": 0}]
    scores = {name: (one["documents"], one["score"]) for name, one in hellaswag["scores"].items()}
    assert scores == {"all": (6, 0.5), "clean": (3, pytest.approx(1 / 3)), "overlapping": (2, 1.0)}
    assert boolq["scores"]["overlapping"] == {"documents": 0, "score": None, "stderr": None}
    examples = [(one["task"], one["doc_id"], one["corpus"]) for one in hellaswag["examples"]]
    assert examples == [("hellaswag_0", 0, "a"), ("hellaswag_1", 0, "a")]
    assert all(one["text"] in first_text(corpora["a"]) for one in hellaswag["examples"])
    assert all(len(TOKENIZER.encode(one["text"])) >= 13 for one in hellaswag["examples"])
    assert record["corpora"]["a"]["tokens"] == Corpus.open(corpora["a"]).num_tokens
    markdown, printed = (evaluation / "contamination.md").read_text(), capsys.readouterr().out
    row = "| HellaSwag | acc,none | 6 | 1 | 2 | 40.00 | a 2, b 1 | 50.00 ± 22.36 | 33.33 ± 33.33 | 100.00 ± 0.00 |"
    assert row in markdown and row in printed and "## Examples" in markdown and "## Examples" not in printed
    assert "| BoolQ | acc,none | 2 | 1 | 0 | 0.00 | – | 50.00 ± 50.00 | 0.00 | – |" in markdown


def test_other_lengths_and_another_folder(evaluation: Path, corpora: dict[str, Path], tmp_path: Path) -> None:
    """Nothing is long enough for the one, nothing too short for the other; not more examples than fit a page."""
    record = contamination(evaluation, corpora, TOKENIZER, ngram=500, output=tmp_path / "out")
    assert {one["too_short"] for one in record["columns"].values()} == {6, 2}
    assert (
        record["columns"]["boolq"]["share"] is None and record["columns"]["boolq"]["scores"]["clean"]["score"] is None
    )
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["contamination.json", "contamination.md"]
    assert not (evaluation / "contamination.json").exists()
    record = contamination(evaluation, {"a": corpora["a"]}, TOKENIZER, ngram=1)
    assert record["columns"]["hellaswag"]["too_short"] == 0 and len(record["columns"]["hellaswag"]["examples"]) <= 5


def test_mistakes_are_named(evaluation: Path, corpora: dict[str, Path], tmp_path: Path) -> None:
    def fails(message: str, found: dict[str, Path] = corpora, **more: Any) -> None:
        with pytest.raises(ValueError, match=message):
            contamination(evaluation, found, TOKENIZER, **more)

    fails("ngram = 0: expected at least 1", ngram=0)
    fails("corpora: none, expected at least one", {})
    other = write_corpus(tmp_path / "other", [[1, 2]])
    fails("other: made with the tokenizer t.model .*, the tokenizer in use is another one", {"other": other})
    with pytest.raises(FileNotFoundError, match="manifest.json does not exist"):
        contamination(evaluation, {"a": tmp_path}, TOKENIZER)
    lines = read_samples(evaluation, "boolq")
    write_samples(evaluation, "boolq", [lines[0], {key: lines[1][key] for key in lines[1] if key != "text"}])
    fails("boolq.jsonl, line 2: text = None, expected str")
    assert not (evaluation / "contamination.json").exists()

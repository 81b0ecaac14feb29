"""`prepare --cluster`: planted subjects are found, in the same way every time, and every mistake is named."""

import json
import random
from pathlib import Path

import numpy as np
import pytest

from mobilellm_pro.data import cluster_assignment, cluster_features, clustering
from mobilellm_pro.data.cluster_config import ClusterConfig
from mobilellm_pro.data.cluster_features import EncoderAverage, HashedTfidf
from mobilellm_pro.data.clusters import FILE, REPORT, read_clusters
from mobilellm_pro.data.inspection import inspect
from mobilellm_pro.data.prepare import prepare
from mobilellm_pro.data.shards import Corpus
from mobilellm_pro.data.tokenizer import Tokenizer
from tests.data.synthetic import DEBUG_TOKENIZER, write_text, write_toml

SUBJECTS = {
    "kitchen": "onion pepper butter flour oven spoon kettle bread".split(),
    "sea": "harbour anchor sailor compass wave island storm lighthouse".split(),
    "court": "judge witness verdict lawyer appeal prison statute evidence".split(),
}
TOKENIZER = Tokenizer.load(str(DEBUG_TOKENIZER))
COUNTS = {"kitchen": 90, "sea": 60, "court": 40}
WORDS = "the of and with it was there every".split()


def write_subjects(folder: Path, **settings: object) -> Path:
    """A datasets.toml of one corpus, sorted by subject; every document tells its own first."""
    texts = {}
    for subject, words in SUBJECTS.items():
        for number in range(COUNTS[subject]):
            rng = random.Random(f"{subject}{number}")
            some = [rng.choice(words if rng.random() < 0.5 else WORDS) for _ in range(rng.randint(15, 60))]
            texts[f"{subject}{number}"] = " ".join([subject, *some])
    write_text(folder, texts)
    return write_toml(folder, ("a",), holdout=0.2, dev=0.1, **{"clusters": 3, **settings})


def with_cluster(toml: Path, **settings: object) -> Path:
    lines = "".join(f"{key} = {json.dumps(value)}\n" for key, value in settings.items())
    toml.write_text(toml.read_text().partition("\n[cluster]\n")[0] + f"\n[cluster]\n{lines}")
    return toml


def found_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("clusters*"))}


def subject_of(corpus: Corpus, document: int) -> str:
    ids = corpus.tokens(document, 1, int(corpus.lengths(document, document + 1)[0]))
    return TOKENIZER.decode(ids).split()[0]


@pytest.mark.parametrize("settings", [{}, {"dimensions": 0}, {"batch_documents": 10, "fit_documents": 80, "seed": 3}])
def test_planted_subjects(tmp_path: Path, settings: dict[str, int]):
    """Each is a cluster of its own in every split; the largest is number 0; its words describe it."""
    prepare(with_cluster(write_subjects(tmp_path), **settings), workers=0, cluster=True)
    folder = tmp_path / "tokens/a"
    names, record = list(SUBJECTS), read_clusters(folder)
    assert record is not None
    for split in ("train", "valid", "dev"):
        corpus = Corpus.open(folder, split)
        for document in range(corpus.num_documents):
            assert names[corpus.clusters.labels[document]] == subject_of(corpus, document)
        sizes = np.bincount(corpus.clusters.labels, weights=corpus.lengths(0, corpus.num_documents), minlength=3)
        assert [cluster.tokens[split] for cluster in record.clusters] == sizes.tolist()
        assert sum(cluster.documents[split] for cluster in record.clusters) == corpus.num_documents
    for cluster, name in zip(record.clusters, names, strict=True):
        assert set(cluster.terms[:6]) <= {name, *SUBJECTS[name]} and len(cluster.examples) == 3
        assert all(example.startswith(name) for example in cluster.examples)
    report = (folder / REPORT).read_text()
    assert report.count("## Cluster") == 3 and f"| 0 | {record.clusters[0].documents['train']} |" in report


def test_the_same_clusters_from_any_number_of_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "one").mkdir(), (tmp_path / "two").mkdir()
    prepare(write_subjects(tmp_path / "one"), workers=0, cluster=True)
    monkeypatch.setattr(cluster_assignment, "_LEAST_DOCUMENTS", 1)
    prepare(write_subjects(tmp_path / "two"), workers=0)
    prepare(tmp_path / "two/datasets.toml", workers=2, cluster=True)
    files = found_files(tmp_path / "one/tokens/a")
    assert len(files) == 5 and found_files(tmp_path / "two/tokens/a") == files


def test_killed_before_the_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """No clusters are there then, and the next run makes the same ones."""
    toml, folder = write_subjects(tmp_path), tmp_path / "tokens/a"
    with monkeypatch.context() as patch:
        patch.setattr(clustering, "write_clusters", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            prepare(toml, workers=0, cluster=True)
    assert list(folder.glob("clusters-*.npy")) and read_clusters(folder) is None
    prepare(toml, workers=0, cluster=True)
    files = found_files(folder)
    (folder / FILE).unlink()
    (folder / "clusters-train-00000000.npy").write_bytes(b"of another clustering")
    prepare(toml, workers=0, cluster=True)
    assert found_files(folder) == files


def test_what_is_done_stays(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    toml, folder = write_subjects(tmp_path), tmp_path / "tokens/a"
    prepare(toml, workers=0)
    assert not found_files(folder), "only where it is asked for"
    prepare(toml, workers=0, cluster=True)
    before = (folder / FILE).stat().st_mtime_ns
    (folder / REPORT).unlink()
    prepare(toml, workers=0, cluster=True)
    assert (folder / FILE).stat().st_mtime_ns == before and (folder / REPORT).exists()
    assert "already clustered: 3 clusters of" in capsys.readouterr().out
    prepare(write_subjects(tmp_path, clusters=5), workers=0)  # the corpus is the same; clusters were not asked for
    inspect(folder)
    assert "3 clusters of" in capsys.readouterr().out


def test_other_settings_are_refused_by_name(tmp_path: Path):
    toml, folder = write_subjects(tmp_path), tmp_path / "tokens/a"
    prepare(toml, workers=0, cluster=True)
    with_cluster(write_subjects(tmp_path, clusters=2), seed=5)
    with pytest.raises(ValueError, match=r"clustered differently: clusters was 3, now 2; seed was 1, now 5\. Restore"):
        prepare(toml, workers=0, cluster=True)
    prepare(toml, workers=0, cluster=True, overwrite=True)
    record = read_clusters(folder)
    assert record is not None and len(record.clusters) == 2
    assert len(list(folder.glob("clusters-*.npy"))) == 3, "those of before are gone"
    prepare(write_subjects(tmp_path, clusters=2, min_chars=2), workers=0, overwrite=True)
    assert not found_files(folder), "a corpus that is made afresh has none"


def test_what_cannot_be_clustered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(ValueError, match=r"cluster\.features = 'absent': expected \"tfidf\", or a folder"):
        prepare(with_cluster(write_subjects(tmp_path), features="absent"), workers=0, cluster=True)
    assert not (tmp_path / "tokens").exists(), "found before any work"
    with pytest.raises(ValueError, match=r"a: 1\d\d training documents, too few for 150 clusters: lower `clusters`"):
        prepare(write_subjects(tmp_path, clusters=150), workers=0, cluster=True)
    monkeypatch.setattr(cluster_features, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs scikit-learn: pip install 'mobilellm-pro\[mix\]'"):
        prepare(write_subjects(tmp_path), workers=0, cluster=True)
    prepare(write_subjects(tmp_path, clusters=0), workers=0, cluster=True)
    assert "nothing to cluster: no [[dataset]] says how many `clusters`" in capsys.readouterr().out


def test_hashed_tfidf_is_its_definition():
    texts = ["Ann saw the the cat", "the cat and the dog", "the dog saw Bob", "the the the", "lonely", ""]
    features = HashedTfidf(2**20, normalize=False)
    features.learn(texts[:3])
    features.learn(texts[3:])
    words = [text.lower().split() for text in texts]
    holding = {word: sum(word in text for text in words) for text in words for word in text}
    for row, text in zip(features.points(texts).toarray(), words, strict=True):
        expected = [
            (1 + np.log(text.count(word))) * np.log(7 / (1 + holding[word])) for word in set(text) if holding[word] > 1
        ]
        np.testing.assert_allclose(sorted(row[row != 0]), sorted(expected), rtol=1e-6)
    scaled = HashedTfidf(2**20, normalize=True)
    scaled.learn(texts)
    np.testing.assert_allclose(np.linalg.norm(scaled.points(texts).toarray(), axis=1), [1, 1, 1, 1, 0, 0], rtol=1e-6)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT with random weights, whose tokens are the words of the subjects."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("encoder")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *SUBJECTS, *WORDS, *sum(SUBJECTS.values(), [])]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    transformers.BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    config = transformers.BertConfig(
        vocab_size=len(words), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=48,
    )  # fmt: skip
    import torch

    torch.manual_seed(0)
    transformers.BertModel(config).save_pretrained(folder)
    return folder


def test_an_encoder_averages_over_the_tokens_of_a_document(encoder: Path):
    """Neither padding nor the documents beside it change a point; a document that is too long is cut."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    texts = ["sea storm", "kitchen " + "onion butter " * 40, "court judge witness and the verdict", ""] * 10
    points = EncoderAverage(str(encoder), document_tokens=512, normalize=False).points(texts)
    model, tokenizer = AutoModel.from_pretrained(encoder).eval(), AutoTokenizer.from_pretrained(encoder)
    for text, point in zip(texts[:4], points):
        with torch.no_grad():
            ids = tokenizer(text, return_tensors="pt", truncation=True, max_length=48)
            expected = model(**ids).last_hidden_state[0].mean(0)
        np.testing.assert_allclose(point, expected, atol=1e-5)
    scaled = EncoderAverage(str(encoder), document_tokens=512, normalize=True).points(texts)
    np.testing.assert_allclose(scaled, points / np.linalg.norm(points, axis=1, keepdims=True), atol=1e-6)


def test_clusters_of_an_encoder(encoder: Path, tmp_path: Path):
    toml, folder = with_cluster(write_subjects(tmp_path), features=str(encoder)), tmp_path / "tokens/a"
    prepare(toml, workers=0, cluster=True)
    record, corpus = read_clusters(folder), Corpus.open(folder)
    assert record is not None and "hash_features" not in record.settings and len(record.settings["encoder"]) == 12
    subjects = np.array([list(SUBJECTS).index(subject_of(corpus, d)) for d in range(corpus.num_documents)])
    assert np.mean(subjects == corpus.clusters.labels) > 0.9
    for file in encoder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "vocab.txt").write_text((encoder / "vocab.txt").read_text() + "more\n")
    with_cluster(toml, features=str(tmp_path))
    with pytest.raises(ValueError, match=r"encoder was '\w+', now '\w+'; features was"):
        prepare(toml, workers=0, cluster=True)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"cluster\.features = .*: transformers cannot load it"):
        EncoderAverage(str(tmp_path), document_tokens=9, normalize=True)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"passes": 0}, "cluster.passes: expected at least 1, found 0"),
        ({"seed": -1}, "cluster.seed: expected 0 to"),
        ({"features": ""}, "cluster.features: expected"),
        ({"passes": 1.5}, "cluster.passes: expected int, found 1.5"),
        ({"pases": 1}, "cluster.pases: unknown key; did you mean 'passes'?"),
        ({"batch_documents": 2}, r"dataset\[0\].clusters: more than cluster.batch_documents = 2"),
        ({"fit_documents": 2}, r"dataset\[0\].clusters: more than cluster.fit_documents = 2"),
    ],
)
def test_bad_settings(tmp_path: Path, keys: dict[str, object], message: str):
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        prepare(with_cluster(write_subjects(tmp_path), **keys), workers=0, cluster=True)


def test_settings_are_json_values():
    assert json.loads(json.dumps(ClusterConfig().settings(4)))["clusters"] == 4

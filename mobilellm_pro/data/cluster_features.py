"""Documents as points, so that those about one subject lie close together: hashed TF-IDF, or an encoder's average.

Both see the text of a document that is decoded from its tokens, so that corpora of other programs can be clustered too.

TF-IDF: a word (two or more word characters, in lower case) is hashed to one of `hash_features` places; no vocabulary is
held. Place w of a document that holds it n times gets (1 + ln n) * idf(w), with idf(w) = ln((1 + N) / (1 + df(w))) and
df(w) the documents of N that hold it: a word of all documents weighs nothing, in whatever language. A place that only
one document uses is left out, as it says nothing about others. Then follows latent semantic analysis (Deerwester et
al., 1990): a projection to the strongest directions of a sample, in which words that occur together lie together.
Without it k-means puts most documents into one cluster.
"""

import hashlib
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from mobilellm_pro.data.cluster_config import TFIDF, ClusterConfig
from mobilellm_pro.data.manifest import file_sha256
from mobilellm_pro.data.shards import Corpus
from mobilellm_pro.data.tokenizer import Tokenizer

_ENCODER_BATCH = 32  # documents in an encoder at a time
_INSTALL = "pip install 'mobilellm-pro[{}]'"


class Features(Protocol):
    """How documents become points."""

    must_learn: bool
    """Whether all documents of a pass must be shown to `learn` first."""

    in_processes: bool
    """Whether copies in several processes are of use."""

    def learn(self, texts: list[str]) -> None:
        """Counts what the points depend on."""

    def settle(self, sample: list[str]) -> None:
        """Learns from a sample what needs one, after all `learn` and before any `points`."""

    def points(self, texts: list[str]) -> Any:
        """float32 [texts, features], dense or in scipy's CSR format."""


def document_text(corpus: Corpus, document: int, most: int, tokenizer: Tokenizer) -> str:
    """What the first `most` tokens of a document say, special tokens left out."""
    length = int(corpus.lengths(document, document + 1)[0])
    ids = corpus.tokens(document, 0, min(length, most))
    return tokenizer.decode(ids[ids < len(tokenizer.ranks)].tolist())


def features_problem(config: ClusterConfig) -> str:
    """What keeps these features from being computed here, with the cure; "" for nothing."""
    if find_spec("sklearn") is None:
        return f"prepare --cluster needs scikit-learn: {_INSTALL.format('mix')}"
    if config.features == TFIDF:
        return ""
    if not (Path(config.features) / "config.json").is_file():
        return (
            f'cluster.features = {config.features!r}: expected "{TFIDF}", or a folder with config.json, weights and '
            "tokenizer of a Hugging Face encoder"
        )
    if find_spec("transformers") is None:
        return f"cluster.features = {config.features!r}: an encoder needs transformers: {_INSTALL.format('hf')}"
    return ""


def features_identity(config: ClusterConfig) -> dict[str, str]:
    """{"encoder": a digest of its files}, nothing without one."""
    if config.features == TFIDF:
        return {}
    files = sorted(path for path in Path(config.features).iterdir() if path.is_file() and path.name[0] != ".")
    digests = "".join(f"{path.name} {file_sha256(path)}\n" for path in files)
    return {"encoder": hashlib.sha256(digests.encode()).hexdigest()[:12]}


def make_features(config: ClusterConfig) -> Features:
    """The features of a configuration that `features_problem` has nothing to say about."""
    if config.features == TFIDF:
        sizes = {"dimensions": config.dimensions, "seed": config.seed}
        return HashedTfidf(config.hash_features, normalize=config.normalize, **sizes)
    return EncoderAverage(config.features, document_tokens=config.document_tokens, normalize=config.normalize)


class HashedTfidf:
    """TF-IDF over hashed words; memory does not grow with the corpus."""

    must_learn, in_processes = True, True

    def __init__(self, num_features: int, *, normalize: bool, dimensions: int = 0, seed: int = 0) -> None:
        """
        Args:
            num_features: places.
            normalize: scale every document to length 1.
            dimensions: of the projection; 0: none.
            seed: of the start of its computation.
        """
        from sklearn.feature_extraction.text import HashingVectorizer

        self._words = HashingVectorizer(n_features=num_features, alternate_sign=False, norm=None, dtype=np.float32)
        self._normalize, self._num_documents = normalize, 0
        self._document_counts = np.zeros(num_features, dtype=np.int64)
        self._dimensions, self._seed = dimensions, seed
        self._directions: np.ndarray | None = None  # float32 [places, dimensions]

    def learn(self, texts: list[str]) -> None:
        """Adds to the number of documents that use each place."""
        counts = self._words.transform(texts)
        self._document_counts += np.bincount(counts.indices, minlength=len(self._document_counts))
        self._num_documents += len(texts)

    def settle(self, sample: list[str]) -> None:
        """The strongest directions of a sample of documents; fewer than asked for where there are fewer documents."""
        from sklearn.decomposition import TruncatedSVD

        places = self._places(sample)
        count = min(self._dimensions, *places.shape)
        if count and places.nnz:
            analysis = TruncatedSVD(count, random_state=self._seed).fit(places)
            self._directions = np.ascontiguousarray(analysis.components_.T, dtype=np.float32)

    def points(self, texts: list[str]) -> Any:
        """float32 [texts, dimensions], or CSR [texts, places] without a projection.

        A document without a word that weighs anything is all zeros.
        """
        from sklearn.preprocessing import normalize

        places = self._places(texts)
        if self._directions is None:
            return places
        points = places @ self._directions
        return normalize(points, copy=False) if self._normalize else points

    def _places(self, texts: list[str]) -> Any:
        """float32 CSR [texts, places]: TF-IDF."""
        from sklearn.preprocessing import normalize

        idf = np.log((1 + self._num_documents) / (1 + self._document_counts))
        idf[self._document_counts < 2] = 0
        points = self._words.transform(texts)
        points.data = ((1 + np.log(points.data)) * idf[points.indices]).astype(np.float32)
        points.eliminate_zeros()
        return normalize(points, copy=False) if self._normalize else points


class EncoderAverage:
    """The last hidden states of an encoder, averaged over the tokens of a document."""

    must_learn, in_processes = False, False

    def __init__(self, folder: str, *, document_tokens: int, normalize: bool) -> None:
        """Loads the encoder.

        Args:
            folder: of the encoder and its tokenizer; nothing is fetched from elsewhere.
            document_tokens: of the encoder's own; never more than it has positions for.
            normalize: scale every average to length 1.

        Raises:
            ValueError: transformers cannot load the folder.
        """
        import torch
        from transformers import AutoModel, AutoTokenizer

        try:
            self._tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            model = AutoModel.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(f"cluster.features = {folder!r}: transformers cannot load it: {error}") from None
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._model = model.to(self._device).eval()
        self._normalize = normalize
        self._longest = min(document_tokens, getattr(model.config, "max_position_embeddings", document_tokens))

    def learn(self, texts: list[str]) -> None:
        """An encoder has learnt already."""

    def settle(self, sample: list[str]) -> None:
        """Nor does it need a sample."""

    def points(self, texts: list[str]) -> np.ndarray:
        """float32 [texts, width]."""
        # Of like length in one batch, as the others are padded; each document lands in its place.
        order = np.argsort([len(text) for text in texts], kind="stable")
        found = np.empty((len(texts), self._model.config.hidden_size), dtype=np.float32)
        for first in range(0, len(order), _ENCODER_BATCH):
            chosen = order[first : first + _ENCODER_BATCH]
            found[chosen] = self._average([texts[number] for number in chosen])
        if self._normalize:
            found /= np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-12)
        return found

    def _average(self, texts: list[str]) -> np.ndarray:
        import torch

        words = {"padding": True, "truncation": True, "max_length": self._longest, "return_tensors": "pt"}
        inputs = self._tokenizer(texts, **words).to(self._device)
        with torch.no_grad():
            hidden = self._model(**inputs).last_hidden_state
        mask = inputs["attention_mask"].unsqueeze(-1)
        return ((hidden * mask).sum(1) / mask.sum(1).clamp(min=1)).float().cpu().numpy()

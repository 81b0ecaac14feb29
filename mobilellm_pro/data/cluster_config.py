"""`[cluster]` of a datasets.toml: how `prepare --cluster` sorts documents into groups of one subject.

[cluster]
features = "tfidf"          # or the folder of a Hugging Face encoder
seed = 1

[[dataset]]
clusters = 6                # of this corpus; 0, the default, leaves it out
"""

from dataclasses import asdict, dataclass
from typing import Any

MAX_CLUSTERS = 2**16
TFIDF = "tfidf"


@dataclass(frozen=True)
class ClusterConfig:
    """The table, or its defaults.

    Attributes:
        features: "tfidf": hashed words, weighted by how rare they are in the corpus. Else the folder of an encoder
            (`transformers`), whose last hidden states are averaged over the tokens of a document.
        hash_features: of TF-IDF: words share so many places.
        dimensions: of TF-IDF: it is projected to so many directions (latent semantic analysis), for 4 bytes of memory a
            place and direction; 0 clusters the places themselves.
        normalize: scale every document to length 1, so that its subject counts and not its size.
        document_tokens: only the first so many tokens of a document are looked at.
        fit_documents: documents of a pass of fitting, drawn anew for each; the centers are then applied to all.
        passes: of fitting.
        batch_documents: documents at a time.
        seed: of the first centers and of the order of the documents.
    """

    features: str = TFIDF
    hash_features: int = 2**16
    dimensions: int = 64
    normalize: bool = True
    document_tokens: int = 2048
    fit_documents: int = 200_000
    passes: int = 5
    batch_documents: int = 512
    seed: int = 1

    def problems(self) -> list[str]:
        """What is wrong with values that have the right type, each beginning with its key."""
        least = {"hash_features": 2, "dimensions": 0, "document_tokens": 1, "fit_documents": 1, "passes": 1}
        least |= {"batch_documents": 2}
        found = [
            f"{key}: expected at least {low}, found {getattr(self, key)}"
            for key, low in least.items()
            if getattr(self, key) < low
        ]
        if not self.features:
            found.append(f'features: expected "{TFIDF}" or the folder of an encoder')
        if not 0 <= self.seed < 2**32:
            found.append(f"seed: expected 0 to {2**32 - 1}, found {self.seed}")
        return found

    def settings(self, clusters: int) -> dict[str, Any]:
        """What decides about the clusters of a corpus, as JSON values."""
        values = asdict(self)
        if self.features != TFIDF:
            del values["hash_features"], values["dimensions"]
        return {"clusters": clusters, **values}

"""What the clusters of a corpus are about: sizes, words that set each apart, and how some of its documents begin.

Words are counted in documents of a sample, up to `_SAMPLE` of each cluster and evenly spaced over it, and only the
`_VOCABULARY` most frequent ones of the sample, so memory does not grow with the corpus. A word is ranked by
p ln(p / q) ln(1 / q), p the share of the cluster's documents that hold it and q that of the whole corpus: common there,
more so than elsewhere, and not a word of every text.
"""

from collections.abc import Callable

import numpy as np

from mobilellm_pro.data.clusters import Cluster, ClusterRecord
from mobilellm_pro.data.shards import Corpus

_SAMPLE = 300
_VOCABULARY = 20_000
_TERMS = 12
_EXAMPLES = 3
_EXAMPLE_CHARS = 200

ReadText = Callable[[str, int], str]
"""(split, document) -> the beginning of its text."""


def describe_clusters(
    corpora: dict[str, Corpus], labels: dict[str, np.ndarray], number: int, read: ReadText
) -> list[Cluster]:
    """What there is to say about each cluster.

    Args:
        corpora: split -> its documents.
        labels: split -> [documents], the cluster of each.
        number: of clusters.
        read: the text of a document.
    """
    documents, tokens = {}, {}
    for split, corpus in corpora.items():
        lengths = corpus.lengths(0, corpus.num_documents)
        documents[split] = np.bincount(labels[split], minlength=number)
        tokens[split] = np.bincount(labels[split], weights=lengths, minlength=number)
    members = [np.flatnonzero(labels["train"] == cluster) for cluster in range(number)]
    sample = [[read("train", int(d)) for d in _evenly(found, _SAMPLE)] for found in members]
    terms = _top_terms(sample, documents["train"] / documents["train"].sum())
    return [
        Cluster(
            {split: int(counts[cluster]) for split, counts in documents.items()},
            {split: int(counts[cluster]) for split, counts in tokens.items()},
            terms[cluster],
            [_beginning(read("train", int(d))) for d in _evenly(members[cluster], _EXAMPLES)],
        )
        for cluster in range(number)
    ]


def _evenly(values: np.ndarray, count: int) -> np.ndarray:
    """At most `count` of the values, from the middles of as many equal parts."""
    count = min(count, len(values))
    return values[((np.arange(count) + 0.5) * len(values) / max(count, 1)).astype(np.int64)]


def _top_terms(texts: list[list[str]], shares: np.ndarray) -> list[list[str]]:
    """The words that set each cluster apart.

    Args:
        texts: of some documents of each cluster.
        shares: float64 [clusters], of the corpus' documents.
    """
    from sklearn.feature_extraction.text import CountVectorizer

    everything = [text for cluster in texts for text in cluster]
    counter = CountVectorizer(binary=True, max_features=_VOCABULARY, token_pattern=r"(?u)\b[^\W\d]\w+\b")
    try:
        held = counter.fit_transform(everything)
    except ValueError:  # not one word in all texts: of code points or numbers only
        return [[] for _ in texts]
    words, ends = counter.get_feature_names_out(), np.cumsum([0, *map(len, texts)])
    counts = np.array([np.asarray(held[first:last].sum(axis=0))[0] for first, last in zip(ends[:-1], ends[1:])])
    share = (counts + 0.5) / (np.diff(ends)[:, None] + 1)
    overall = (shares[:, None] * share).sum(axis=0)
    gain = share * np.log(share / overall) * -np.log(overall)
    gain[counts < 2] = 0
    return [[str(words[place]) for place in np.argsort(-row, kind="stable")[:_TERMS] if row[place] > 0] for row in gain]


def _beginning(text: str) -> str:
    line = " ".join(text[: 4 * _EXAMPLE_CHARS].split())
    return line if len(line) <= _EXAMPLE_CHARS else f"{line[:_EXAMPLE_CHARS]}..."


def report_text(name: str, record: ClusterRecord) -> str:
    """The clusters of a corpus as a page of Markdown; a function of the record alone."""
    splits = list(record.corpus)
    total = sum(cluster.tokens["train"] for cluster in record.clusters)
    lines = [f"# Clusters of {name}", ""]
    lines += [", ".join(f"{key} {value}" for key, value in record.settings.items() if value != ""), ""]
    heads = ["cluster", *(f"{split} documents" for split in splits), "train tokens", "share %", "terms"]
    lines += [f"| {' | '.join(heads)} |", f"|{'---:|' * (len(heads) - 1)}---|"]
    for number, cluster in enumerate(record.clusters):
        counts = [f"{cluster.documents[split]:,}" for split in splits]
        tokens = cluster.tokens["train"]
        cells = [str(number), *counts, f"{tokens:,}", f"{100 * tokens / max(total, 1):.2f}", ", ".join(cluster.terms)]
        lines.append(f"| {' | '.join(cells)} |")
    for number, cluster in enumerate(record.clusters):
        lines += ["", f"## Cluster {number}", "", *(f"    {example}" for example in cluster.examples)]
    return "\n".join(lines) + "\n"

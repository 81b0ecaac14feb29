"""Which documents of a corpus are read, and how much of each: limits on their length, and clusters.

A length is that of the document on disk, in tokens, bos and eos included. Both limits together mean the first so many
tokens of long documents. What is left out has no place in the order: an epoch is a pass over what is read.
"""

from dataclasses import dataclass

import numpy as np

from mobilellm_pro.data.shards import Corpus
from mobilellm_pro.data.shuffle import sum_blocks

_CHUNK_DOCUMENTS = 2**20  # lengths are looked at in steps of this many


def check_positive(**numbers: int | None) -> None:
    """Raises ValueError for a number below 1; None is no number."""
    for name, value in numbers.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} = {value}: expected at least 1")


@dataclass(frozen=True)
class DocumentLimits:
    """Limits on the documents of a corpus.

    Attributes:
        min_document_tokens: shorter documents are left out; None: none are.
        max_document_tokens: only the first so many tokens of every document are read; None: all of them.
        clusters: numbers of the clusters whose documents are read; None: all documents, clustered or not.

    Raises:
        ValueError: a number below 1, no cluster, or one twice.
    """

    min_document_tokens: int | None = None
    max_document_tokens: int | None = None
    clusters: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        check_positive(min_document_tokens=self.min_document_tokens, max_document_tokens=self.max_document_tokens)
        if self.clusters is not None and not 0 < len(set(self.clusters)) == len(self.clusters):
            raise ValueError(f"clusters = {list(self.clusters)}: expected at least one number, each once")

    @property
    def leaves_out(self) -> bool:
        """Whether there may be documents of which nothing is read."""
        return self.min_document_tokens is not None or self.clusters is not None

    def apply(self, corpus: Corpus, documents: np.ndarray | slice, lengths: np.ndarray) -> np.ndarray:
        """Changes lengths into the tokens that are read: 0 where a document is left out.

        Args:
            corpus: of the documents.
            documents: int64 [documents], numbers in any order, or a range of them.
            lengths: int64 [documents], theirs on disk; changed.

        Raises:
            ValueError: clusters that the corpus does not have.
        """
        if self.min_document_tokens is not None:
            lengths[lengths < self.min_document_tokens] = 0
        if self.clusters is not None:
            lengths[~corpus.clusters.members(documents, self.clusters)] = 0
        if self.max_document_tokens is not None:
            np.minimum(lengths, self.max_document_tokens, out=lengths)
        return lengths

    def lengths(self, corpus: Corpus, first: int, last: int) -> np.ndarray:
        """int64 [last - first]: tokens that are read of the documents first .. last - 1."""
        return self.apply(corpus, slice(first, last), corpus.lengths(first, last))

    def num_tokens(self, corpus: Corpus) -> int:
        """Tokens of one pass over a corpus; with a limit it looks at every length."""
        if self == NO_LIMITS or not corpus.num_documents:
            return corpus.num_tokens
        return int(self.block_tokens(corpus).sum())

    def block_tokens(self, corpus: Corpus) -> np.ndarray:
        """int64 [blocks of `shuffle`]: tokens that are read of the documents of each block."""
        return sum_blocks(corpus.num_documents, lambda first, last: self.lengths(corpus, first, last))

    def describe(self, corpus: Corpus) -> str:
        """The limits in words, empty without one: what a checkpoint records about the rows.

        A number of a cluster means other documents after another clustering, so it comes with a digest of it.
        """
        words = {"min_document_tokens": self.min_document_tokens, "max_document_tokens": self.max_document_tokens}
        limits = [f"{name} {value}" for name, value in words.items() if value is not None]
        if self.clusters is not None:
            numbers = " ".join(map(str, sorted(self.clusters)))
            limits.append(f"clusters {numbers} of {corpus.clusters.content}")
        return ", ".join(limits)

    def check_row(self, corpus: Corpus, seq_len: int, num_tokens: int) -> None:
        """Raises ValueError where one pass over a corpus, of `num_tokens`, does not fill a row of seq_len + 1."""
        if num_tokens >= seq_len + 1:
            return
        found, cure = f"{num_tokens} tokens", ""
        if self.clusters is not None:
            found += f" in the clusters {', '.join(map(str, self.clusters))}"
            cure = "name more clusters, "
        if self.min_document_tokens is not None:
            found += f" in documents of at least min_document_tokens = {self.min_document_tokens} (the longest has "
            found += f"{_longest(corpus)})"
            cure += "lower min_document_tokens, "
        raise ValueError(
            f"{corpus.folder}: the split {corpus.split!r} has {found}, fewer than one sequence of seq_len + 1 = "
            f"{seq_len + 1}: {cure}shorten seq_len or give more text"
        )


NO_LIMITS = DocumentLimits()


def _longest(corpus: Corpus) -> int:
    """Tokens of the longest document."""
    starts = range(0, corpus.num_documents, _CHUNK_DOCUMENTS)
    ends = (min(first + _CHUNK_DOCUMENTS, corpus.num_documents) for first in starts)
    return max((int(corpus.lengths(*chunk).max()) for chunk in zip(starts, ends, strict=True)), default=0)

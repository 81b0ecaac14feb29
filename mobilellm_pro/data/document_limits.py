"""Which documents of a corpus are read, and how much of each: two limits on their length.

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

    Raises:
        ValueError: a number below 1.
    """

    min_document_tokens: int | None = None
    max_document_tokens: int | None = None

    def __post_init__(self) -> None:
        check_positive(min_document_tokens=self.min_document_tokens, max_document_tokens=self.max_document_tokens)

    def apply(self, lengths: np.ndarray) -> np.ndarray:
        """Changes int64 [documents], lengths on disk, into the tokens that are read: 0 where a document is left out."""
        if self.min_document_tokens is not None:
            lengths[lengths < self.min_document_tokens] = 0
        if self.max_document_tokens is not None:
            np.minimum(lengths, self.max_document_tokens, out=lengths)
        return lengths

    def num_tokens(self, corpus: Corpus) -> int:
        """Tokens of one pass over a corpus; with a limit it looks at every length."""
        if self == NO_LIMITS or not corpus.num_documents:
            return corpus.num_tokens
        return int(self.block_tokens(corpus).sum())

    def block_tokens(self, corpus: Corpus) -> np.ndarray:
        """int64 [blocks of `shuffle`]: tokens that are read of the documents of each block."""
        return sum_blocks(corpus.num_documents, lambda first, last: self.apply(corpus.lengths(first, last)))

    def describe(self) -> str:
        """The limits in words, empty without one: what a checkpoint records about the rows."""
        words = {"min_document_tokens": self.min_document_tokens, "max_document_tokens": self.max_document_tokens}
        return ", ".join(f"{name} {value}" for name, value in words.items() if value is not None)

    def check_row(self, corpus: Corpus, seq_len: int, num_tokens: int) -> None:
        """Raises ValueError where one pass over a corpus, of `num_tokens`, does not fill a row of seq_len + 1."""
        if num_tokens >= seq_len + 1:
            return
        found, cure = f"{num_tokens} tokens", ""
        if self.min_document_tokens is not None:
            found += f" in documents of at least min_document_tokens = {self.min_document_tokens} (the longest has "
            found += f"{_longest(corpus)})"
            cure = "lower min_document_tokens, "
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

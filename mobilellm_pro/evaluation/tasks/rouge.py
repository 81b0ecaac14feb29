"""ROUGE-L: how much of a text stands in another one in the same order (Lin, "ROUGE", 2004).

The words are runs of [a-z0-9] of the lower-cased text, without stemming. With L the length of the longest common
subsequence of words, precision P = L / words of the candidate and recall R = L / words of the reference, the score is
F = 2PR / (P + R) = 2L / (words of both). Over documents there are two means: of the documents' F, and of the counts,

    F_micro = 2 * sum L / sum of words of both,

in which a long document weighs more.
"""

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

_NOT_OF_A_WORD = re.compile(r"[^a-z0-9]+")


class Counts(NamedTuple):
    """What ROUGE-L needs of one document, or of several summed."""

    common_words: int
    """Length of the longest common subsequence."""

    candidate_words: int
    reference_words: int


def rouge_l_counts(candidate: str, reference: str) -> Counts:
    """The counts of one document."""
    ours, theirs = words(candidate), words(reference)
    return Counts(longest_common_subsequence(ours, theirs), len(ours), len(theirs))


def rouge_l(counts: Sequence[int]) -> float:
    """F of (common, candidate's, reference's) words, between 0 and 1; 0 if a text has no words."""
    common, candidate, reference = counts
    return 2 * common / (candidate + reference) if common else 0.0


def micro_rouge_l(counts: Iterable[Sequence[int]]) -> float:
    """F of the counts summed over documents."""
    return rouge_l([sum(column) for column in zip(*counts)] or [0, 0, 0])


def words(text: str) -> list[str]:
    """Runs of ASCII letters and digits, lower-cased."""
    return _NOT_OF_A_WORD.sub(" ", text.lower()).split()


def longest_common_subsequence(first: Sequence[str], second: Sequence[str]) -> int:
    """Its length, exactly, one integer operation on a whole row of the usual table at a time.

    Bit i of `row` is 0 where the table rises from column i to i + 1 (Hyyrö, "Bit-Parallel LCS-length Computation
    Revisited", 2004).
    """
    places: dict[str, int] = {}
    for index, word in enumerate(first):
        places[word] = places.get(word, 0) | 1 << index
    all_ones = (1 << len(first)) - 1
    row = all_ones
    for word in second:
        matches = row & places.get(word, 0)
        row = ((row + matches) | (row - matches)) & all_ones
    return len(first) - row.bit_count()

"""The text around a needle: generated filler, or documents of a prepared corpus; as much of it as a length holds."""

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

from mobilellm_pro.data.shards import Corpus
from mobilellm_pro.data.tokenizer import Tokenizer
from mobilellm_pro.evaluation.needle_prompt import FILLER, split_sentences

_FIRST_GUESS_SENTENCES = 16


class Haystack(Protocol):
    """Text without end."""

    identity: str
    """Differs where the text does."""

    separator: str
    """Stands between sentences."""

    def sentences(self, rng: random.Random, num_tokens: int) -> Iterator[str]:
        """Sentences for a prompt of at most `num_tokens`; the same for the same state of `rng`."""


class Filler:
    """The same few words again and again, a line each."""

    identity = "generated"
    separator = "\n"

    def sentences(self, rng: random.Random, num_tokens: int) -> Iterator[str]:
        """One unit of the filler after another."""
        while True:
            yield FILLER


class CorpusText:
    """Documents of a corpus' training split, decoded: from a random one on, in their order, each at most once."""

    separator = " "

    def __init__(self, folder: str | Path, tokenizer: Tokenizer) -> None:
        """Opens the corpus.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it was made by another tokenizer, or is damaged.
        """
        self.corpus = Corpus.open(folder, "train", fingerprint=tokenizer.fingerprint)
        self.tokenizer = tokenizer
        self.identity = f"{self.corpus.name} {self.corpus.content}"

    def sentences(self, rng: random.Random, num_tokens: int) -> Iterator[str]:
        """Sentences of one document after another; of each at most `num_tokens` tokens are read.

        Raises:
            ValueError: all documents are used, and more is asked for.
        """
        first = rng.randrange(self.corpus.num_documents)
        for count in range(self.corpus.num_documents):
            document = (first + count) % self.corpus.num_documents
            length = int(self.corpus.lengths(document, document + 1)[0])
            ids = self.corpus.tokens(document, 0, min(length, num_tokens))
            text = self.tokenizer.decode(ids[ids < len(self.tokenizer.ranks)])  # bos and eos are no text
            yield from split_sentences(text.rstrip("\ufffd"))  # the cut may go through a character
        raise ValueError(
            f"{self.corpus.folder}: its {self.corpus.num_tokens} tokens do not fill a prompt of {num_tokens}: "
            "take a larger corpus or shorter lengths"
        )


def open_haystack(folder: str | None, tokenizer: Tokenizer) -> Haystack:
    """The text of a prepared corpus, or the filler without one.

    Raises:
        FileNotFoundError: there is no such corpus.
        ValueError: it was made by another tokenizer, or is damaged.
    """
    return Filler() if folder is None else CorpusText(folder, tokenizer)


def most_sentences(num_tokens: Callable[[int], int], limit: int) -> int:
    """The number of sentences n >= 0 for which num_tokens(n) <= limit < num_tokens(n + 1).

    A call encodes a whole prompt, so there are few: n moves by the missing tokens over the mean of a sentence.

    Args:
        num_tokens: of a prompt with n sentences; grows with n.
        limit: at least num_tokens(0).
    """
    bare = num_tokens(0)
    assert bare <= limit
    fits, too_many, n = 0, 0, _FIRST_GUESS_SENTENCES  # too_many is 0 until a number is found that does not fit
    while not too_many or too_many - fits > 1:
        count = num_tokens(n)
        if count <= limit:
            fits = n
        else:
            too_many = n
        n += round((limit - count) * n / max(1, count - bare))
        n = max(n, fits + 1)
        if too_many:
            n = min(n, too_many - 1)
    return fits

"""What a needle prompt looks like, and when its answer counts: the one place for both.

A sentence that gives a magic number for a key (the needle) stands between sentences of other text (the haystack); after
them the number is asked for, and the answer is begun, so that a model without instruction tuning goes on with it:

    A special magic number is hidden within the following text. Make sure to memorize it. I will quiz you about ...
    <haystack> One of the special magic numbers for quiet-harbor is: 4039281. <haystack>
    What is the special magic number for quiet-harbor mentioned in the provided text? The special magic number for
    quiet-harbor mentioned in the provided text is

This is the form of RULER's single-needle and several-keys tasks: with the filler it is `niah_single_1`, with text of a
corpus `niah_single_2`, with a uuid for a number `niah_single_3`, with further needles of other keys `niah_multikey_1`.
Bos comes first; a prompt has no chat template.
"""

import random
import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

TEMPLATE_VERSION = 1
"""Grows with any change here that changes a prompt or a score."""

FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
"""The unit of the generated haystack, on a line of its own."""

_ADJECTIVES = (
    "amber brave calm distant eager faint gentle hollow icy jolly keen lively mellow narrow odd proud quiet rapid"
)
_NOUNS = "anchor basket candle desert engine feather garden harbor island jacket kettle lantern meadow needle orchard"
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|(?<=[.!?][\"')\]])\s+|\n+")
_ANSWER = re.compile(r"[0-9A-Za-z-]*[0-9][0-9A-Za-z-]*")
_LONGEST_SENTENCE_CHARS = 300


@dataclass(frozen=True)
class Needle:
    """What is hidden: a value, the key it is asked by, and its kind."""

    key: str
    value: str
    kind: Literal["number", "uuid"] = "number"

    @property
    def sentence(self) -> str:
        """As it stands in the haystack."""
        return f"One of the special magic {self.kind}s for {self.key} is: {self.value}."


def draw_needle(rng: random.Random) -> Needle:
    """A number of 7 digits under a key of two words."""
    key = f"{rng.choice(_ADJECTIVES.split())}-{rng.choice(_NOUNS.split())}"
    return Needle(key, str(rng.randint(1_000_000, 9_999_999)))


def build_prompt(
    haystack: Sequence[str], needles: Sequence[Needle], places: Sequence[int], asked: Needle, *, separator: str
) -> str:
    """Puts needles into a haystack and asks for one of them.

    Args:
        haystack: sentences, in order.
        needles: to hide, in the order in which they stand.
        places: for each needle the number of haystack sentences before it, ascending.
        asked: the needle that is asked for.
        separator: between sentences: a line's end for the filler, a space for running text.

    Raises:
        ValueError: places do not fit the needles or the haystack.
    """
    if (
        len(places) != len(needles)
        or list(places) != sorted(places)
        or not 0 <= places[0] <= places[-1] <= len(haystack)
    ):
        raise ValueError(
            f"{len(needles)} needles at {list(places)}; expected places from 0 to {len(haystack)}, ascending"
        )
    parts: list[str] = []
    begin = 0
    for needle, place in zip(needles, places, strict=True):
        parts += [*haystack[begin:place], needle.sentence]
        begin = place
    context = separator.join([*parts, *haystack[begin:]])
    question = f"the special magic {asked.kind} for {asked.key} mentioned in the provided text"
    return (
        f"A special magic {asked.kind} is hidden within the following text. Make sure to memorize it. "
        f"I will quiz you about the {asked.kind} afterwards.\n{context}\n"
        f"What is {question}? T{question[1:]} is"
    )


def place_at(depth: float, num_sentences: int) -> int:
    """Sentences before a needle at `depth` percent: 0 is before all of them, 100 after all."""
    return int(num_sentences * depth / 100)


def answer_matches(continuation: str, value: str, *, anywhere: bool = False) -> bool:
    """Whether a model's continuation of a prompt gives the value.

    Args:
        continuation: generated text.
        value: of the needle that was asked for.
        anywhere: the value as a part of the text is enough, as in RULER. Default: the first word of the text that has a
            digit in it must be the value, so naming several numbers, or a longer one, does not count.
    """
    if anywhere:
        return value.lower() in continuation.lower()
    found = _ANSWER.search(continuation)
    return found is not None and found.group().strip("-").lower() == value.lower()


def split_sentences(text: str) -> list[str]:
    """Sentences of a document without its white space; what has no sentence's end is cut after 300 characters."""
    sentences = []
    for sentence in _SENTENCE_END.split(text):
        sentences += textwrap.wrap(sentence.strip(), _LONGEST_SENTENCE_CHARS, break_on_hyphens=False)
    return sentences

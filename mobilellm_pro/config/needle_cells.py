"""Which prompts a needle test has, as tables of several files say it, and the one rule for their numbers."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from mobilellm_pro.config.typed_values import Mismatch


@dataclass
class NeedleCells:
    """Prompts of every length and depth; a table of its own adds what it needs."""

    lengths: list[int] = field(default_factory=list)
    """Tokens of prompt and answer together."""

    depths: int = 5
    """Places of the needle, evenly spaced from 0 to 100 % of the text."""

    needles: int = 1
    """Prompts of each length and depth; the cells are lengths x depths x needles."""

    haystack: str = ""
    """Folder of a prepared corpus to take text from. Default: a generated filler."""

    batch: int = 1
    """Prompts at a time. More are faster; kernels may then round differently, and a close call may go another way on
    another number of ranks."""

    def mismatches(self) -> Iterator[Mismatch]:
        """What is wrong with the numbers."""
        yield from cell_mismatches(self.lengths, depths=self.depths, needles=self.needles, batch=self.batch)


def cell_mismatches(lengths: Sequence[int], **counts: int) -> Iterator[Mismatch]:
    """What is wrong with the numbers of a needle test.

    Args:
        lengths: tokens of the prompts.
        counts: by key, what there must be one of at least.
    """
    if not lengths or min(lengths) < 1 or len(set(lengths)) < len(lengths):
        yield Mismatch("lengths", str(list(lengths)), "positive numbers of tokens, each once")
    for key, count in counts.items():
        if count < 1:
            yield Mismatch(key, str(count), "a positive number")

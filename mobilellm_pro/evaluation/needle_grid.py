"""The cells of a needle test: lengths × depths × needles, and the prompt of each.

The default grid has 10 · 9 · 5 = 450 cells. A cell's prompt follows from the seed and its place in the grid alone, so
cells can be run in any order, by any number of ranks, and a part of them again.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np

from mobilellm_pro.config.needle_cells import NeedleCells, cell_mismatches
from mobilellm_pro.data.tokenizer import Tokenizer
from mobilellm_pro.evaluation.needle_haystack import Haystack, most_sentences
from mobilellm_pro.evaluation.needle_prompt import Needle, build_prompt, draw_needle, place_at

SHORTEST_TOKENS, LONGEST_TOKENS, NUM_LENGTHS = 2_000, 131_072, 10


@dataclass(frozen=True)
class Cell:
    """One prompt of the grid."""

    index: int
    """Place in the grid, from 0; lengths vary slowest, needles fastest."""

    length: int
    """Tokens of prompt and answer together, at most."""

    depth: float
    """Percent of the haystack's sentences before the needle."""

    needle: int
    """Number of the needle among those of this length and depth."""


class CellPrompt(NamedTuple):
    """What the model is given and what it should say."""

    cell: Cell
    ids: np.ndarray
    """Bos and the prompt, int32 [tokens]."""

    value: str
    """The number that is hidden."""


class CellResult(NamedTuple):
    """What the model said."""

    cell: Cell
    prompt_tokens: int
    value: str
    answer: str
    correct: bool


@dataclass(frozen=True)
class Grid:
    """Which cells there are."""

    lengths: tuple[int, ...] = tuple(np.linspace(SHORTEST_TOKENS, LONGEST_TOKENS, NUM_LENGTHS).astype(int).tolist())
    num_depths: int = 9
    num_needles: int = 5
    seed: int = 0
    answer_tokens: int = 16
    """Room for the answer within a length, and tokens to generate."""

    @classmethod
    def of(cls, cells: NeedleCells) -> "Grid":
        """The cells that a table asks for."""
        return cls(tuple(cells.lengths), cells.depths, cells.needles)

    def __post_init__(self) -> None:
        counts = {"depths": self.num_depths, "needles": self.num_needles, "answer_tokens": self.answer_tokens}
        for wrong in cell_mismatches(self.lengths, **counts):
            raise ValueError(f"{wrong.place}: {wrong.found} in the needle grid; expected {wrong.expected}")

    @property
    def depths(self) -> list[float]:
        """Percent, evenly spaced from 0 to 100; a single one is 50."""
        return np.linspace(0, 100, self.num_depths).tolist() if self.num_depths > 1 else [50.0]

    def cells(self) -> list[Cell]:
        """All cells in the order of their index."""
        places = [
            (length, depth, n) for length in self.lengths for depth in self.depths for n in range(self.num_needles)
        ]
        return [Cell(index, *place) for index, place in enumerate(places)]


def cell_prompt(cell: Cell, grid: Grid, haystack: Haystack, tokenizer: Tokenizer) -> CellPrompt:
    """Makes the prompt of a cell: as many whole sentences as leave room for the answer.

    Raises:
        ValueError: the length does not hold the question, or the haystack ends before it is full.
    """
    limit = cell.length - grid.answer_tokens
    rng = random.Random(f"{grid.seed}/{cell.length}/{cell.depth}/{cell.needle}")
    source = haystack.sentences(rng, cell.length)
    taken: list[str] = []
    while True:
        text = partial(_text, cell, draw_needle(rng), source, taken, haystack.separator)
        num_tokens = partial(_num_tokens, tokenizer, text)
        shortest = num_tokens(0)
        if shortest > limit:
            raise ValueError(
                f"lengths: {cell.length} tokens do not hold the question ({shortest}) and {grid.answer_tokens} tokens "
                f"of answer; expected at least {shortest + grid.answer_tokens}"
            )
        prompt, value = text(most_sentences(num_tokens, limit))
        if prompt.count(value) == 1:  # else the haystack happens to have that number too
            return CellPrompt(cell, tokenizer.encode_array(prompt, bos=True), value)


def check_prompts(grid: Grid, haystack: Haystack, tokenizer: Tokenizer) -> None:
    """Makes a prompt of the shortest and one of the longest cells.

    Raises:
        ValueError: a length does not hold the question, or the haystack ends before a prompt is full.
    """
    cells = sorted(grid.cells(), key=lambda cell: cell.length)
    for cell in (cells[0], cells[-1]):
        cell_prompt(cell, grid, haystack, tokenizer)


def _text(
    cell: Cell, needle: Needle, source: Iterator[str], taken: list[str], separator: str, num_sentences: int
) -> tuple[str, str]:
    """Prompt with so many sentences, and the value; sentences that are missing in `taken` are drawn from the source."""
    taken.extend(next(source) for _ in range(num_sentences - len(taken)))
    place = place_at(cell.depth, num_sentences)
    return build_prompt(taken[:num_sentences], [needle], [place], needle, separator=separator), needle.value


def _num_tokens(tokenizer: Tokenizer, text: Callable[[int], tuple[str, str]], num_sentences: int) -> int:
    return len(tokenizer.encode_array(text(num_sentences)[0], bos=True))


def cells_of_rank(cells: Sequence[Cell], rank: int, world_size: int) -> list[Cell]:
    """A rank's part of the grid: every `world_size`-th cell, so that each rank has its share of every length."""
    return [cell for cell in cells if cell.index % world_size == rank]


def batches(prompts: Sequence[CellPrompt], batch: int) -> Iterator[list[CellPrompt]]:
    """Groups of at most `batch` prompts with equally many tokens, since the rows of a KV cache have one length."""
    by_length: dict[int, list[CellPrompt]] = {}
    for prompt in prompts:
        by_length.setdefault(len(prompt.ids), []).append(prompt)
    for _, group in sorted(by_length.items()):
        yield from (group[first : first + batch] for first in range(0, len(group), batch))

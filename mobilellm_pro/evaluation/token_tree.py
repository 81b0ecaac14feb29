"""Many token sequences as trees: what several of them begin with is there once.

An evaluation asks for the likelihood of several answers to one question, of many questions after the same examples. A
tree holds each common beginning once, in pre-order: a token's descendants follow it without a gap, so one number a
token, the place after its last descendant, says which queries see it. The tree goes through the model as one row: a
token's position is its depth, and its mask lets it see its ancestors only. What comes out for a token is what its own
sequence alone would have given.

Shapes: N tokens of a tree.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mobilellm_pro.model.attention_mask import AttentionMask
from mobilellm_pro.model.row_shard import Span


class TokenTree(NamedTuple):
    """Tokens in pre-order."""

    tokens: list[int]
    """[N] ids."""

    depths: list[int]
    """[N] number of tokens before each in its sequence."""

    ends: list[int]
    """[N] place after the last descendant."""

    paths: dict[int, list[int]]
    """Number of a sequence -> the places of the tokens that were asked for, its last ones."""


def token_trees(
    sequences: Sequence[list[int]],
    num_last: Sequence[int],
    max_tokens: int,
    order: Sequence[int] | None = None,
    enough_tokens: int | None = None,
) -> Iterator[TokenTree]:
    """Sequences, in lexicographic order, as trees of bounded size.

    Args:
        sequences: none empty.
        num_last: of each sequence, how many of its last tokens' places are wanted.
        max_tokens: of a tree; a single longer sequence is a tree of its own.
        order: numbers of the sequences to take; default all.
        enough_tokens: a tree of so many ends before a sequence that has less than half of its tokens in common with it:
            attention's cost grows with the square of a tree. Default `max_tokens`.
    """
    numbers = range(len(sequences)) if order is None else order
    growing = _Growing()
    for number in sorted(numbers, key=lambda number: sequences[number]):
        sequence = sequences[number]
        size, shared = len(growing.tokens), growing.shared(sequence)
        is_enough = enough_tokens is not None and size >= enough_tokens and 2 * shared < len(sequence)
        if size and (is_enough or size + len(sequence) - shared > max_tokens):
            yield growing.finish()
            growing = _Growing()
        growing.add(number, sequence, num_last[number])
    if growing.tokens:
        yield growing.finish()


class _Growing:
    """A tree to which sequences are added in lexicographic order."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self._depths: list[int] = []
        self._ends: list[int] = []
        self._paths: dict[int, list[int]] = {}
        self._sequence: Sequence[int] = ()
        self._path: list[int] = []  # places of the sequence that was added last

    def shared(self, sequence: Sequence[int]) -> int:
        """Tokens that a sequence has in common with the one before it: all that it shares with the tree."""
        for depth, (token, before) in enumerate(zip(sequence, self._sequence, strict=False)):
            if token != before:
                return depth
        return min(len(sequence), len(self._sequence))

    def add(self, number: int, sequence: Sequence[int], num_last: int) -> None:
        depth = self.shared(sequence)
        self._close(depth)
        for token in sequence[depth:]:
            self._path.append(len(self.tokens))
            self._depths.append(len(self._path) - 1)
            self._ends.append(-1)
            self.tokens.append(token)
        self._sequence = sequence
        self._paths[number] = self._path[len(sequence) - num_last :]

    def finish(self) -> TokenTree:
        self._close(0)
        return TokenTree(self.tokens, self._depths, self._ends, self._paths)

    def _close(self, depth: int) -> None:
        """Nothing more comes below the tokens of the path from this depth on."""
        for place in self._path[depth:]:
            self._ends[place] = len(self.tokens)
        del self._path[depth:]


def tree_masks(depths: Tensor, ends: Tensor, spans: Mapping[str, Span]) -> dict[str, AttentionMask]:
    """Kind of layer -> what each token sees: itself and its ancestors, in a window if the layer has one.

    Args:
        depths: [N].
        ends: [N] place after the last descendant.
        spans: kind of layer -> how far back it looks.
    """
    place = torch.arange(len(depths), device=depths.device)
    visible = (place.unsqueeze(1) >= place) & (place.unsqueeze(1) < ends)
    masks = {}
    for kind, span in spans.items():
        assert span.chunk is None, "only students are evaluated, and they have no chunked layers"
        near = visible
        if span.window is not None:
            near = visible & (depths.unsqueeze(1) - depths < span.window)
        # Only the dense mask is read: a token's ancestors have gaps between them, which two numbers a query cannot say.
        masks[kind] = AttentionMask(place, place, len(place), dense=near[None, None])
    return masks

"""Which tokens of a row lie on which rank of a context-parallel group, and which keys a rank must get from others.

A row is cut into pieces of equal length. Contiguous: rank r holds piece r. Head and tail: there are two pieces a rank,
and rank r of n holds pieces r and 2n - 1 - r, so that under a plain causal mask every rank's queries see equally many
keys; the price is a second border to fetch keys across.

What a rank must get is decided by how far back a kind of layer looks, not by the documents of a batch: shapes and
messages are the same in every step, and every rank knows everybody's messages without asking.

Shapes: B rows, S tokens of a row on this rank, K tokens of the whole row.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor
from torchtitan.distributed import ParallelDims

Interval = tuple[int, int]
"""First token and the one after the last."""


@dataclass(frozen=True)
class Span:
    """How far back one kind of layer looks, in tokens; the default sees everything before it."""

    window: int | None = None
    """The last `window` tokens, the query's own included."""

    chunk: int | None = None
    """Consecutive tokens with the same `position // chunk`."""

    def oldest(self, query: int, *, aligned: bool) -> int:
        """First token of a row that a query at that token may see, whatever the documents.

        Args:
            aligned: positions are indices in the row, so that chunks begin at multiples of `chunk`.
        """
        first = 0
        if self.window is not None:
            first = max(first, query - self.window + 1)
        if self.chunk is not None:
            first = max(first, query - query % self.chunk if aligned else query - self.chunk + 1)
        return first


@dataclass(frozen=True)
class RowShard:
    """One rank's part of a row."""

    num_tokens: int
    """Of the whole row."""

    degree: int = 1
    """Ranks that share the row."""

    rank: int = 0
    head_tail: bool = False
    """Two pieces a rank, one from either end."""

    def pieces(self, rank: int | None = None) -> tuple[Interval, ...]:
        """Of this rank or another, in the order of the row."""
        rank = self.rank if rank is None else rank
        if not self.head_tail or self.degree == 1:
            length = self.num_tokens // self.degree
            return ((rank * length, (rank + 1) * length),)
        length = self.num_tokens // (2 * self.degree)
        return tuple((i * length, (i + 1) * length) for i in (rank, 2 * self.degree - 1 - rank))

    def take(self, whole: Tensor) -> Tensor:
        """[B, K, ...] -> [B, S, ...]: this rank's tokens."""
        return _joined([whole[:, begin:end] for begin, end in self.pieces()], dim=1)

    def indices(self, device: torch.device | str = "cpu") -> Tensor:
        """[S] place in the row of each of this rank's tokens."""
        return _joined([torch.arange(begin, end, device=device) for begin, end in self.pieces()], dim=0)


def own_shard(num_tokens: int, parallel_dims: ParallelDims, layout: str) -> RowShard:
    """This rank's part of rows of so many tokens; `layout` is `attention.context_layout`."""
    if not parallel_dims.cp_enabled:
        return RowShard(num_tokens)
    mesh = parallel_dims.get_mesh("cp")
    return RowShard(num_tokens, mesh.size(), mesh.get_local_rank(), layout == "head_tail")


@dataclass(frozen=True)
class KeyExchange:
    """Keys and values that one kind of layer sends, receives and puts together on one rank."""

    sent: tuple[tuple[Interval, ...], ...]
    """For each rank: which of this rank's tokens (0 is its first) go there."""

    received: tuple[int, ...]
    """For each rank: how many tokens come from there."""

    assembly: tuple[tuple[bool, int, int], ...]
    """The keys in the order of the row: (received, begin, end) of stretches of what was received, or of the own."""

    key_pieces: tuple[Interval, ...]
    """Which tokens of the row these are."""

    @property
    def sent_tokens(self) -> tuple[int, ...]:
        """For each rank: how many tokens go there."""
        return tuple(sum(end - begin for begin, end in intervals) for intervals in self.sent)

    def indices(self, device: torch.device | str = "cpu") -> Tensor:
        """Place in the row of every key, ascending."""
        return _joined([torch.arange(begin, end, device=device) for begin, end in self.key_pieces], dim=0)


@lru_cache(maxsize=64)
def key_exchange(shard: RowShard, span: Span, *, aligned: bool = True) -> KeyExchange | None:
    """What a kind of layer exchanges, from sizes alone; None where no rank needs a key of another.

    Args:
        shard: of this rank.
        span: how far back the layers look.
        aligned: positions are indices in the row (`Span.oldest`).
    """
    ranks = range(shard.degree)
    needed = [_needed(shard, span, rank, aligned) for rank in ranks]
    if all(needed[rank] == _merged(shard.pieces(rank)) for rank in ranks):
        return None
    sent = tuple(_to_own(shard, shard.rank, _overlap(shard, shard.rank, rank, needed)) for rank in ranks)
    arriving = [(interval, rank) for rank in ranks for interval in _overlap(shard, rank, shard.rank, needed)]
    offset, stretches = 0, []
    for (begin, end), _ in arriving:
        stretches.append((begin, end, (True, offset, offset + end - begin)))
        offset += end - begin
    for piece, own in zip(shard.pieces(), _to_own(shard, shard.rank, shard.pieces()), strict=True):
        stretches.append((*piece, (False, *own)))
    stretches.sort()
    return KeyExchange(
        sent=sent,
        received=tuple(sum(end - begin for (begin, end), source in arriving if source == rank) for rank in ranks),
        assembly=tuple(place for _, _, place in stretches),
        key_pieces=_merged([(begin, end) for begin, end, _ in stretches]),
    )


def _needed(shard: RowShard, span: Span, rank: int, aligned: bool) -> tuple[Interval, ...]:
    """Tokens that some query of a rank may see."""
    return _merged([(span.oldest(begin, aligned=aligned), end) for begin, end in shard.pieces(rank)])


def _overlap(shard: RowShard, source: int, target: int, needed: Sequence[tuple[Interval, ...]]) -> tuple[Interval, ...]:
    """Tokens of the row that one rank holds and another needs."""
    if source == target:
        return ()
    found = [
        (max(begin, first), min(end, last)) for begin, end in shard.pieces(source) for first, last in needed[target]
    ]
    return tuple((begin, end) for begin, end in found if begin < end)


def _to_own(shard: RowShard, rank: int, intervals: Sequence[Interval]) -> tuple[Interval, ...]:
    """Places in the row -> places among a rank's own tokens; an interval lies in one piece."""
    own, places = 0, []
    for first, last in shard.pieces(rank):
        places += [(begin - first + own, end - first + own) for begin, end in intervals if first <= begin < last]
        own += last - first
    return tuple(places)


def _merged(intervals: Sequence[Interval]) -> tuple[Interval, ...]:
    """The union of intervals, ascending."""
    ordered = sorted(intervals)
    merged = ordered[:1]
    for _, (begin, end) in pairwise(ordered):
        if begin <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((begin, end))
    return tuple(merged)


def _joined(parts: Sequence[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim)

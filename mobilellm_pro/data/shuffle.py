"""Seeded orders of any number of items in bounded memory: what comes n-th is a function of (seed, epoch, n).

Items are sorted by a keyed integer hash written out below, not by a library's random generator, whose stream may change
between releases: a run that lasts months must find its order again.

Up to 2^20 items this sorts the items themselves. More of them form 2^20 or fewer blocks of neighbours; the blocks are
sorted by their hash, every 64 blocks of that order (more where they hold less than 1,024 items) form a group, and the
items of a group are sorted by theirs. So only an order of blocks is held, a group is laid out when it is asked for, and
neighbours on disk still come thousands of groups apart from most of their neighbourhood. With one item a block both
definitions are the same order.
"""

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, Generic, TypeVar

import numpy as np

MAX_BLOCKS = 2**20
GROUP_BLOCKS = 64
GROUP_ITEMS = 1024  # at least: laying out a group costs as much as some hundred items
_CACHED_EPOCHS = 2  # a row that crosses an epoch border needs both
_CHUNK_ITEMS = 2**20
_GOLDEN = 0x9E3779B97F4A7C15
_MASK = 0xFFFFFFFFFFFFFFFF

Value = TypeVar("Value")


class Recent(Generic[Value]):
    """The last few results of a computation, by key; a copy in another process starts empty."""

    def __init__(self, size: int) -> None:
        """Keeps at most `size` results."""
        self.size = size
        self._values: OrderedDict[Hashable, Value] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], Value]) -> Value:
        """The result for a key, made where it is not among the last ones."""
        if key not in self._values:
            self._values[key] = make()
            if len(self._values) > self.size:
                self._values.popitem(last=False)
        else:
            self._values.move_to_end(key)
        return self._values[key]

    def __len__(self) -> int:
        return len(self._values)

    def __reduce__(self) -> tuple[Any, ...]:
        """A worker computes again in less time than the results take to send."""
        return Recent, (self.size,)


class BlockShuffle:
    """One order of all items per epoch, addressed by the sum of the weights (tokens, say) of the items before."""

    def __init__(self, num_items: int, key: int, block_weights: np.ndarray) -> None:
        """
        Args:
            num_items: items are the numbers 0 .. num_items - 1.
            key: 64 bits that select the orders (`hash_key`).
            block_weights: int64 [blocks] of `sum_blocks`.
        """
        self.num_items, self.total = num_items, int(block_weights.sum())
        self._key, self._weights, self._size = key, block_weights, _block_size(num_items)
        self._group_blocks = max(GROUP_BLOCKS, GROUP_ITEMS // self._size)
        self._epochs: Recent[tuple[np.ndarray, list[int]]] = Recent(_CACHED_EPOCHS)

    def find(self, epoch: int, offset: int) -> tuple[int, int]:
        """(group in which the weight `offset` < total of the epoch falls, what of the offset is inside the group)."""
        ends = self._epoch(epoch)[1]
        group = bisect_right(ends, offset)  # steps over groups without weight
        return group, offset - (ends[group - 1] if group else 0)

    def items(self, epoch: int, group: int) -> np.ndarray:
        """int64 [items of the group] in order."""
        blocks = self._epoch(epoch)[0][group * self._group_blocks : (group + 1) * self._group_blocks]
        items = (blocks[:, None] * self._size + np.arange(self._size)).ravel()
        items = items[items < self.num_items]  # the last block may be shorter
        return items[np.argsort(_hashes(items, self._key, epoch), kind="stable")]

    def _epoch(self, epoch: int) -> tuple[np.ndarray, list[int]]:
        """int64 [blocks] in the order of the epoch, and the weight up to the end of each group."""
        return self._epochs.get(epoch, lambda: self._lay_out(epoch))

    def _lay_out(self, epoch: int) -> tuple[np.ndarray, list[int]]:
        order = permutation(len(self._weights), self._key, epoch)
        sums = np.add.reduceat(self._weights[order], np.arange(0, len(order), self._group_blocks))
        return order, np.cumsum(sums).tolist()


def sum_blocks(num_items: int, weights: Callable[[int, int], np.ndarray]) -> np.ndarray:
    """int64 [blocks]: the weight of each block; `weights(first, last)` gives those of a range of items."""
    size = _block_size(num_items)
    step = max(1, _CHUNK_ITEMS // size) * size
    parts = []
    for first in range(0, num_items, step):
        chunk = weights(first, min(first + step, num_items))
        parts.append(np.add.reduceat(chunk, np.arange(0, len(chunk), size), dtype=np.int64))
    return np.concatenate(parts)


def permutation(size: int, key: int, epoch: int) -> np.ndarray:
    """int64 [size]: the numbers 0 .. size-1 in an order that depends on (key, epoch) only.

    Sorts by a 64-bit hash of (key, epoch, number). For two numbers with one hash the smaller comes first.
    """
    return np.argsort(_hashes(np.arange(size), key, epoch), kind="stable")


def hash_key(seed: int, name: str) -> int:
    """A 64-bit key of a seed and a name (FNV-1a over their UTF-8 bytes, then mixed)."""
    value = 0xCBF29CE484222325
    for byte in f"{seed}:{name}".encode():
        value = ((value ^ byte) * 0x100000001B3) & _MASK
    return int(_mix64(np.array([value], dtype=np.uint64))[0])


def _block_size(num_items: int) -> int:
    """Items of a block: as few as MAX_BLOCKS allows."""
    return max(1, -(-num_items // MAX_BLOCKS))


def _hashes(numbers: np.ndarray, key: int, epoch: int) -> np.ndarray:
    """uint64 [numbers]: hash of (key, epoch, number)."""
    start = (key ^ (epoch * _GOLDEN)) & _MASK
    base = _mix64(np.array([start], dtype=np.uint64))[0]
    return _mix64(base + numbers.astype(np.uint64) * np.uint64(_GOLDEN))


def _mix64(values: np.ndarray) -> np.ndarray:
    """The finalizer of SplitMix64, a bijection of uint64 in which every input bit moves every output bit."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))

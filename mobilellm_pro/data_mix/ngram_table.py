"""The compiled inner loop of the simulation: a hash table of the n-grams of one pool, and what a sample does to it.

Only n-grams that occur in the pool can change the pool's cross entropy, so only these have a place, and the table is as
large as the pool whatever is read later. A node is one n-gram (a string of 1 to N tokens) and holds two counts of what
the model has seen: of the n-gram itself, and of the n-gram followed by any token of the same sample, which is its count
as a context. The key of a node is the slot of its prefix and its last token, 63 bits, stored in full: two n-grams
never share a node, and colliding slots cost a probe, not exactness. Because a slot is part of keys, a table is built
once and never grows.

A pool that holds an n-gram holds every part of it. So at each position the search goes from short to long, ends at the
first n-gram that the pool does not have, and starts from the node of the previous position: N probes a token at most.

This module is the only one of the room that imports numba. Its functions are called with the interpreter's lock
released, and compiled code is kept in `__pycache__`, or in the user's cache where that cannot be written (all that is
called stands in this file, so that no kept code is older than what it calls).

Names: S slots, N order, T tokens of a sample, B samples; orders count from 0 here, the length of the context.
"""

import numpy as np

from mobilellm_pro.data_mix.optional_packages import check_packages

check_packages()  # before numba is missed, whose own error would not say how to get it
from numba import njit  # noqa: E402

NODE = np.dtype(
    [("key", "<i8"), ("count", "<i8"), ("followed", "<i8"), ("pool_count", "<i4"), ("pool_followed", "<i4")]
)
"""32 bytes, two to a cache line: key, what the model has seen, and how often the pool has it (also: not at its end)."""
EMPTY = -1
MAX_SLOTS = 2**31 - 1  # a slot and a token make a key
_ABSENT = -1


def empty_table(num_slots: int) -> np.ndarray:
    """NODE [S] without nodes; the number of slots must be a power of two."""
    assert num_slots & (num_slots - 1) == 0 and num_slots <= MAX_SLOTS + 1
    nodes = np.zeros(num_slots, NODE)
    nodes["key"] = EMPTY
    return nodes


@njit(cache=True, nogil=True)
def insert_pool(nodes: np.ndarray, pool: np.ndarray, order: int, max_nodes: int) -> int:
    """Gives every n-gram of the pool a node and counts how often it occurs there.

    Args:
        nodes: NODE [S], empty; changed.
        pool: int32 [tokens].
        order: N.
        max_nodes: less than S.

    Returns:
        The number of nodes, or -1 where there would be more than max_nodes; the table is then of no use.
    """
    path = np.empty(order, np.int64)  # slots of the n-grams that end at the previous token
    used = 0
    for i in range(len(pool)):
        for n in range(min(order - 1, i), -1, -1):  # from long to short: path[n - 1] is still the previous token's
            context = path[n - 1] if n else _ABSENT
            slot = _find(nodes, _key(context, pool[i]))
            node = nodes[slot]
            if node.key == EMPTY:
                used += 1
                if used > max_nodes:
                    return -1
                node.key = _key(context, pool[i])
            node.pool_count += 1
            if i + 1 < len(pool):
                node.pool_followed += 1
            path[n] = slot
    return used


@njit(cache=True, nogil=True)
def measure(
    nodes: np.ndarray, seen: np.ndarray, tokens: np.ndarray, starts: np.ndarray, commit: np.ndarray,
    base: np.ndarray, concentration: np.ndarray, order_weights: np.ndarray, pool_tokens: int, influence: np.ndarray,
) -> None:  # fmt: skip
    """Adds samples to the counts one after the other, notes by how much the pool's cross entropy falls, and takes back
    those that are not to stay.

    Args:
        nodes: NODE [S] of a pool; changed.
        seen: int64 [1], tokens in the counts, the count of the empty context; changed.
        tokens: int32 [tokens of all samples].
        starts: int64 [B + 1], where each sample begins in it, then its end.
        commit: bool [B], whether the sample stays in the counts.
        base: float64 [vocabulary], the distribution that all orders are smoothed with.
        concentration: float64 [N], its weight in tokens.
        order_weights: float64 [N].
        pool_tokens: length of the pool.
        influence: float64 [B], set to the fall in nats per token of the pool.
    """
    order = len(concentration)
    scale = order_weights / (pool_tokens - np.arange(order))  # of so many positions the cross entropy is the mean
    longest = 0
    for b in range(len(commit)):
        longest = max(longest, starts[b + 1] - starts[b])
    path = np.empty((longest, order), np.int64)
    for b in range(len(commit)):
        sample = tokens[starts[b] : starts[b + 1]]
        fall = _add(nodes, sample, base, concentration, scale, path)
        # Every position of the pool has the empty context, and a sample meets it once a token.
        influence[b] = fall - order_weights[0] * np.log1p(len(sample) / (seen[0] + concentration[0]))
        if commit[b]:
            seen[0] += len(sample)
        else:
            _take_back(nodes, len(sample), path)


@njit(cache=True, nogil=True)
def _add(
    nodes: np.ndarray, sample: np.ndarray, base: np.ndarray, concentration: np.ndarray, scale: np.ndarray,
    path: np.ndarray,
) -> float:  # fmt: skip
    """Counts one sample and returns by how much the cross entropy falls, the part of the empty context left out.

    Sets path [T, N] to the slots of the n-grams that end at each token, absent ones to _ABSENT.

    The cross entropy is a sum of `-pool_count x log(count + smoothing)` over n-grams and of `+pool_followed x
    log(followed + concentration)` over contexts. Every count goes up one by one, and the logarithms of the ratios add
    up to that of the whole step, so an n-gram that comes again in the sample needs no special care.
    """
    fall = 0.0
    for i in range(len(sample)):
        token, present = sample[i], True
        for n in range(len(concentration)):
            context = path[i - 1, n - 1] if 0 < n <= i else _ABSENT
            if n > 0 and context == _ABSENT:
                path[i, n:] = _ABSENT  # neither do longer contexts occur in the pool
                break
            if n > 0:
                before = nodes[context]
                fall -= scale[n] * before.pool_followed * np.log1p(1.0 / (before.followed + concentration[n]))
                before.followed += 1
            path[i, n] = _ABSENT
            if present:
                slot = _find(nodes, _key(context, token))
                node = nodes[slot]
                present = node.key != EMPTY
                if present:
                    smoothing = concentration[n] * base[token]
                    fall += scale[n] * node.pool_count * np.log1p(1.0 / (node.count + smoothing))
                    node.count += 1
                    path[i, n] = slot
    return fall


@njit(cache=True, nogil=True)
def _take_back(nodes: np.ndarray, length: int, path: np.ndarray) -> None:
    """Undoes `_add` of a sample of `length` tokens, whose path this is."""
    order = path.shape[1]
    for i in range(length):
        for n in range(order):
            if path[i, n] == _ABSENT:
                break
            nodes[path[i, n]].count -= 1
            if n < order - 1 and i < length - 1:
                nodes[path[i, n]].followed -= 1


@njit(cache=True, nogil=True)
def cross_entropy(
    nodes: np.ndarray, seen: np.ndarray, pool: np.ndarray, base: np.ndarray, concentration: np.ndarray
) -> np.ndarray:
    """float64 [N]: the cross entropy of the pool under each order, nats per token; walks over the pool.

    Arguments are those of `measure`; pool is the int32 [tokens] that the table was built of.
    """
    order = len(concentration)
    total = np.zeros(order)
    path = np.empty(order, np.int64)
    for i in range(len(pool)):
        for n in range(min(order - 1, i), -1, -1):
            context = path[n - 1] if n else _ABSENT
            slot = _find(nodes, _key(context, pool[i]))
            followed = nodes[context].followed if n else seen[0]
            likely = nodes[slot].count + concentration[n] * base[pool[i]]
            total[n] += np.log((followed + concentration[n]) / likely)
            path[n] = slot
    return total / (len(pool) - np.arange(order))


@njit(cache=True, nogil=True)
def num_probes(nodes: np.ndarray) -> int:
    """Slots looked at to find every node once: one a node if no two met."""
    probes = 0
    for slot in range(len(nodes)):
        if nodes[slot].key != EMPTY:
            probes += 1 + ((slot - _home(nodes, nodes[slot].key)) & (len(nodes) - 1))
    return probes


@njit(cache=True, nogil=True)
def _find(nodes: np.ndarray, key: int) -> int:
    """The slot of a key, or the empty slot where it would stand; there is always an empty one."""
    slot = _home(nodes, key)
    while nodes[slot].key != key and nodes[slot].key != EMPTY:
        slot = (slot + 1) & (len(nodes) - 1)
    return slot


@njit(cache=True, nogil=True)
def _home(nodes: np.ndarray, key: int) -> int:
    """The slot where the search for a key begins: the finalizer of SplitMix64, then as many bits as there are slots."""
    mixed = np.uint64(key)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return int(np.int64((mixed ^ (mixed >> np.uint64(31))) & np.uint64(len(nodes) - 1)))


@njit(cache=True, nogil=True)
def _key(context: int, token: int) -> int:
    """63 bits that only the n-gram `token` after the n-gram in the slot `context` has (_ABSENT: after nothing)."""
    return ((int(context) + 1) << 32) | int(token)

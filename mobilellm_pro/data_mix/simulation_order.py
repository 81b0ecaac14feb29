"""The order in which a simulation reads its sources: sample by sample, interleaved by natural share, always the same.

The next sample of a source is due at (tokens read of it + phase x tokens of the sample) / share, with a phase in 0 .. 1
from the seed and the name; the sample that is due first comes next. So the tokens read of each source follow its share
at every moment, up to one sample. A source that has ended is left out.

Sources are plain iterators. A resumed simulation is given them from their beginning and reads past what it has had; a
checksum of what it passes must be that of the first time.
"""

import hashlib
import math
import zlib
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import numpy as np

from mobilellm_pro.data_mix.influence import check_ids


class Sample(NamedTuple):
    """One sample: number of its source, its own number there, and int32 [tokens]."""

    source: int
    number: int
    ids: np.ndarray


class SampleSource:
    """One source, read sample by sample, with a look ahead.

    Attributes:
        name: of the source.
        num_samples, num_tokens: that `take` has given so far.
        checksum: CRC-32 of their ids.
    """

    def __init__(self, name: str, samples: Iterable[np.ndarray], vocab_size: int) -> None:
        """Starts to read nothing yet; `samples` are int [tokens] each."""
        self.name, self.num_samples, self.num_tokens, self.checksum = name, 0, 0, 0
        self._samples, self._vocab_size = iter(samples), vocab_size
        self._ahead: deque[np.ndarray] = deque()

    def next_length(self) -> int:
        """Tokens of the sample that comes next; 0 at the end."""
        return len(self._ahead[0]) if self._ahead or self._read() else 0

    def take(self) -> np.ndarray:
        """int32 [tokens], the next sample; there must be one."""
        if not self._ahead:
            self._read()
        sample = self._ahead.popleft()
        self.num_samples += 1
        self.num_tokens += len(sample)
        self.checksum = zlib.crc32(sample.data, self.checksum)
        return sample

    def first_tokens(self, num_tokens: int) -> np.ndarray:
        """int32 [tokens]: as much of the beginning as there is, up to a number of tokens; the samples still come.

        Raises:
            ValueError: the source has no sample.
        """
        assert self.num_samples == 0
        found = sum(map(len, self._ahead))
        while found < num_tokens and self._read():
            found += len(self._ahead[-1])
        if not self._ahead:
            raise ValueError(f"source {self.name!r}: it has no samples: give it text, or leave it out")
        return np.concatenate(self._ahead)[:num_tokens]

    def skip(self, num_samples: int, checksum: int) -> None:
        """Reads past what an interrupted simulation has had; raises ValueError where that is not the same."""
        while self.num_samples < num_samples and self.next_length():
            self.take()
        if (self.num_samples, self.checksum) != (num_samples, checksum):
            raise ValueError(
                f"source {self.name!r}: its first {num_samples} samples are not those of the interrupted simulation "
                f"({self.num_samples} were read): give it the same text, or delete the saved state"
            )

    def _read(self) -> bool:
        """Puts one more sample into the look ahead; False at the end."""
        sample = next(self._samples, None)
        if sample is None:
            return False
        check_ids(sample, self._vocab_size, f"source {self.name!r}: sample {self.num_samples + len(self._ahead)}")
        self._ahead.append(np.ascontiguousarray(sample, dtype="<i4"))
        return True


class Interleaving:
    """Samples of several sources in the order in which they are due.

    Attributes:
        sources: one each.
    """

    def __init__(
        self, samples: Mapping[str, Iterable[np.ndarray]], shares: Mapping[str, float], seed: int, vocab_size: int
    ) -> None:
        """
        Args:
            samples: name of each source and its samples, int [tokens] each.
            shares: positive, in proportion to the tokens to read of each source; any sum.
            seed: of the phases.
            vocab_size: ids must be below.
        """
        self.sources = [SampleSource(name, source, vocab_size) for name, source in samples.items()]
        self._shares = [shares[source.name] for source in self.sources]
        self._phases = [_phase(seed, source.name) for source in self.sources]

    @property
    def num_samples(self) -> int:
        """Samples given so far."""
        return sum(source.num_samples for source in self.sources)

    @property
    def num_tokens(self) -> int:
        """Tokens of the samples given so far."""
        return sum(source.num_tokens for source in self.sources)

    def __iter__(self) -> Iterator[Sample]:
        """The sample that comes next, until every source has ended.

        Raises:
            ValueError: an empty sample or an id outside the vocabulary; names the source and the sample.
        """
        while (number := self._next_source()) is not None:
            source = self.sources[number]
            yield Sample(number, source.num_samples, source.take())

    def state(self) -> np.ndarray:
        """int64 [S, 2]: samples given of each source, and their checksum."""
        return np.array([(source.num_samples, source.checksum) for source in self.sources], np.int64)

    def load_state(self, state: np.ndarray) -> None:
        """Reads past the samples that had been given; raises ValueError where a source's are others."""
        for source, (num_samples, checksum) in zip(self.sources, state.tolist(), strict=True):
            source.skip(num_samples, checksum)

    def _next_source(self) -> int | None:
        """The source whose next sample is due first; of equals the first; None at the end of all."""
        due = []
        for source, share, phase in zip(self.sources, self._shares, self._phases, strict=True):
            length = source.next_length()
            due.append((source.num_tokens + phase * length) / share if length else math.inf)
        first = min(due)
        return due.index(first) if first < math.inf else None


def draw_pool(name: str, samples: Iterator[np.ndarray], pool_tokens: int) -> np.ndarray:
    """Takes the first samples of a source as the pool of its domain; what the iterator gives after that is not in it.

    Args:
        name: of the domain, for messages.
        samples: int [tokens] each; read until there are enough tokens.
        pool_tokens: of the pool; the rest of the last sample is dropped.

    Returns:
        int32 [pool_tokens].

    Raises:
        ValueError: the source ends before.
    """
    parts: list[np.ndarray] = []
    found = 0
    while found < pool_tokens:
        sample = next(samples, None)
        if sample is None:
            raise ValueError(
                f"domain {name!r}: its text has {found} tokens, its pool needs pool_tokens = {pool_tokens}: give it "
                "more text, or lower pool_tokens"
            )
        parts.append(np.asarray(sample))
        found += len(sample)
    return np.concatenate(parts)[:pool_tokens].astype(np.int32)


def _phase(seed: int, name: str) -> float:
    """0 <= phase < 1, written out so that no release of a library changes the order."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return int.from_bytes(digest[:6], "little") / 2**48

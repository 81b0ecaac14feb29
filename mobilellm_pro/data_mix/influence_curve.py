"""Influence of each source over the tokens read of it: running means as the simulation goes, features for regressors.

A sample of T tokens with influence delta counts as y = 1,000 delta / T, with weight T, so samples of different lengths
can stand in one mean:

    mean = sum T y / sum T = 1,000 sum delta / sum T        variance = sum T (y - mean)^2 / sum T

Both are taken since the last recorded point, because influence falls as the models fill. Points are recorded when the
simulation has read so many tokens of all sources together: at the same moment for all, with the models equally full.

Paper: section 4 ("aggregated into an influence vector"). Names: S sources, K domains, P points.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

PER_TOKENS = 1_000
_THIRD = 1 / 3
PARTS = ("early", "late", "decay")
"""Of `influence_features`, each with one column a domain."""


@dataclass(frozen=True)
class InfluenceCurve:
    """Influence of one source on every domain.

    Attributes:
        tokens: int64 [P], tokens of the source read at each point, growing.
        mean: float64 [P, K], nats per token of the pool per 1,000 tokens of samples, since the last point.
        variance: float64 [P, K], over those samples.
    """

    tokens: np.ndarray
    mean: np.ndarray
    variance: np.ndarray

    def mean_between(self, begin: float, end: float) -> np.ndarray:
        """float64 [K]: mean over the points that end in a part of the tokens, each weighted with its tokens.

        Args:
            begin, end: shares of the source's tokens, 0 <= begin < end <= 1. Where no point ends between them the one
                that reaches over `end` is taken.
        """
        share = self.tokens / self.tokens[-1]
        chosen = (share > begin) & (share <= end)
        if not chosen.any():
            chosen = np.arange(len(share)) == np.searchsorted(share, end)
        weights = np.diff(self.tokens, prepend=0)[chosen]
        return weights @ self.mean[chosen] / weights.sum()


def influence_matrix(curves: Mapping[str, InfluenceCurve]) -> np.ndarray:
    """float64 [S, K]: mean influence of each source on each domain over the whole simulation."""
    return np.stack([curve.mean_between(0, 1) for curve in curves.values()])


def utility_curve(curve: InfluenceCurve, values: Sequence[float] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What a source does for all domains together over its tokens: sum_D v_D Delta_sD, and how far samples spread.

    Args:
        curve: of the source.
        values: [K], what each domain counts, at least 0.

    Returns:
        mean and deviation, float64 [P] each, in the unit of the curve. The deviation is at most that: those of the
        domains are added up as if a sample were far off on all of them at once (covariances are not recorded).

    Raises:
        ValueError: values that are negative or do not fit the domains.
    """
    counts = np.asarray(values, np.float64)
    if counts.shape != curve.mean.shape[1:] or not (counts >= 0).all():
        raise ValueError(f"values: expected {curve.mean.shape[1]} numbers of at least 0, found {list(values)}")
    return curve.mean @ counts, np.sqrt(curve.variance) @ counts


def influence_features(curves: Mapping[str, InfluenceCurve]) -> np.ndarray:
    """What a regressor is told about each source: how it helps empty models, full ones, and how that falls.

    Returns:
        float64 [S, 3 K]: for each domain the mean influence over the first third of the source's tokens (early), over
        the last third (late), then the decay (early - late) / (|early| + |late|) in -1 .. 1, 0 where both are 0.
    """
    early = np.stack([curve.mean_between(0, _THIRD) for curve in curves.values()])
    late = np.stack([curve.mean_between(1 - _THIRD, 1) for curve in curves.values()])
    size = np.abs(early) + np.abs(late)
    decay = np.divide(early - late, size, out=np.zeros_like(size), where=size > 0)
    return np.concatenate((early, late, decay), axis=1)


def influence_feature_names(domains: Sequence[str]) -> list[str]:
    """Names of the columns of `influence_features`: `early code`, ..., `decay web`."""
    return [f"{part} {domain}" for part in PARTS for domain in domains]


class CurveRecorder:
    """Collects the influence of samples as they come and closes a point when it is due."""

    def __init__(self, num_sources: int, num_domains: int, first_tokens: int, growth: float) -> None:
        """
        Args:
            num_sources: S.
            num_domains: K.
            first_tokens: tokens of all sources together before the first point.
            growth: each interval is as many times longer than the one before, at least 1.
        """
        self._due, self._interval, self._growth = float(first_tokens), float(first_tokens), growth
        self._tokens = np.zeros(num_sources, np.int64)
        self._weight = np.zeros(num_sources)
        self._mean = np.zeros((num_sources, num_domains))
        self._squares = np.zeros((num_sources, num_domains))  # sum T (y - mean)^2
        self._points: list[tuple[int, int, np.ndarray, np.ndarray]] = []  # source, tokens, mean, variance

    def is_due(self, tokens: int) -> bool:
        """Whether a point is to be closed after so many tokens of all sources together."""
        return tokens >= self._due

    def add(self, source: int, num_tokens: int, influence_K: np.ndarray) -> None:
        """Takes one sample (West's update of a weighted mean and variance, one sample after the other)."""
        y = influence_K * (PER_TOKENS / num_tokens)
        self._tokens[source] += num_tokens
        self._weight[source] += num_tokens
        from_old = y - self._mean[source]
        self._mean[source] += from_old * (num_tokens / self._weight[source])
        self._squares[source] += num_tokens * from_old * (y - self._mean[source])

    def close_point(self) -> None:
        """Ends the interval of every source that had a sample in it."""
        for source in np.flatnonzero(self._weight).tolist():
            variance = self._squares[source] / self._weight[source]
            self._points.append((source, int(self._tokens[source]), self._mean[source].copy(), variance))
        for sums in (self._weight, self._mean, self._squares):
            sums[:] = 0
        total = self._tokens.sum()
        while self._due <= total:
            self._interval *= self._growth
            self._due += self._interval

    def curves(self, names: Sequence[str]) -> dict[str, InfluenceCurve]:
        """The closed points of each source, by name; raises ValueError for a source that has none."""
        curves = {}
        for source, name in enumerate(names):
            points = [point[1:] for point in self._points if point[0] == source]
            if not points:
                raise ValueError(f"source {name!r}: none of its samples was read: raise max_tokens, or leave it out")
            tokens, means, variances = zip(*points, strict=True)
            curves[name] = InfluenceCurve(np.array(tokens, np.int64), np.stack(means), np.stack(variances))
        return curves

    def state(self) -> dict[str, np.ndarray]:
        """All that `load_state` needs to go on to the bit."""
        sources, tokens, means, variances = zip(*self._points, strict=True) if self._points else ([], [], [], [])
        shape = (len(sources), self._mean.shape[1])
        return {
            "schedule": np.array([self._due, self._interval]),
            "tokens": self._tokens.copy(),
            "weight": self._weight.copy(),
            "mean": self._mean.copy(),
            "squares": self._squares.copy(),
            "point_source": np.array(sources, np.int64),
            "point_tokens": np.array(tokens, np.int64),
            "point_mean": np.array(means, np.float64).reshape(shape),
            "point_variance": np.array(variances, np.float64).reshape(shape),
        }

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Goes on from what `state` gave."""
        self._due, self._interval = state["schedule"].tolist()
        for sums, key in ((self._tokens, "tokens"), (self._weight, "weight"), (self._mean, "mean")):
            sums[:] = state[key]
        self._squares[:] = state["squares"]
        points = (state[f"point_{key}"] for key in ("source", "tokens", "mean", "variance"))
        self._points = [(int(source), int(tokens), *arrays) for source, tokens, *arrays in zip(*points, strict=True)]

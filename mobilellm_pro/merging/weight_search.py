"""The search for the weights of a merge: a fixed number of scores, from the plainest candidates to small steps.

    uniform, every branch alone, weights that are given
    lines       between each branch alone and uniform, for the barriers
    soup        branches from the best to the worst, each kept if the uniform average with it is better
    dirichlet   random weights
    refinement  from the best so far (`refinement.py`), for all parameters together, then for each group of layers

The candidate with the lowest score wins, so it is as good as the best branch and as uniform weights on the text that
it is scored on, whatever the refinement finds. The order of candidates is a function of settings and scores: a search
that is begun again with the scores that are known (`line_log.py`) asks for the next one.

Shapes: G groups of layers, B branches.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from mobilellm_pro.merging.refinement import REFINEMENTS

Score = Callable[[np.ndarray, str], float]
"""(weights [G, B], stage) -> what the merged model comes to, lower is better: bits per byte, KL, minus an accuracy."""

UNIFORM, ALONE, GIVEN, LINE, SOUP, DIRICHLET = "uniform", "alone", "given", "line", "soup", "dirichlet"

_DECIMALS = 9  # weights that are equal so far are one candidate


class Candidate(NamedTuple):
    """Weights that were scored."""

    weights: np.ndarray
    """[G, B]."""

    score: float
    """Infinite where the model's was no number."""

    stage: str


@dataclass(frozen=True)
class SearchSettings:
    """What is tried. See `fewest_scores` for the least budget."""

    method: str
    """"given", "uniform", or a refinement's name."""

    budget: int
    """Scores."""

    draws: int = 0
    """Dirichlet draws."""

    concentration: float = 1.0
    """Of the Dirichlet distribution: each parameter of it; below 1 most weight on few branches."""

    line_points: int = 0
    """Between each branch and uniform."""

    allow_negative: bool = False
    """Weights need only sum to 1 in the refinement."""

    seed: int = 0


def fewest_scores(num_branches: int, line_points: int, has_given: bool = False) -> int:
    """Scores that are made by any method."""
    return 1 + num_branches * (1 + line_points) + has_given


def search_weights(
    score: Score, num_branches: int, settings: SearchSettings, *, given: Sequence[float] | None = None, groups: int = 1
) -> list[Candidate]:
    """Tries weights until the budget is spent.

    Args:
        score: called once for each candidate.
        num_branches: B.
        settings: see there.
        given: [B] weights that are tried too.
        groups: G; all have the same weights until the refinement.

    Returns:
        all candidates in their order: uniform, each branch, the given one, and so on.

    Raises:
        ValueError: an unknown method, too small a budget.
    """
    least = fewest_scores(num_branches, settings.line_points, given is not None)
    if settings.budget < least:
        raise ValueError(f"budget = {settings.budget}: expected at least {least} scores")
    if settings.method not in ("given", "uniform", *REFINEMENTS):
        expected = ", ".join(("given", "uniform", *REFINEMENTS))
        raise ValueError(f"method = {settings.method!r}: expected one of {expected}")
    tried = _Tried(score, num_branches, groups, settings.budget)
    tried.shared(_uniform(num_branches), UNIFORM)
    for branch in np.eye(num_branches):
        tried.shared(branch, ALONE)
    _lines(tried, settings.line_points)
    if given is not None:
        tried.shared(np.array(given, dtype=float), GIVEN)
    if settings.method in REFINEMENTS:
        try:
            _soup(tried)
            _draws(tried, settings)
            _refine(tried, settings)
        except _BudgetSpent:
            pass
    return tried.candidates


def chosen(candidates: Sequence[Candidate], method: str) -> Candidate:
    """What the method comes to: the lowest score, the first of several; or what was to be taken in any case."""
    if method in (UNIFORM, GIVEN):
        return next(candidate for candidate in candidates if candidate.stage == method)
    return min(candidates, key=lambda candidate: candidate.score)


class _BudgetSpent(Exception):
    """No more scores."""


class _Tried:
    """Candidates so far; none is scored twice."""

    def __init__(self, score: Score, num_branches: int, groups: int, budget: int) -> None:
        self.score, self.num_branches, self.groups, self.budget = score, num_branches, groups, budget
        self.candidates: list[Candidate] = []
        self._known: dict[bytes, float] = {}

    def shared(self, weights: np.ndarray, stage: str) -> float:
        """Score of one weight a branch, [B] or [1, B]."""
        return self.grouped(np.tile(weights.reshape(1, -1), (self.groups, 1)), stage)

    def grouped(self, weights: np.ndarray, stage: str) -> float:
        """Score of [G, B]."""
        key = (np.round(weights, _DECIMALS) + 0.0).tobytes()  # -0.0 is 0.0
        if key not in self._known:
            if len(self.candidates) >= self.budget:
                raise _BudgetSpent
            value = float(self.score(weights, stage))
            value = value if math.isfinite(value) else math.inf
            self._known[key] = value
            self.candidates.append(Candidate(weights, value, stage))
        elif stage in (UNIFORM, GIVEN):  # a row of its own all the same: it has to be found under its name
            self.candidates.append(Candidate(weights, self._known[key], stage))
        return self._known[key]

    @property
    def best(self) -> np.ndarray:
        """[G, B]."""
        return min(self.candidates, key=lambda candidate: candidate.score).weights


def _uniform(num_branches: int) -> np.ndarray:
    return np.full(num_branches, 1 / num_branches)


def _lines(tried: _Tried, points: int) -> None:
    uniform = _uniform(tried.num_branches)
    for branch in np.eye(tried.num_branches):
        for share in line_shares(points):
            tried.shared((1 - share) * branch + share * uniform, LINE)


def line_shares(points: int) -> list[float]:
    """Shares of uniform weights at the points between a branch and them, evenly spaced."""
    return [(number + 1) / (points + 1) for number in range(points)]


def _soup(tried: _Tried) -> None:
    """Greedy soup (Wortsman et al. 2022)."""
    alone = [tried.shared(branch, ALONE) for branch in np.eye(tried.num_branches)]
    order = np.argsort(alone, kind="stable")
    members, value = [order[0]], alone[order[0]]
    for branch in order[1:]:
        weights = np.zeros(tried.num_branches)
        weights[[*members, branch]] = 1 / (len(members) + 1)
        found = tried.shared(weights, SOUP)
        if found < value:
            members, value = [*members, branch], found


def _draws(tried: _Tried, settings: SearchSettings) -> None:
    rng = np.random.default_rng([settings.seed, 0])
    for weights in rng.dirichlet(np.full(tried.num_branches, settings.concentration), size=settings.draws):
        tried.shared(weights, DIRICHLET)


def _refine(tried: _Tried, settings: SearchSettings) -> None:
    """With several groups half of what is left goes to weights that all of them share."""
    refinement, whole = REFINEMENTS[settings.method], tried.budget
    if tried.groups > 1:
        tried.budget -= (whole - len(tried.candidates)) // 2
        start = tried.best[:1]
        try:
            refinement(lambda w: tried.shared(w, settings.method), start, settings.allow_negative, settings.seed)
        except _BudgetSpent:
            pass
        tried.budget = whole
    start = tried.best
    refinement(lambda w: tried.grouped(w, settings.method), start, settings.allow_negative, settings.seed)

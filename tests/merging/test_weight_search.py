"""The search on scores whose optimum is known, and what it guarantees whatever the score."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from mobilellm_pro.merging.line_log import LineLog
from mobilellm_pro.merging.refinement import REFINEMENTS
from mobilellm_pro.merging.search_plot import draw_search
from mobilellm_pro.merging.simplex import SimplexCoordinates, nearest_weights
from mobilellm_pro.merging.weight_search import (
    Candidate,
    SearchSettings,
    chosen,
    fewest_scores,
    line_shares,
    search_weights,
)

BEST = np.array([0.5, 0.27, 0.0, 0.23])


def quadratic(optimum: np.ndarray, asked: list[np.ndarray] | None = None):
    """A bowl whose axes are neither equal nor along the weights."""
    size = optimum.size
    turn = np.linalg.qr(np.random.default_rng(3).normal(size=(size, size)))[0]
    matrix = turn @ np.diag(np.linspace(1, 6, size)) @ turn.T

    def score(weights: np.ndarray, stage: str) -> float:
        if asked is not None:
            asked.append(weights)
        away = (weights - optimum).ravel()
        return 2.0 + float(away @ matrix @ away)

    return score


@pytest.mark.parametrize("method", REFINEMENTS)
def test_it_finds_the_optimum_of_a_quadratic(method: str):
    settings = SearchSettings(method, budget=250, draws=16, seed=1)
    candidates = search_weights(quadratic(BEST), 4, settings)
    best = chosen(candidates, method)
    assert np.abs(best.weights - BEST).max() < 0.02
    assert all(abs(c.weights.sum() - 1) < 1e-12 and c.weights.min() >= 0 for c in candidates)
    assert best.stage == method, "the refinement did better than all before it"


@pytest.mark.parametrize("method", REFINEMENTS)
def test_groups_of_layers_get_weights_of_their_own(method: str):
    optimum = np.array([[0.8, 0.2, 0.0], [0.1, 0.3, 0.6]])
    settings = SearchSettings(method, budget=400, draws=8, seed=1)
    shared = chosen(search_weights(quadratic(optimum), 3, settings, groups=2)[:40], method)
    best = chosen(search_weights(quadratic(optimum), 3, settings, groups=2), method)
    assert np.abs(best.weights - optimum).max() < 0.03 and best.score < shared.score
    assert (shared.weights[0] == shared.weights[1]).all(), "first the groups have the same weights"


@pytest.mark.parametrize("method", REFINEMENTS)
def test_negative_weights_only_where_they_are_allowed(method: str):
    optimum = np.array([0.9, 0.4, -0.3])
    found = {
        allowed: chosen(
            search_weights(quadratic(optimum), 3, SearchSettings(method, 200, 8, allow_negative=allowed)), method
        )
        for allowed in (False, True)
    }
    assert found[False].weights.min() >= 0
    assert np.abs(found[True].weights - optimum).max() < 0.02 and abs(found[True].weights.sum() - 1) < 1e-12


@pytest.mark.parametrize("method", REFINEMENTS)
@pytest.mark.parametrize("seed", range(3))
def test_it_is_never_worse_than_a_branch_or_uniform(method: str, seed: int):
    """Whatever the score is: here noise, in which nothing can be found, and some that are no numbers."""
    noise = np.random.default_rng(seed)

    def score(weights: np.ndarray, stage: str) -> float:
        return math.nan if noise.random() < 0.2 else float(noise.random())

    settings = SearchSettings(method, budget=40, draws=5, line_points=1, seed=seed)
    candidates = search_weights(score, 3, settings)
    stages = [candidate.stage for candidate in candidates]
    assert stages[:7] == ["uniform", "alone", "alone", "alone", "line", "line", "line"] and len(stages) <= 40
    assert chosen(candidates, method).score == min(candidate.score for candidate in candidates) < 1


def test_the_budget_counts_scores_and_no_weights_are_scored_twice():
    for budget in (fewest_scores(4, 2), 30):
        asked: list[np.ndarray] = []
        search_weights(quadratic(BEST, asked), 4, SearchSettings("coordinate", budget, 6, line_points=2))
        assert len(asked) == budget == len({np.round(weights, 9).tobytes() for weights in asked})
    with pytest.raises(ValueError, match="at least 13 scores"):
        search_weights(quadratic(BEST), 4, SearchSettings("coordinate", 12, line_points=2))
    with pytest.raises(ValueError, match="expected one of given, uniform, coordinate"):
        search_weights(quadratic(BEST), 4, SearchSettings("annealing", 12))


def test_greedy_soup():
    """The third branch spoils the average, the fourth improves it: the soup leaves the one out and goes on."""
    values = {(0,): 1.0, (1,): 1.1, (2,): 1.2, (3,): 1.3, (0, 1): 0.9, (0, 1, 2): 2.0, (0, 1, 3): 0.8}
    members = []

    def score(weights: np.ndarray, stage: str) -> float:
        members.append((stage, tuple(int(i) for i in np.flatnonzero(weights[0]))))
        return values.get(members[-1][1], 3.0)

    search_weights(score, 4, SearchSettings("coordinate", 8))
    assert [group for stage, group in members if stage == "soup"] == [(0, 1), (0, 1, 2), (0, 1, 3)]


def test_lines_lie_between_a_branch_and_uniform():
    candidates = search_weights(quadratic(BEST), 4, SearchSettings("uniform", 20, line_points=3))
    line = [candidate.weights[0] for candidate in candidates if candidate.stage == "line"]
    assert line_shares(3) == [0.25, 0.5, 0.75] and len(candidates) == 17
    assert np.allclose(line[3], [0.0625, 0.8125, 0.0625, 0.0625])


def test_weights_that_are_not_searched():
    score = quadratic(BEST)
    given = [0.7, 0.1, 0.1, 0.1]
    candidates = search_weights(score, 4, SearchSettings("given", 6), given=given)
    assert chosen(candidates, "given").weights.tolist() == [given]
    assert chosen(search_weights(score, 4, SearchSettings("uniform", 6)), "uniform").weights.tolist() == [[0.25] * 4]
    same = search_weights(score, 4, SearchSettings("given", 6), given=[0.25] * 4)
    assert chosen(same, "given").weights.tolist() == [[0.25] * 4], "also where it is a candidate anyway"
    searched = search_weights(score, 4, SearchSettings("coordinate", 60), given=BEST.tolist())
    assert chosen(searched, "coordinate").stage == "given", "beside a search they are one candidate more"


@pytest.mark.parametrize("method", REFINEMENTS)
def test_a_search_that_is_begun_again_asks_for_the_next_candidate(method: str, tmp_path: Path):
    settings = SearchSettings(method, budget=40, draws=4, seed=2)
    log, calls = tmp_path / "log.jsonl", []

    def run(path: Path, most: float) -> list[Candidate]:
        lines = LineLog(path)
        score = quadratic(np.array([[0.3, 0.5, 0.2], [0.1, 0.1, 0.8]]))

        def known(weights: np.ndarray, stage: str) -> float:
            def make() -> dict[str, float]:
                if len(calls) >= most:
                    raise KeyboardInterrupt
                calls.append(weights)
                return {"score": score(weights, stage)}

            return lines.recall({"weights": weights.tolist()}, make)["score"]

        return search_weights(known, 3, settings, groups=2)

    whole = run(tmp_path / "whole.jsonl", math.inf)
    calls.clear()
    for most in (7, 23):
        with pytest.raises(KeyboardInterrupt):
            run(log, most)
    again = run(log, math.inf)
    assert [(c.weights.tolist(), c.score, c.stage) for c in again] == [
        (c.weights.tolist(), c.score, c.stage) for c in whole
    ]
    assert len(calls) == 40 and log.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_a_line_that_a_kill_cut_short_is_made_anew(tmp_path: Path):
    path = tmp_path / "log.jsonl"
    log = LineLog(path)
    log.recall({"name": "x", "weights": [0.1]}, lambda: {"score": 0.1 + 0.2})
    with path.open("a") as stream:
        stream.write('{"name": "y", "sco')
    log = LineLog(path)
    assert log.recall({"name": "x"}, dict)["score"] == 0.1 + 0.2
    assert log.recall({"name": "y"}, lambda: {"score": 1})["score"] == 1
    assert [record["name"] for record in LineLog(path).records] == ["x", "y"]
    with pytest.raises(ValueError, match="not JSON compliant"):
        log.recall({"name": "z"}, lambda: {"score": math.nan})
    assert json.loads(path.read_text().splitlines()[0]) == {"name": "x", "weights": [0.1], "score": 0.1 + 0.2}


def test_nearest_weights_are_the_nearest():
    """Against the conditions of optimality: one c with w = max(x - c, 0)."""
    points = np.random.default_rng(0).normal(size=(200, 5))
    weights = nearest_weights(points)
    assert np.allclose(weights.sum(1), 1) and weights.min() >= 0
    for point, found in zip(points, weights):
        excess = (point - found)[found > 0]
        assert np.ptp(excess) < 1e-12 and (point[found == 0] <= excess[0] + 1e-12).all()
    free = nearest_weights(points, allow_negative=True)
    assert np.allclose(free.sum(1), 1) and np.allclose(np.ptp(points - free, axis=1), 0)


def test_coordinates_there_and_back():
    rng = np.random.default_rng(0)
    space = SimplexCoordinates(np.full((2, 4), 0.25))
    weights = rng.dirichlet(np.ones(4), size=2)
    assert space.size == 6 and np.allclose(space.weights(space.coordinates(weights)), weights)
    step = np.eye(6)[3] * 0.1
    assert np.linalg.norm(space.weights(step) - space.origin) == pytest.approx(0.1), "orthonormal"


def test_the_plot_shows_scores_that_are_no_numbers_as_gaps():
    pytest.importorskip("matplotlib")
    candidates = [
        Candidate(np.full((2, 2), 0.5), math.inf, "uniform"),
        Candidate(np.array([[1.0, 0.0]] * 2), 2.0, "alone"),
    ]
    picture = draw_search(candidates, candidates[1].weights, ["a", "b"], ["embedding", "layers"], score="bits")
    assert picture.startswith(b"\x89PNG")

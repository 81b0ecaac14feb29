"""From good weights to better ones with few scores: coordinate steps, Nelder-Mead and CMA-ES, on the simplex.

Each takes `evaluate`, weights [G, B] -> score, lower is better, which remembers all that it is asked and raises an
exception of its own when the budget is spent; so none of them returns anything. All are functions of what they are
given and of the seed alone: asked again with the same answers, they ask the same questions.

Shapes: G groups of layers, B branches, N = G (B - 1) coordinates.
"""

import math
from collections.abc import Callable, Mapping

import numpy as np

from mobilellm_pro.merging.simplex import SimplexCoordinates, nearest_weights

Evaluate = Callable[[np.ndarray], float]
Refinement = Callable[[Evaluate, np.ndarray, bool, int], None]
"""(evaluate, weights [G, B] to begin with, allow_negative, seed)."""

FIRST_STEP, LEAST_STEP = 0.2, 0.005
"""Of weights."""
_MAX_UPDATES = 1000  # known points cost nothing, and a population in a corner is known


def coordinate_steps(evaluate: Evaluate, start: np.ndarray, allow_negative: bool, seed: int) -> None:
    """Every weight more and less, alone, the others alike; after a round without gain the step is halved."""
    best, value, step = start, evaluate(start), FIRST_STEP
    while step >= LEAST_STEP:
        before = value
        for place in np.ndindex(start.shape):
            for change in (step, -step):
                moved = best.copy()
                moved[place] += change
                moved = nearest_weights(moved, allow_negative)
                found = evaluate(moved)
                if found < value:
                    best, value = moved, found
                    break
        if value == before:
            step /= 2


def nelder_mead(evaluate: Evaluate, start: np.ndarray, allow_negative: bool, seed: int) -> None:
    """scipy's Nelder-Mead, begun with the start and a step along each coordinate."""
    from scipy.optimize import minimize

    space = SimplexCoordinates(start, allow_negative)
    simplex = np.concatenate((np.zeros((1, space.size)), FIRST_STEP * np.eye(space.size)))
    options = {"initial_simplex": simplex, "adaptive": True, "xatol": LEAST_STEP, "fatol": 0.0}
    minimize(lambda x: evaluate(space.weights(x)), simplex[0], method="Nelder-Mead", options=options)


def cma_es(evaluate: Evaluate, start: np.ndarray, allow_negative: bool, seed: int) -> None:
    """Evolution strategy with covariance matrix adaptation (Hansen's tutorial, arXiv 1604.00772, positive weights).

    A point outside the simplex is replaced by the nearest on it before it counts.
    """
    space, rng = SimplexCoordinates(start, allow_negative), np.random.default_rng([seed, 1])
    state = _Evolution(space.size)
    while state.deviation >= LEAST_STEP / 2 and state.updates < _MAX_UPDATES:
        drawn = [space.weights(state.draw(rng)) for _ in range(state.population)]
        scores = [evaluate(weights) for weights in drawn]
        state.update(np.stack([space.coordinates(drawn[i]) for i in np.argsort(scores, kind="stable")]))


class _Evolution:
    """Mean, step size and covariance of the population, with the tutorial's names and constants."""

    def __init__(self, size: int) -> None:
        self.size, self.population = size, 4 + int(3 * math.log(size)) if size > 1 else 4
        shares = math.log(self.population / 2 + 0.5) - np.log(np.arange(1, self.population // 2 + 1))
        self.shares = shares / shares.sum()
        mu = 1 / (self.shares**2).sum()
        self.mu = mu
        self.c_sigma = (mu + 2) / (size + mu + 5)
        self.d_sigma = 1 + 2 * max(0.0, math.sqrt((mu - 1) / (size + 1)) - 1) + self.c_sigma
        self.c_c = (4 + mu / size) / (size + 4 + 2 * mu / size)
        self.c_1 = 2 / ((size + 1.3) ** 2 + mu)
        self.c_mu = min(1 - self.c_1, 2 * (mu - 2 + 1 / mu) / ((size + 2) ** 2 + mu))
        self.length = math.sqrt(size) * (1 - 1 / (4 * size) + 1 / (21 * size**2))  # mean length of a normal vector
        self.mean, self.sigma, self.covariance = np.zeros(size), FIRST_STEP, np.eye(size)
        self.path_sigma, self.path_c, self.updates = np.zeros(size), np.zeros(size), 0

    @property
    def deviation(self) -> float:
        """Largest standard deviation of a coordinate."""
        return self.sigma * math.sqrt(self.covariance.diagonal().max())

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        """[N], normal around the mean."""
        return self.mean + self.sigma * np.linalg.cholesky(self.covariance) @ rng.standard_normal(self.size)

    def update(self, points: np.ndarray) -> None:
        """Learns from a population [population, N], the best first."""
        self.updates += 1
        steps = (points[: len(self.shares)] - self.mean) / self.sigma
        step = self.shares @ steps
        self.mean = self.mean + self.sigma * step
        root = np.linalg.cholesky(self.covariance)
        weight = math.sqrt(self.c_sigma * (2 - self.c_sigma) * self.mu)
        self.path_sigma = (1 - self.c_sigma) * self.path_sigma + weight * np.linalg.solve(root, step)
        norm = float(np.linalg.norm(self.path_sigma))
        expected = self.length * math.sqrt(1 - (1 - self.c_sigma) ** (2 * self.updates))
        steady = float(norm / expected < 1.4 + 2 / (self.size + 1))
        self.path_c = (1 - self.c_c) * self.path_c + steady * math.sqrt(self.c_c * (2 - self.c_c) * self.mu) * step
        kept = 1 - self.c_1 - self.c_mu + (1 - steady) * self.c_1 * self.c_c * (2 - self.c_c)
        spread = np.einsum("k,ki,kj->ij", self.shares, steps, steps)
        self.covariance = kept * self.covariance + self.c_1 * np.outer(self.path_c, self.path_c) + self.c_mu * spread
        self.sigma *= math.exp(min(1.0, self.c_sigma / self.d_sigma * (norm / self.length - 1)))


REFINEMENTS: Mapping[str, Refinement] = {
    "coordinate": coordinate_steps,
    "nelder_mead": nelder_mead,
    "cma_es": cma_es,
}
"""By name."""

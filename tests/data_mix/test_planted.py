"""Planted truth: text from known distributions, where the best order of the sources is arithmetic; all steps together.

A domain is a distribution p_s over token ids. The target is the domain `same`; `near` is half of it and half something
else, `copy` holds the very samples of `near` again, and `noise` is uniform. A perfect student of a mixture w predicts
q = sum_s w_s p_s, so its loss on the target is H(p_target, q), known in closed form: those are the calibration runs,
with noise added. The sources themselves are only seen through the simulation.
"""

import numpy as np
import pytest

from mobilellm_pro.data_mix.influence_curve import influence_features, influence_matrix
from mobilellm_pro.data_mix.regression import mixture_features
from mobilellm_pro.data_mix.regression_gaussian import GaussianProcess
from mobilellm_pro.data_mix.simulation import SimulationSettings, simulate
from mobilellm_pro.data_mix.weights import MixProblem, static_weights
from mobilellm_pro.data_mix.weights_search import objective, searched_weights
from mobilellm_pro.data_mix.weights_utility import Utility, regressor_utility, source_gains

VOCAB, SAMPLES, SAMPLE_TOKENS, POOL_TOKENS = 60, 80, 50, 1_500
NAMES = ("noise", "near", "same", "copy")  # not in the order of their utility
RUNS = 48
SEEDS = range(20)
NATURAL = np.full(4, 0.25)


def distributions(rng: np.random.Generator) -> np.ndarray:
    """[4, VOCAB] in the order of `NAMES`: Zipf's law over shuffled ids, and mixtures of that."""
    zipf = 1 / np.arange(1, VOCAB + 1)
    target, other = (rng.permutation(zipf / zipf.sum()) for _ in range(2))
    near = (target + other) / 2
    return np.stack((np.full(VOCAB, 1 / VOCAB), near, target, near))


def target_loss(weights: np.ndarray, domains: np.ndarray) -> np.ndarray:
    """H(p_target, sum_s w_s p_s), nats, [N] of mixtures [N, 4]."""
    return -np.log(weights @ domains) @ domains[NAMES.index("same")]


def features_by_simulation(rng: np.random.Generator, domains: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Influence features [4, F], and the influence of each source on the target [4]."""

    def draw(name: str, tokens: int) -> np.ndarray:
        return rng.choice(VOCAB, size=tokens, p=domains[NAMES.index(name)]).astype(np.int32)

    texts = {name: draw(name, SAMPLES * SAMPLE_TOKENS).reshape(SAMPLES, SAMPLE_TOKENS) for name in NAMES}
    texts["copy"] = texts["near"]
    pools = {name: draw(name, POOL_TOKENS) for name in NAMES} | {"target": draw("same", POOL_TOKENS)}
    settings = SimulationSettings(
        vocab_size=VOCAB,
        natural_share=dict.fromkeys(NAMES, 1.0),
        pool_tokens=POOL_TOKENS,
        base="uniform",
        record_tokens=2_000,
        targets=("target",),
    )
    curves = simulate({name: iter(text) for name, text in texts.items()}, pools, settings)
    return influence_features(curves), influence_matrix(curves)[:, -1]


def is_true_order(values: np.ndarray) -> bool:
    """same above near and copy, both above noise; the duplicate as good as its original, beside those distances."""
    noise, near, same, copy = values
    return same > max(near, copy) and min(near, copy) > noise and abs(near - copy) < 0.25 * (same - noise)


def ranked(seed: int) -> dict[str, bool]:
    """Whether each way to weights finds the order of one world."""
    rng = np.random.default_rng(seed)
    domains = distributions(rng)
    influence, on_target = features_by_simulation(rng, domains)
    mixtures = rng.dirichlet(np.ones(4), RUNS)
    losses = target_loss(mixtures, domains) + 0.01 * rng.normal(size=RUNS)
    truth = lambda weights: -target_loss(weights, domains)  # noqa: E731
    assert is_true_order(source_gains(truth, NATURAL)), "the world itself has another order"
    problem = MixProblem(NAMES, (10**6,) * 4, train_tokens=10**6, temperature=0.5)
    found = {"influence alone": is_true_order(on_target)}
    for name, blocks in {"mixture and influence": ("logs", "roots"), "mixture's influence": ()}.items():
        model = GaussianProcess().fit(mixture_features(mixtures, influence, blocks), losses[:, None])
        utility = regressor_utility(model, influence=influence, blocks=blocks)
        found[name] = is_true_order(static_weights(problem, source_gains(utility, NATURAL)).weights)
    return found | {"search": gained_by_search(utility, truth) > 0.9}


def gained_by_search(utility: Utility, truth: Utility) -> float:
    """Of what the best mixture truly gains over the natural share, the part that the found one gains.

    Not the order: where much of a mixture is the target, the others hardly differ in what they add.
    """
    problem = MixProblem(NAMES, (10**6,) * 4, train_tokens=10**6, temperature=0.1)
    found, best = (searched_weights(problem, u, num_candidates=200).weights for u in (utility, truth))
    natural, ours, most = objective(problem, truth, np.stack((NATURAL, found, best)))
    return float((ours - natural) / (most - natural))


@pytest.fixture(scope="module")
def outcomes() -> list[dict[str, bool]]:
    return [ranked(seed) for seed in SEEDS]


@pytest.mark.parametrize("way", ["influence alone", "mixture and influence", "mixture's influence", "search"])
def test_sources_are_weighted_as_planted(outcomes: list[dict[str, bool]], way: str):
    right = [seed for seed, outcome in zip(SEEDS, outcomes) if outcome[way]]
    assert len(right) >= 19, f"right in {len(right)} of {len(SEEDS)} seeds"


def test_uninformative_calibration_would_not_pass():
    """The other way round: losses that do not depend on the mixture give no such order, so the bar means something."""
    right = 0
    for seed in range(8):
        rng = np.random.default_rng(seed)
        mixtures = rng.dirichlet(np.ones(4), RUNS)
        model = GaussianProcess().fit(mixture_features(mixtures), rng.normal(size=(RUNS, 1)))
        gains = source_gains(regressor_utility(model), NATURAL)
        problem = MixProblem(NAMES, (10**6,) * 4, train_tokens=10**6, temperature=0.5)
        right += is_true_order(static_weights(problem, gains).weights)
    assert right <= 4

"""Weights: the exact solution within limits, decimals that sum to 1, the search, and what is infeasible."""

import tomllib
from decimal import Decimal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mobilellm_pro.data_mix.regression import mixture_features
from mobilellm_pro.data_mix.regression_linear import Linear
from mobilellm_pro.data_mix.weights import (
    PAPER_TABLE_2,
    MixProblem,
    WeightResult,
    baseline_weights,
    datasets_fragment,
    static_weights,
)
from mobilellm_pro.data_mix.weights_search import objective, searched_weights
from mobilellm_pro.data_mix.weights_simplex import UNITS, decimal_shares, fill, share_limits
from mobilellm_pro.data_mix.weights_utility import mean_utility, regressor_utility, source_gains

NAMES = ("web", "code", "math", "wiki")
TOKENS = (1_000, 250, 100, 20)


def problem(**changes) -> MixProblem:
    return MixProblem(**{"names": NAMES, "tokens": TOKENS, "train_tokens": 1_400, "temperature": 0.5, **changes})


# Water filling and decimals


@st.composite
def limited_priors(draw) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A prior, and limits that some shares meet."""
    count = draw(st.integers(1, 7))
    numbers = st.floats(1e-6, 1.0)
    prior = np.array(draw(st.lists(numbers, min_size=count, max_size=count)))
    inside = np.array(draw(st.lists(numbers, min_size=count, max_size=count)))
    inside /= inside.sum()
    low = inside * np.array(draw(st.lists(st.floats(0, 1), min_size=count, max_size=count)))
    high = inside + (1 - inside) * np.array(draw(st.lists(st.floats(0, 1), min_size=count, max_size=count)))
    return prior, low, high


@given(limited_priors())
def test_fill_meets_the_conditions_of_optimality(case):
    """Sum 1, within the limits, and no information is gained by moving share from one corpus to another."""
    prior, low, high = case
    shares = fill(prior, low, high)
    assert abs(shares.sum() - 1) < 1e-9 and (shares >= low - 1e-12).all() and (shares <= high + 1e-12).all()
    ratio = shares / prior  # must be the same where free, smaller at a cap, larger at a floor
    below_cap, above_floor = shares < high - 1e-9, shares > low + 1e-9
    if below_cap.any() and above_floor.any():
        assert ratio[above_floor].max() <= ratio[below_cap].min() * (1 + 1e-6)


@given(limited_priors())
def test_decimals_sum_to_one_and_keep_the_limits(case):
    prior, low, high = case
    units_low, units_high = np.floor(low * UNITS).astype(int), np.ceil(high * UNITS).astype(int)
    shares = fill(prior, low, high)
    units = decimal_shares(shares, units_low, units_high)
    assert units.sum() == UNITS and (units >= units_low).all() and (units <= units_high).all()
    assert np.abs(units / UNITS - shares).max() < 2e-6


def test_fill_refuses_what_no_shares_meet():
    with pytest.raises(ValueError, match="above 0"):
        fill(np.array([0.0, 1.0]), np.zeros(2), np.ones(2))
    with pytest.raises(ValueError, match="sum to 1"):
        fill(np.ones(2), np.zeros(2), np.full(2, 0.4))


# Static weights


def test_without_limits_the_weights_are_the_tilted_natural_share():
    utility = np.array([0.0, 0.3, 0.6, -0.2])
    result = static_weights(problem(epoch_cap=1000.0), utility)
    expected = np.array(TOKENS) * np.exp(utility / 0.5)
    np.testing.assert_allclose(result.weights, expected / expected.sum(), atol=1e-6)
    assert [row["limit"] for row in result.explain()] == [""] * 4


def test_cap_holds_exactly_and_the_others_keep_their_ratios():
    utility = np.array([0.0, 0.0, 0.0, 5.0])
    result = static_weights(problem(), utility)
    assert result.weights[3] * 1_400 <= 4 * 20 and result.weights[3] == pytest.approx(80 / 1_400, abs=1e-6)
    np.testing.assert_allclose(result.weights[:3] / result.weights[0], [1, 0.25, 0.1], atol=1e-4)
    assert result.explain()[3]["limit"] == "cap" and result.epochs[3] <= 4


def test_floor_holds_and_says_so():
    result = static_weights(problem(floor=0.05, epoch_cap=10.0), np.array([0.0, 0.0, -9.0, 0.0]))
    assert result.weights[2] == 0.05 and result.explain()[2]["limit"] == "floor"


@pytest.mark.parametrize(("temperature", "nearest"), [(1e6, "natural"), (1e-6, "best")])
def test_temperature_goes_from_natural_share_to_the_best_corpus(temperature: float, nearest: str):
    utility = np.array([0.1, 0.4, 0.2, 0.3])
    weights = static_weights(problem(temperature=temperature, epoch_cap=1e9), utility).weights
    expected = np.array(TOKENS) / sum(TOKENS) if nearest == "natural" else [0, 1, 0, 0]
    np.testing.assert_allclose(weights, expected, atol=5e-6)


def test_static_weights_solve_the_stated_problem():
    """No mixture within the limits has a higher U(w) - temperature KL(w || natural)."""
    utility = np.array([0.1, -0.4, 0.8, 1.2])
    task = problem(floor=0.02)
    result = static_weights(task, utility)
    rng = np.random.default_rng(0)
    others = np.stack([task.within_limits(row) for row in rng.dirichlet(np.ones(4), 3000) + 1e-9])
    nearby = np.stack([task.within_limits(result.weights * np.exp(0.05 * rng.normal(size=4))) for _ in range(1000)])
    linear = lambda weights: weights @ utility  # noqa: E731
    values = objective(task, linear, np.concatenate((result.weights[None], others, nearby)))
    assert values[0] >= values.max() - 1e-6


def test_interval_covers_the_draws():
    rng = np.random.default_rng(0)
    center, doubt = np.array([0.0, 0.2, 0.4, 0.1]), np.array([0.0, 0.01, 0.3, 0.01])
    draws = center + doubt * rng.normal(size=(200, 4))
    result = static_weights(problem(epoch_cap=100.0), center, draws)
    single = [static_weights(problem(epoch_cap=100.0), draw).weights for draw in draws]
    np.testing.assert_allclose(result.low, np.minimum(np.percentile(single, 5, axis=0), result.weights), atol=2e-6)
    np.testing.assert_allclose(result.high, np.maximum(np.percentile(single, 95, axis=0), result.weights), atol=2e-6)
    relative = (result.high - result.low) / result.weights
    assert relative.argmax() == 2 and result.num_draws == 200
    alone = static_weights(problem(), center)
    assert alone.num_draws == 0 and (alone.low == alone.weights).all() and (alone.high == alone.weights).all()


# What is infeasible


def test_infeasible_caps_name_corpora_and_missing_tokens():
    with pytest.raises(ValueError, match="infeasible") as raised:
        problem(train_tokens=10_000)
    message = str(raised.value)
    assert "5,480; 4,520 tokens are missing" in message  # 4 x 1,370
    for name, most in zip(NAMES, ("4,000", "1,000", "400", "80")):
        assert f"{name} at most {most}" in message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"floor": 0.1},
            r"floor = 0.1 is infeasible for 'wiki': 0.1 of 1,400 tokens is more than 4 passes over its 20",
        ),
        ({"floor": 0.3, "epoch_cap": 1000.0}, "floor = 0.3 is infeasible: 4 corpora can have at most 0.25"),
        ({"floor": -0.1}, "floor = -0.1"),
        ({"epoch_cap": 0.0}, "epoch_cap = 0.0"),
        ({"temperature": 0.0}, "temperature = 0.0"),
        ({"temperature": float("nan")}, "temperature = nan"),
        ({"names": ("web", "web", "math", "wiki")}, "'web' occurs twice"),
        ({"tokens": (1_000, 0, 100, 20)}, "'code' has 0 tokens"),
        ({"tokens": (1_000,)}, "found 1 for 4 names"),
        ({"natural_share": [0.5, 0.5, 0.0, 0.0]}, "natural_share: expected 4 numbers above 0"),
        ({"train_tokens": 0}, "train_tokens = 0"),
    ],
)
def test_problems_that_have_no_solution_are_refused(changes, message: str):
    with pytest.raises(ValueError, match=message):
        problem(**changes)


def test_a_utility_that_is_not_finite_names_its_corpus():
    with pytest.raises(ValueError, match="utility of 'math' is not finite"):
        static_weights(problem(), np.array([0.0, 1.0, np.nan, 0.0]))
    with pytest.raises(ValueError, match="expected one for each of 4"):
        static_weights(problem(), np.zeros(3))
    with pytest.raises(ValueError, match="mixture is not finite: web"):
        searched_weights(problem(), lambda weights: np.full(len(weights), np.nan))


def test_no_limit_is_a_cap_of_infinity():
    low, high = share_limits(NAMES, TOKENS, train_tokens=10**12, epoch_cap=float("inf"), floor=0.0)
    assert high.tolist() == [UNITS] * 4 and low.tolist() == [1] * 4


# Search


def test_search_finds_the_exact_solution_of_a_linear_utility():
    utility = np.array([0.1, -0.4, 0.8, 1.2])
    task = problem(floor=0.02)
    exact = static_weights(task, utility)
    found = searched_weights(task, lambda weights: weights @ utility, num_candidates=200)
    np.testing.assert_allclose(found.weights, exact.weights, atol=2e-3)
    np.testing.assert_allclose(found.utility, source_gains(lambda weights: weights @ utility, task.natural()))


def test_search_finds_the_top_of_a_curved_utility_and_draws_widen_it():
    """U = -|log w - log w*|^2 with its top inside the limits, far from the natural share."""

    def towards(top: np.ndarray):
        return lambda weights: -((np.log(weights + 1e-9) - np.log(top)) ** 2).sum(1)

    tops = np.array([[0.3, 0.3, 0.35, 0.05], [0.5, 0.2, 0.25, 0.05]])
    task = problem(epoch_cap=100.0, temperature=1e-6)
    found = searched_weights(task, towards(tops[0]), [towards(top) for top in tops], num_candidates=500)
    np.testing.assert_allclose(found.weights, tops[0], atol=2e-3)
    assert found.low[0] == pytest.approx(0.3, abs=2e-3) and found.high[0] == pytest.approx(0.49, abs=2e-3)
    again = searched_weights(task, towards(tops[0]), num_candidates=500)
    assert (again.weights == found.weights).all() and again.method == "search"


def test_utility_of_a_regressor_is_its_negative_loss():
    rng = np.random.default_rng(0)
    weights, influence = rng.dirichlet(np.ones(4), 30), rng.normal(size=(4, 3))
    losses = weights @ rng.normal(size=(4, 2)) + 3
    fitted = Linear().fit(mixture_features(weights, influence), losses)
    mean, std = fitted.predict(mixture_features(weights, influence))
    ours = regressor_utility(fitted, values=[0.25, 0.75], influence=influence)(weights)
    np.testing.assert_allclose(ours, -(0.25 * mean[:, 0] + 0.75 * mean[:, 1]))
    careful = regressor_utility(fitted, influence=influence, deviations=-1.0)(weights)
    np.testing.assert_allclose(careful, -mean.mean(1) - std.mean(1))
    both = mean_utility([lambda w: w[:, 0], lambda w: w[:, 1]])(weights)
    np.testing.assert_allclose(both, weights[:, :2].mean(1))
    with pytest.raises(ValueError, match="values: expected 2 numbers"):
        regressor_utility(fitted, values=[1.0], influence=influence)(weights)
    with pytest.raises(ValueError, match="at least one"):
        mean_utility([])


# Files and baselines


def test_fragment_is_toml_whose_weights_sum_to_one_as_decimals():
    result = static_weights(problem(), np.array([0.1, 0.2, 0.3, 0.4]))
    paths = {name: f'data/"tokens"/{name}' for name in NAMES}
    tables = tomllib.loads(datasets_fragment(result, paths), parse_float=Decimal)["data"]["datasets"]
    assert [table["name"] for table in tables] == list(NAMES) and [table["path"] for table in tables] == [
        *paths.values()
    ]
    assert sum(table["weight"] for table in tables) == Decimal(1)
    assert [float(table["weight"]) for table in tables] == result.weights.tolist()
    assert all(table.keys() == {"name", "path", "weight"} for table in tables)
    with pytest.raises(ValueError, match="no folder for math, wiki"):
        datasets_fragment(result, {"web": "a", "code": "b"})


def test_baselines_are_uniform_natural_and_the_papers():
    names = tuple(PAPER_TABLE_2)
    tokens = [1300, 263.8, 12.6, 28, 3.7, 19.6, 12.6]  # 10^9, Table 2
    found = baseline_weights(names, tokens)
    np.testing.assert_allclose(100 * found["natural"], [79.25, 16.08, 0.77, 1.71, 0.23, 1.19, 0.77], atol=0.01)
    np.testing.assert_allclose(found["uniform"], 1 / 7)
    np.testing.assert_allclose(found["paper"], np.array([89.75, 4.66, 1.92, 1.35, 1.02, 1.02, 0.24]) / 99.96)
    assert set(baseline_weights(NAMES, TOKENS)) == {"uniform", "natural"}
    with pytest.raises(ValueError, match="occurs twice"):
        baseline_weights(("a", "a"), (1, 2))


def test_explanation_holds_every_number_in_order():
    result: WeightResult = static_weights(problem(floor=0.02), np.array([0.1, 0.2, 0.3, 3.0]))
    rows = result.explain()
    assert [row["name"] for row in rows] == list(NAMES)
    for row, tokens in zip(rows, TOKENS):
        assert row["natural_share"] == tokens / sum(TOKENS) and row["low_limit"] == 0.02
        assert row["high_limit"] == pytest.approx(min(1, 4 * tokens / 1_400), abs=1e-6)
        assert row["epochs"] == pytest.approx(row["weight"] * 1_400 / tokens)
    tilt = np.array([row["natural_share"] * np.exp(row["utility"] / 0.5) for row in rows])
    np.testing.assert_allclose([row["unlimited"] for row in rows], tilt / tilt.sum())

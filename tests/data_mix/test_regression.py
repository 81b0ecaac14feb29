"""Regressors over mixtures: their definitions, what they promise on public measurements, and what they refuse."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.optimize import nnls
from scipy.stats import spearmanr

from mobilellm_pro.data_mix import regression_gaussian
from mobilellm_pro.data_mix.regression import REGRESSORS, mixture_features
from mobilellm_pro.data_mix.regression_calibration import Calibration, check_calibration
from mobilellm_pro.data_mix.regression_gaussian import GaussianProcess
from mobilellm_pro.data_mix.regression_linear import Linear
from mobilellm_pro.data_mix.regression_neural import NeuralEnsemble
from mobilellm_pro.data_mix.regression_score import leave_one_out, out_of_fold, rank_correlation
from mobilellm_pro.data_mix.regression_stack import Stack
from mobilellm_pro.data_mix.regression_trees import BoostedTrees
from mobilellm_pro.data_mix.regressor import Regressor, single_threaded
from tests.data_mix.regmix import Runs, load_runs

SMALL: dict[str, Callable[[int], Regressor]] = {
    "gaussian_process": GaussianProcess,
    "neural": lambda seed: NeuralEnsemble(seed, members=3, steps=60),
    "trees": lambda seed: BoostedTrees(seed, members=2, trees=10),
    "linear": Linear,
    "stack": lambda seed: Stack({"linear": Linear, "gaussian_process": GaussianProcess}, seed),
}
"""All of `REGRESSORS`, made quick."""


@pytest.fixture(scope="module")
def train() -> Runs:
    return load_runs("train")


@pytest.fixture(scope="module")
def test() -> Runs:
    return load_runs("test")


def score(regressor: Regressor, train: Runs, test: Runs, **blocks: tuple[str, ...]) -> float:
    regressor.fit(mixture_features(train.weights, **blocks), train.losses)
    predicted, _ = regressor.predict(mixture_features(test.weights, **blocks))
    return 100 * float(rank_correlation(predicted, test.losses).mean())


def test_gaussian_process_ranks_mixtures(train: Runs, test: Runs):
    assert score(REGRESSORS["gaussian_process"](0), train, test) >= 99.0


def test_neural_regressor_ranks_mixtures(train: Runs, test: Runs):
    assert score(REGRESSORS["neural"](0), train, test) >= 98.0


def test_few_runs_are_enough_for_a_useful_order(train: Runs, test: Runs):
    assert score(REGRESSORS["gaussian_process"](0), train.first(64), test) >= 97.0


def test_weights_alone_and_a_line_give_the_known_baseline(train: Runs, test: Runs):
    """83.1 is published for it: the data and the score are the ones that the bars speak of."""
    assert score(Linear(), train, test, blocks=("weights",)) == pytest.approx(83.1, abs=0.5)


def test_the_score_is_that_of_cross_validation_too(train: Runs, test: Runs):
    """Choosing by out-of-fold score does not deceive: it is near the score on other runs."""
    some = train.first(128)
    unseen = out_of_fold(GaussianProcess, mixture_features(some.weights), some.losses, folds=4)
    inside = 100 * rank_correlation(unseen, some.losses).mean()
    assert abs(inside - score(GaussianProcess(), some, test)) < 2


@pytest.mark.parametrize("name", REGRESSORS)
def test_a_fit_depends_on_the_seed_alone(name: str, train: Runs):
    features, losses = mixture_features(train.weights[:40]), train.losses[:40, :3]
    threads, outputs = torch.get_num_threads(), []
    try:
        for count in (1, 2, 2):
            torch.set_num_threads(count)
            torch.manual_seed(count)
            np.random.seed(count)
            outputs.append(SMALL[name](5).fit(features, losses).predict(features))
            assert torch.get_num_threads() == count, "the caller's threads were changed"
    finally:
        torch.set_num_threads(threads)
    for mean, std in outputs[1:]:
        np.testing.assert_array_equal(mean, outputs[0][0])
        np.testing.assert_array_equal(std, outputs[0][1])
    assert mean.shape == std.shape == losses.shape and (std >= 0).all() and np.isfinite(mean).all()


@pytest.mark.parametrize("name", REGRESSORS)
def test_units_and_constant_columns_do_not_matter(name: str, train: Runs):
    features, losses = mixture_features(train.weights[:40]), train.losses[:40, :2].copy()
    losses[:, 1] = 3.0
    plain, plain_std = SMALL[name](0).fit(features, losses).predict(features[:5])
    # a power of two: rounding is the same, so that trees split alike
    scaled, scaled_std = SMALL[name](0).fit(features, 1024 * losses).predict(features[:5])
    np.testing.assert_allclose(scaled[:, 0], 1024 * plain[:, 0], rtol=1e-6)
    np.testing.assert_allclose(plain[:, 1], 3.0, atol=0.1)
    np.testing.assert_allclose(scaled_std[:, 0], 1024 * plain_std[:, 0], rtol=1e-6)


@pytest.mark.parametrize("name", REGRESSORS)
def test_what_cannot_be_fitted_is_refused(name: str, train: Runs):
    features, losses = mixture_features(train.weights[:8]), train.losses[:8, :2].copy()
    with pytest.raises(ValueError, match="not fitted"):
        SMALL[name](0).predict(features)
    with pytest.raises(ValueError, match="at least 4 calibration runs, found 3"):
        SMALL[name](0).fit(features[:3], losses[:3])
    with pytest.raises(ValueError, match=r"features \[N, F\] and targets \[N, T\]"):
        SMALL[name](0).fit(features, losses[:7])
    fitted = SMALL[name](0).fit(features, losses)
    with pytest.raises(ValueError, match="34 features"):
        fitted.predict(features[:, :5])
    losses[2, 0] = np.nan
    with pytest.raises(ValueError, match=r"targets: rows \[2\] hold NaN"):
        SMALL[name](0).fit(features, losses)


def test_quick_regressors_are_those_offered():
    assert SMALL.keys() == REGRESSORS.keys()


@pytest.mark.parametrize("name", REGRESSORS)
def test_draws_have_the_mean_and_the_deviation_of_the_prediction(name: str, train: Runs):
    """Over many seeds, at mixtures that were fitted and others; 300 draws err by some percent of a deviation."""
    features, losses = mixture_features(train.weights[:24]), train.losses[:24, :2]
    asked = mixture_features(train.weights[20:28])
    fitted = SMALL[name](0).fit(features, losses)
    mean, std = fitted.predict(asked)
    with single_threaded():
        drawn = np.stack([fitted.draw(seed)(asked) for seed in range(300)])
    assert (np.abs(drawn.mean(0) - mean) <= 0.25 * std + 1e-12).all()
    np.testing.assert_allclose(drawn.std(0), std, rtol=0.25)
    one = fitted.draw(7)
    np.testing.assert_allclose(one(asked[:3]), one(asked)[:3], rtol=1e-6)  # one function, wherever it is asked
    with pytest.raises(ValueError, match="34 features"):
        one(features[:, :5])
    with pytest.raises(ValueError, match="not fitted"):
        SMALL[name](0).draw(0)


# Gaussian process


def test_gradient_of_the_likelihood_is_that_of_differences():
    rng = np.random.default_rng(0)
    inputs, target = rng.normal(size=(12, 3)), rng.normal(size=12)
    mean, precision = regression_gaussian._prior(3)
    at = mean + rng.normal(size=5) / 3
    value = lambda point: regression_gaussian._loss(point, inputs, target, mean, precision)[0]  # noqa: E731
    steps = 1e-5 * np.eye(5)
    numeric = [(value(at + step) - value(at - step)) / 2e-5 for step in steps]
    analytic = regression_gaussian._loss(at, inputs, target, mean, precision)[1]
    np.testing.assert_allclose(analytic, numeric, rtol=1e-6, atol=1e-6)


def test_posterior_is_the_definition():
    """K* K^-1 y and k** - K* K^-1 K*', with the kernel written out for one pair at a time."""
    rng = np.random.default_rng(1)
    features, target, new = rng.normal(size=(15, 2)), rng.normal(size=(15, 1)), rng.normal(size=(4, 2))
    process = GaussianProcess().fit(features, target)
    lengths, scale, noise = (
        np.exp(process._posteriors[0].parameters[:-2]),
        *np.exp(process._posteriors[0].parameters[-2:]),
    )
    spread = features.std(0)

    def covariance(one: np.ndarray, other: np.ndarray) -> float:
        r = np.sqrt(5 * ((((one - other) / spread) / lengths) ** 2).sum())
        return 1 + scale * (1 + r + r * r / 3) * np.exp(-r)

    known = np.array([[covariance(a, b) for b in features] for a in features]) + (noise + 1e-8) * np.eye(15)
    cross = np.array([[covariance(a, b) for b in features] for a in new])
    y, unit = target - target.mean(), target.std()
    mean, std = process.predict(new)
    np.testing.assert_allclose(mean, target.mean() + cross @ np.linalg.solve(known, y), atol=1e-8)
    variance = scale + 1 - np.einsum("ij,ji->i", cross, np.linalg.solve(known, cross.T))
    np.testing.assert_allclose(std[:, 0], unit * np.sqrt(variance), atol=1e-6)
    assert (process.predict(features * 0 + 50)[1] > process.predict(features)[1]).all(), "far off it knows less"


# The others


def test_linear_chooses_the_penalty_of_the_least_leave_one_out_error():
    """The closed form against fits without each run."""
    from mobilellm_pro.data_mix import regression_linear

    rng = np.random.default_rng(2)
    features = rng.normal(size=(14, 5))
    target = features @ rng.normal(size=5) + rng.normal(size=14)
    inputs = (features - features.mean(0)) / features.std(0)
    y = (target - target.mean()) / target.std()

    def error(penalty: float) -> float:
        total = 0.0
        for left_out in range(14):
            keep = np.arange(14) != left_out
            design = np.column_stack((np.ones(13), inputs[keep]))
            ridge = np.diag([0.0, *[penalty] * 5])
            solution = np.linalg.solve(design.T @ design + ridge, design.T @ y[keep])
            total += (y[left_out] - solution[0] - inputs[left_out] @ solution[1:]) ** 2
        return total

    best = min(regression_linear._PENALTIES, key=error)
    slopes = np.linalg.solve(inputs.T @ inputs + best * np.eye(5), inputs.T @ y)
    fitted = Linear().fit(features, target[:, None])
    np.testing.assert_allclose(fitted._slopes[:, 0], slopes, atol=1e-9)


def test_ensemble_is_the_mean_and_spread_of_its_members(train: Runs):
    features = mixture_features(train.weights[:60])
    ensemble = NeuralEnsemble(3, members=4, steps=50).fit(features, train.losses[:60])
    members = ensemble.predict_members(features[:7])
    mean, std = ensemble.predict(features[:7])
    assert members.shape == (4, 7, 13)
    np.testing.assert_array_equal(mean, members.mean(0))
    np.testing.assert_array_equal(std, members.std(0))
    assert (std > 0).all(), "members differ"


def test_stack_trusts_the_member_that_predicts_unseen_runs():
    class Constant:
        def fit(self, features: np.ndarray, targets: np.ndarray) -> "Constant":
            self.value = targets[0]  # of an arbitrary run
            return self

        def predict(self, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            return np.tile(self.value, (len(features), 1)), np.zeros((len(features), len(self.value)))

    rng = np.random.default_rng(3)
    features = rng.normal(size=(40, 4))
    targets = features @ rng.normal(size=(4, 2)) + 0.05 * rng.normal(size=(40, 2))
    stack = Stack({"constant": lambda seed: Constant(), "linear": Linear}).fit(features, targets)
    np.testing.assert_allclose(stack.shares.sum(0), 1)
    assert (stack.shares[1] > 0.9).all()
    mean, std = stack.predict(features)
    parts = [member.predict(features) for member in stack._members]
    np.testing.assert_allclose(mean, sum(a * m for a, (m, _) in zip(stack.shares, parts)))
    variance = sum(a * (s**2 + (m - mean) ** 2) for a, (m, s) in zip(stack.shares, parts))
    np.testing.assert_allclose(std, np.sqrt(variance))


def test_stack_weighs_its_members_by_predictions_of_unseen_runs():
    """A member that knows its runs by heart and nothing else gets no share."""

    class Memory:
        def fit(self, features: np.ndarray, targets: np.ndarray) -> "Memory":
            self.known = {row.tobytes(): target for row, target in zip(features, targets, strict=True)}
            self.other = targets.mean(0) + 3 * targets.std(0)
            return self

        def predict(self, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            mean = np.stack([self.known.get(row.tobytes(), self.other) for row in features])
            return mean, np.zeros_like(mean)

    rng = np.random.default_rng(6)
    features = rng.normal(size=(30, 3))
    targets = features @ rng.normal(size=(3, 2)) + 0.3 * rng.normal(size=(30, 2))
    stack = Stack({"memory": lambda seed: Memory(), "linear": Linear}, seed=2).fit(features, targets)
    np.testing.assert_array_equal(stack._members[0].predict(features)[0], targets)
    assert (stack.shares[1] > 0.95).all()
    unseen = [out_of_fold(maker, features, targets, folds=4, seed=2) for maker in stack.makers.values()]
    for target in range(2):
        center = targets[:, target].mean()
        table = np.stack([one[:, target] - center for one in unseen], axis=1)
        found = nnls(table, targets[:, target] - center)[0]
        np.testing.assert_allclose(stack.shares[:, target], found / found.sum())


def test_out_of_fold_predictions_never_saw_the_run():
    class Memory:
        """Predicts how many of the asked rows it was fitted on."""

        def fit(self, features: np.ndarray, targets: np.ndarray) -> "Memory":
            self.seen = set(features[:, 0].tolist())
            return self

        def predict(self, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            seen = np.array([[float(value in self.seen)] for value in features[:, 0].tolist()])
            return seen + 1000 * len(self.seen), seen

    features = np.arange(10.0)[:, None]
    assert set(out_of_fold(lambda seed: Memory(), features, features, folds=5)[:, 0]) == {8000.0}
    assert set(leave_one_out(lambda seed: Memory(), features, features)[:, 0]) == {9000.0}
    with pytest.raises(ValueError, match="at least 2"):
        out_of_fold(lambda seed: Memory(), features, features, folds=1)


def test_rank_correlation_is_spearmans():
    rng = np.random.default_rng(4)
    predicted, measured = rng.integers(0, 6, (30, 3)).astype(float), rng.integers(0, 6, (30, 3)).astype(float)
    expected = [spearmanr(predicted[:, t], measured[:, t])[0] for t in range(3)]
    np.testing.assert_allclose(rank_correlation(predicted, measured), expected)
    measured[:, 1] = 2.0
    assert np.isnan(rank_correlation(predicted, measured)).tolist() == [False, True, False]
    with pytest.raises(ValueError, match="one shape"):
        rank_correlation(predicted, measured[:, :2])


# Features and calibration


def test_features_are_weights_logs_roots_and_average_influence():
    weights, influence = np.array([[0.25, 0.75], [1.0, 0.0]]), np.array([[1.0, 2.0, 3.0], [5.0, 6.0, 7.0]])
    features = mixture_features(weights, influence, ("weights", "logs", "roots"))
    assert features.shape == (2, 9)
    np.testing.assert_array_equal(features[:, :2], weights)
    np.testing.assert_allclose(features[:, 2:4], np.log(weights + 0.001))
    np.testing.assert_allclose(features[:, 4:6], np.sqrt(weights))
    np.testing.assert_allclose(features[:, 6:], [[4.0, 5.0, 6.0], [1.0, 2.0, 3.0]])
    rounded = mixture_features(np.array([[0.333, 0.333, 0.333]]), blocks=("weights",))
    np.testing.assert_allclose(rounded.sum(), 1)


@pytest.mark.parametrize(
    ("weights", "influence", "blocks", "message"),
    [
        ([[0.5, 0.6]], None, ("logs",), r"row 0 is outside the simplex \(sum 1.1\)"),
        ([[0.5, 0.5], [1.5, -0.5]], None, ("logs",), "row 1 is outside"),
        ([[0.5, np.nan]], None, ("logs",), "outside"),
        ([0.5, 0.5], None, ("logs",), "a table"),
        ([[0.5, 0.5]], [[1.0]], ("logs",), r"\[2, F\]"),
        ([[0.5, 0.5]], [[1.0], [np.inf]], ("logs",), "finite"),
        ([[0.5, 0.5]], None, ("log",), "expected some of weights, logs, roots, found log"),
        ([[0.5, 0.5]], None, (), "without features"),
    ],
)
def test_features_refuse_what_is_no_mixture(weights, influence, blocks, message: str):
    with pytest.raises(ValueError, match=message):
        mixture_features(np.array(weights), None if influence is None else np.array(influence), blocks)


def calibration(**changes) -> Calibration:
    rng = np.random.default_rng(0)
    content = {
        "runs": tuple(f"run{number}" for number in range(12)),
        "domains": ("web", "code", "math"),
        "weights": rng.dirichlet(np.ones(3), 12),
        "targets": ("prose", "proofs"),
        "losses": 3 + rng.normal(size=(12, 2)) / 10,
    }
    return Calibration(**{**content, **changes})


def test_public_runs_are_a_calibration_without_problems(train: Runs):
    names = tuple(str(number) for number in range(len(train.weights)))
    check_calibration(Calibration(names, *train))
    check_calibration(calibration(), ["web", "math"])


@pytest.mark.parametrize(("value", "shown"), [(np.nan, "nan"), (np.inf, "inf"), (9.5, "9.5")])
def test_runs_that_diverged_are_named(value: float, shown: str):
    losses = calibration().losses.copy()
    losses[7, 1] = value
    with pytest.raises(ValueError, match=f"run 'run7' diverged: proofs is {shown}.*again or leave it out"):
        check_calibration(calibration(losses=losses))


def test_all_problems_of_a_calibration_at_once():
    weights = calibration().weights.copy()
    weights[:, 2] = 0
    wrong = calibration(runs=("run0",) * 2 + calibration().runs[2:], weights=weights)
    with pytest.raises(ValueError) as raised:
        check_calibration(wrong, ["web", "code", "math", "wiki"])
    message = str(raised.value)
    assert "the run name 'run0' occurs twice" in message
    assert "the domain 'math' is absent" in message and "the domain 'wiki' is absent" in message
    assert "mixture of run 'run5' is outside the simplex" in message
    some = calibration()
    few = calibration(runs=some.runs[:3], weights=some.weights[:3], losses=some.losses[:3])
    with pytest.raises(ValueError, match="3 runs are too few"):
        check_calibration(few)
    with pytest.raises(ValueError, match=r"expected weights \(12, 3\)"):
        calibration(weights=weights[:, :2])
    with pytest.raises(ValueError, match="the domain name 'web' occurs twice"):
        check_calibration(calibration(domains=("web", "web", "math")))

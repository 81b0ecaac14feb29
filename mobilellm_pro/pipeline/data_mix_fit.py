"""The steps `fit` and `weights` of the verb `mix`: from simulation and proxies to the weights and their report.

A mixture is described to the regressors by logs and roots of its weights and by its average of the corpora's influence
(`data_mix.regression`); beside that stands the same without influence, which is RegMix's way. All are judged alike:
every proxy is predicted from all the others.

The interval of a weight is over `fit.draws` utilities: a fit with another seed to losses as the proxies could have come
out (`data_mix.weights_draws`), and of that fit one function that it holds possible, a member of the ensemble or a draw
from the posterior (`Regressor.draw`).
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from mobilellm_pro.data_mix.influence_curve import InfluenceCurve, influence_features, influence_matrix
from mobilellm_pro.data_mix.regression import REGRESSORS, mixture_features
from mobilellm_pro.data_mix.regression_calibration import Calibration, check_calibration
from mobilellm_pro.data_mix.regression_score import leave_one_out, rank_correlation
from mobilellm_pro.data_mix.report_page import NAME, write_report
from mobilellm_pro.data_mix.report_record import make_report, prediction_record
from mobilellm_pro.data_mix.weights import (
    MixProblem,
    WeightResult,
    baseline_weights,
    datasets_fragment,
    static_weights,
)
from mobilellm_pro.data_mix.weights_draws import drawn_losses
from mobilellm_pro.data_mix.weights_search import searched_weights
from mobilellm_pro.data_mix.weights_utility import Utility, drawn_utility, regressor_utility, source_gains
from mobilellm_pro.pipeline.data_mix_calibration import read_calibration
from mobilellm_pro.pipeline.data_mix_folder import (
    FIT,
    WEIGHTS,
    WEIGHTS_RECORD,
    digest,
    read_if_made_of,
    write_json,
    write_text,
)
from mobilellm_pro.pipeline.data_mix_plan import MixPlan
from mobilellm_pro.pipeline.data_mix_simulation import natural_tokens, read_curves

UTILITY = "utility"
ALONE = "weights alone"
PAGE = f"{NAME}.html"
_INTERVAL = "residual bootstrap x draws of the regressor"  # weights with intervals of another kind are made again
_NOTES = (
    "Utility is minus the weighted mean of the proxies' bits per byte on the held-out text of the domains. The pools "
    "of the simulation are drawn from the same held-out text.",
    "Proxies are small and short: that their order of mixtures holds for a larger model is an assumption.",
    "Ours is the maximum of the very utility that judges it here, so its predicted utility is too high: expect a "
    "smaller gain over the others. Only a run on each mixture says which is better.",
    "An interval is over fits with other seeds to other losses (what each proxy is predicted from all the others, plus "
    "the error of such a prediction at a random proxy), and in each over what that fit holds possible: a member of the "
    "ensemble, or a draw from the posterior. It holds the noise of the proxies, their seeds among it, what the "
    "regressor misses and where it has seen no proxy; not how a larger model differs from the proxies. The noise is in "
    "the drawn losses and once more in the fit's own doubt, so the interval is too wide rather than too narrow.",
    "The losses that are drawn are smoother than those measured: predictions of unseen proxies differ less than the "
    "proxies do, and a fit to them smooths once more. The weights of the draws may therefore all lie on one side of "
    "the weight, nearer to the natural share; the interval is widened to hold the weight.",
    "Influence is the change of a mean over the orders of the n-grams: each order has a cross entropy of its own, "
    "smoothed with a fixed base distribution. The orders are not interpolated with each other; the mean bounds the "
    "cross entropy of their mixture from above, and was chosen because its change by a sample is exact at little cost.",
)


@dataclass(frozen=True)
class _Data:
    """What both steps start from: N proxies, K corpora, D domains.

    Attributes:
        runs: names of the proxies.
        weights, losses: [N, K] and [N, D], bits per byte.
        values: [D] weights of the utility.
        influence: [K, F] features of each corpus.
        curves: of the simulation.
        identity: digest of all of it.
    """

    runs: tuple[str, ...]
    weights: np.ndarray
    losses: np.ndarray
    values: np.ndarray
    influence: np.ndarray
    curves: dict[str, InfluenceCurve]
    identity: str


def fit(plan: MixPlan) -> dict[str, Any]:
    """Judges the regressors on mixtures that they have not seen, and writes fit.json.

    Returns:
        scores: regressor -> mean over domains and utility of the leave-one-mixture-out rank correlation; None where
            none is defined; predictions: see `report_record.prediction_record`, of the plan's regressor.

    Raises:
        FileNotFoundError: simulation or calibration have not been done.
        ValueError: calibration runs that diverged, domains that are absent, too few proxies.
    """
    data = _read(plan)
    names, made_of = _regressors(plan), _fit_identity(plan, data)
    found = read_if_made_of(plan.folder / FIT, made_of)
    if found is not None:
        print(f"fit: done, {plan.folder / FIT}", flush=True)
        return found
    targets = [UTILITY, *(domain.name for domain in plan.domains)]
    losses = np.concatenate((data.losses @ data.values[:, None], data.losses), axis=1)
    scores: dict[str, float | None] = {}
    predictions: dict[str, Any] = {}
    variants = [(name, influence) for name in names for influence in (data.influence, None)]
    for name, influence in tqdm(variants, desc="fit", unit="regressor", disable=None):
        features = mixture_features(data.weights, influence)
        predicted = leave_one_out(REGRESSORS[name], features, data.losses, seed=plan.seed)
        predicted = np.concatenate((predicted @ data.values[:, None], predicted), axis=1)
        rho = rank_correlation(predicted, losses)
        scores[name if influence is not None else f"{name}, {ALONE}"] = _mean(rho)
        if name == plan.fit.regressor and influence is not None:
            predictions = prediction_record(targets, data.runs, predicted, losses)
    record = {"made_of": made_of, "scores": scores, "predictions": predictions}
    write_json(plan.folder / FIT, record)
    for name, score in scores.items():
        print(f"fit: {name}: rank correlation {'undefined' if score is None else f'{score:.3f}'}", flush=True)
    return record


def find_weights(plan: MixPlan) -> dict[str, Any]:
    """Writes weights.toml, weights.json and the report.

    Returns:
        weights: for each corpus how its weight came about (`WeightResult.explain`).

    Raises:
        FileNotFoundError: an earlier step has not been done.
        ValueError: as `fit`; caps or a floor that cannot be met.
    """
    problem, data = mix_problem(plan), _read(plan)
    judged = read_if_made_of(plan.folder / FIT, _fit_identity(plan, data)) or fit(plan)
    paths = {corpus.name: corpus.path for corpus in plan.corpora}
    made_of = digest(judged["made_of"], asdict(plan.weights), plan.fit.draws, _INTERVAL, list(problem.tokens), paths)
    found = read_if_made_of(plan.folder / WEIGHTS_RECORD, made_of)
    if found is not None and all((plan.folder / name).is_file() for name in (WEIGHTS, PAGE)):
        print(f"weights: done, {plan.folder / WEIGHTS}", flush=True)
        return found
    predictions = [judged["predictions"][domain.name]["predicted"] for domain in plan.domains]
    drawn = drawn_losses(-np.array(predictions).T, data.losses, draws=plan.fit.draws, seed=plan.seed)
    utility, result = _solve(plan, problem, data, data.influence, list(drawn))
    _, alone = _solve(plan, problem, data, None, [])  # no interval of it is shown
    baselines = {**baseline_weights(problem.names, problem.tokens), f"regression on {ALONE}": alone.weights}
    (plan.folder / WEIGHTS_RECORD).unlink(missing_ok=True)  # of other settings: not beside a half of these files
    _report(plan, data, judged, result, baselines, utility)
    write_text(plan.folder / WEIGHTS, datasets_fragment(result, paths))
    record: dict[str, Any] = {"made_of": made_of, "method": result.method, "weights": result.explain()}
    write_json(plan.folder / WEIGHTS_RECORD, record)  # last: the step is done then
    for row in result.explain():
        print(f"weights: {row['name']} {row['weight']:.4f} ({row['low']:.4f} to {row['high']:.4f}), "
              f"natural share {row['natural_share']:.4f} {row['limit']}", flush=True)  # fmt: skip
    print(f"weights: {plan.folder / WEIGHTS}, for a job's --data.mix", flush=True)
    return record


def _read(plan: MixPlan) -> _Data:
    record, curves = read_calibration(plan), read_curves(plan.folder)
    rows = record["proxies"]
    runs = tuple(f"proxy {row['name']}" for row in rows)
    weights, losses = (np.array([row[key] for row in rows], np.float64) for key in ("weights", "bits_per_byte"))
    domains = tuple(domain.name for domain in plan.domains)
    check_calibration(Calibration(runs, tuple(plan.names), weights, domains, losses), plan.names)
    values = np.array([domain.weight for domain in plan.domains])
    influence = influence_features({name: curves[name] for name in plan.names})
    identity = digest(rows, values.tolist(), influence.tobytes())
    return _Data(runs, weights, losses, values, influence, curves, identity)


def _regressors(plan: MixPlan) -> list[str]:
    return list(dict.fromkeys([plan.fit.regressor, *plan.fit.compare]))


def _fit_identity(plan: MixPlan, data: _Data) -> str:
    return digest(data.identity, _regressors(plan), plan.seed)


def mix_problem(plan: MixPlan) -> MixProblem:
    """What weights are wanted for.

    Raises:
        FileNotFoundError: no such corpus.
        ValueError: caps and floors that cannot be met: which corpora, how many tokens are missing.
    """
    tokens, settings = natural_tokens(plan), plan.weights
    return MixProblem(
        list(tokens), list(tokens.values()), settings.train_tokens, settings.temperature, settings.epoch_cap,
        settings.floor,
    )  # fmt: skip


def _solve(
    plan: MixPlan, problem: MixProblem, data: _Data, influence: np.ndarray | None, drawn: list[np.ndarray]
) -> tuple[Utility, WeightResult]:
    """The utility by the plan's regressor, with or without influence, and the weights that follow from it.

    Args:
        drawn: losses [N, D] each, for the interval.
    """
    features, maker = mixture_features(data.weights, influence), REGRESSORS[plan.fit.regressor]

    fitted = maker(plan.seed).fit(features, data.losses)
    utility = regressor_utility(fitted, values=data.values, influence=influence)
    draws = []
    for seed, losses in enumerate(tqdm(drawn, desc="weights", unit="fit", disable=None if drawn else True), plan.seed):
        fitted = maker(seed + 1).fit(features, losses)
        draws.append(drawn_utility(fitted, seed + 1, values=data.values, influence=influence))
    if plan.weights.method == "search":
        return utility, searched_weights(problem, utility, draws, seed=plan.seed)
    at = problem.natural()
    gains = np.stack([source_gains(draw, at) for draw in draws]) if draws else None
    return utility, static_weights(problem, source_gains(utility, at), gains)


def _report(
    plan: MixPlan, data: _Data, judged: Mapping[str, Any], result: WeightResult, baselines: Mapping[str, np.ndarray],
    utility: Utility,
) -> list[Path]:  # fmt: skip
    mixtures = {"ours": result.weights, **baselines}
    predicted = utility(np.stack(list(mixtures.values())))
    measured = {"natural": "proxy 000", "uniform": "proxy 001"}
    notes = [
        f"Measured utility of the {name} share with no corpus below {plan.proxy.least_weight:g} ({run}): "
        f"{-float(data.losses[data.runs.index(run)] @ data.values):.4f}."
        for name, run in measured.items()
        if run in data.runs
    ]
    columns = [*plan.names, *(domain.name for domain in plan.targets)]
    values = {domain.name: value for domain, value in zip(plan.domains, data.values, strict=True)}
    curves = {name: data.curves[name] for name in plan.names}
    settings = {"corpora": plan.names, "domains": [[x.name, x.weight] for x in plan.domains], "proxies": len(data.runs)}
    settings |= {"seed": plan.seed, "job": str(plan.job), "words": list(plan.words)}
    settings |= {section: asdict(getattr(plan, section)) for section in ("simulation", "fit", "weights")}
    report = make_report(
        f"Mix of {', '.join(plan.names)}", result, baselines,
        influence=influence_matrix(curves),
        domains=columns,
        curves=curves,
        values=[values.get(name, 0.0) for name in columns],
        predictions=judged["predictions"],
        predicted_utility=dict(zip(mixtures, predicted.tolist(), strict=True)),
        scores={name: score for name, score in judged["scores"].items() if score is not None},
        settings=settings,
        notes=[*notes, *_NOTES],
    )  # fmt: skip
    return write_report(report, plan.folder)


def _mean(values: np.ndarray) -> float | None:
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else None

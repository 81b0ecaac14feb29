"""Data mixing: the speed of the simulation beside its bar, and regressors over mixtures on public measurements.

    bash launch/quickstart.sh                                  # or any prepared corpora: makes text and tokens
    python benchmarks/data_mix.py --write benchmarks/results/data_mix_<hardware>_<yyyymm>.md
    python benchmarks/data_mix.py --only influence --samples 1000000
    python benchmarks/data_mix.py --only regmix --regressors gaussian_process neural linear

influence   seven domains, samples of 256 tokens, one thread. First the inner update by size of the pools: core time a
            sample, beside the same update in plain Python with dictionaries (`tests/data_mix/influence_definition.py`)
            and the largest difference between the two. Then `simulate` from beginning to end, all included: reading,
            order, recording, a state every 100,000 samples. The bar is a million samples in an hour on one core. Last
            the update by one and by two threads in turn, by the clock: the median of the ratios, and their range.
            The offline corpora are five with a vocabulary of 4,096; the two with most tokens are halved. The synthetic
            language has 202,048 ids: half of the tokens follow the one before, half come from one distribution.
regmix      the regressors on RegMix's public runs (`tests/assets/regmix`): mixtures of 17 domains, 13 losses of models
            with a million parameters. Fitted on the first 64 to 512 runs; 100 x the mean over the losses of Spearman's
            rank correlation on the 256 test runs, and of 4-fold out-of-fold predictions of the runs themselves, by
            which features and settings were chosen. "weights" alone is the direct regression without logs and roots.
            Core seconds of all threads, for one fit on the runs and the prediction of the test runs. Then the neural
            regressor on 512 runs with --neural-seeds seeds.
students    `mix` on the offline corpora by a plan (done once; see --plan), then the proxies' job with --steps on the
            weights found, on equal weights and on natural share, each with --seeds of weights and order: equal tokens,
            other seeds than the proxies'. Bits per byte on held-out documents of each domain, of each as many tokens;
            intervals are 95 % t-intervals over the seeds. The plan's method and temperature were set after a look at
            what the regressor predicts (method "tilt" at 0.2 came first), before any student was run.
"""

import argparse
import json
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import cycle, islice
from pathlib import Path

import numpy as np
from machine import ROOT, describe, section_parser, write_sections
from scipy.stats import t as student_t

from mobilellm_pro.data.shards import Corpus
from mobilellm_pro.data_mix.influence import InfluenceModels
from mobilellm_pro.data_mix.ngram_model import NgramSettings, base_distribution
from mobilellm_pro.data_mix.regression import REGRESSORS, mixture_features
from mobilellm_pro.data_mix.regression_score import out_of_fold, rank_correlation
from mobilellm_pro.data_mix.simulation import SimulationSettings, simulate
from mobilellm_pro.data_mix.weights import baseline_weights
from mobilellm_pro.pipeline.data_mix import mix
from mobilellm_pro.pipeline.data_mix_plan import MixPlan, load_mix_plan
from mobilellm_pro.pipeline.data_mix_proxies import HELD_OUT, Proxy, run_proxies, write_mixture, write_test_job
from mobilellm_pro.pipeline.data_mix_simulation import natural_tokens
from tests.data_mix.influence_definition import PythonModel
from tests.data_mix.regmix import Runs, load_runs

SAMPLE_TOKENS = 256
DEBUG_CORPORA = ("encyclopedia", "code", "questions", "mathematics", "manuals")
NUM_DOMAINS = 7
FEATURES: dict[str, tuple[str, ...]] = {"logs-roots": ("logs", "roots"), "weights": ("weights",)}
"""Of regmix."""


# influence


def influence(options: argparse.Namespace) -> list[str]:
    """Both tables."""
    lines = [
        "| language | pool tokens a domain | tables MB | compiled, ms of core time a sample (least to most) "
        "| minutes of one core for a million samples, at most | plain Python, samples/s | largest difference |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    languages = {"offline corpora": offline_rows(options.tokens), "synthetic": synthetic_rows(202_048, 12_000)}
    for name, rows in languages.items():
        for pool_tokens in (50_000, 200_000, 800_000):
            lines.append(f"| {name} | {pool_tokens:,} | {update_speed(rows, pool_tokens, options.repeats)} |")
    lines += [
        "",
        "| language | samples | simulate, core minutes | by the clock | a million samples, minutes of one core |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, rows in languages.items():
        lines.append(f"| {name} | {simulate_speed(rows, options.samples)} |")
    lines += ["", "| language | two threads, times as fast as one (least to most) |", "|---|---:|"]
    lines += [f"| {name} | {thread_speed(rows)} |" for name, rows in languages.items()]
    return lines


def offline_rows(folder: Path) -> dict[str, np.ndarray]:
    """name -> int32 [samples, 256] in random order: the debug corpora, the two largest as halves."""
    rng = np.random.default_rng(0)
    rows = {name: samples_of(np.concatenate(Corpus.open(folder / name).shard_ids)) for name in DEBUG_CORPORA}
    for name in sorted(rows, key=lambda name: -len(rows[name]))[: NUM_DOMAINS - len(rows)]:
        whole = rows.pop(name)
        rows |= {f"{name} {part}": half for part, half in enumerate(np.array_split(whole, 2))}
    return {name: rng.permutation(part) for name, part in rows.items()}


def synthetic_rows(vocab_size: int, samples: int) -> dict[str, np.ndarray]:
    """name -> int32 [samples, 256]: for each domain Zipf-like ids, half of them a function of the token before."""
    rng = np.random.default_rng(0)
    rows = {}
    for domain in range(NUM_DOMAINS):
        ids = np.empty((samples, SAMPLE_TOKENS), np.int64)
        previous = np.zeros(samples, np.int64)
        for place in range(SAMPLE_TOKENS):
            rank = (vocab_size ** rng.random(samples)).astype(np.int64) - 1  # density 1 / rank
            successor = (previous * 7919 + (8 ** rng.random(samples)).astype(np.int64) * 104_729 + domain) % vocab_size
            previous = np.where(rng.random(samples) < 0.5, rank, successor)
            ids[:, place] = previous
        rows[str(domain)] = ids.astype(np.int32)
    return rows


def samples_of(tokens: np.ndarray) -> np.ndarray:
    """int32 [samples, 256] of one long text."""
    return tokens[: len(tokens) // SAMPLE_TOKENS * SAMPLE_TOKENS].reshape(-1, SAMPLE_TOKENS).astype(np.int32)


def vocabulary(rows: dict[str, np.ndarray]) -> int:
    """Ids of a language."""
    return 1 + max(int(part.max()) for part in rows.values())


def update_speed(rows: dict[str, np.ndarray], pool_tokens: int, repeats: int) -> str:
    """Cells of a row of the first table: the least time of some repeats, each with new samples."""
    pool_rows = pool_tokens // SAMPLE_TOKENS
    pools = {name: part[:pool_rows].ravel() for name, part in rows.items()}
    base = base_distribution([part[pool_rows:].ravel() for part in rows.values()], vocabulary(rows))
    models = InfluenceModels(pools, base, NgramSettings())
    per_domain = min(len(part) for part in rows.values()) - pool_rows
    stream = [(part[pool_rows + number], own) for number in range(per_domain) for own, part in enumerate(rows.values())]
    python = [PythonModel(pool.tolist(), base.tolist(), NgramSettings()) for pool in pools.values()]
    begin, reference = time.process_time(), []
    for sample, own in stream[:100]:
        ids = sample.tolist()
        reference.append([model.measure(ids, number == own) for number, model in enumerate(python)])
    python_speed = len(reference) / (time.process_time() - begin)
    ours = models.measure(*zip(*stream[:100], strict=True))
    seconds = []
    for part in np.array_split(np.arange(100, len(stream)), repeats):
        samples, own = zip(*(stream[number] for number in part), strict=True)
        begin = time.process_time()
        models.measure(samples, own)
        seconds.append((time.process_time() - begin) / len(part))
    return (
        f"{models.table_bytes / 1e6:.0f} | {min(seconds) * 1e3:.3f} to {max(seconds) * 1e3:.3f} | "
        f"{max(seconds) * 1e6 / 60:.1f} | {python_speed:.0f} | {np.abs(ours - np.array(reference)).max():.0e}"
    )


def simulate_speed(rows: dict[str, np.ndarray], num_samples: int, pool_tokens: int = 200_000) -> str:
    """Cells of a row of the second table; the corpora are read again and again until there are enough samples."""
    pool_rows = -(-pool_tokens // SAMPLE_TOKENS)
    pools = {name: part[:pool_rows].ravel() for name, part in rows.items()}
    settings = SimulationSettings(
        vocab_size=vocabulary(rows),
        natural_share={name: len(part) - pool_rows for name, part in rows.items()},
        pool_tokens=pool_tokens,
        max_tokens=num_samples * SAMPLE_TOKENS,
    )

    def samples(part: np.ndarray) -> Iterator[np.ndarray]:
        return islice(cycle(part[pool_rows:]), num_samples)

    sources = {name: samples(part) for name, part in rows.items()}
    with tempfile.TemporaryDirectory() as folder:
        begin, begin_core = time.perf_counter(), time.process_time()
        curves = simulate(sources, pools, settings, state_file=Path(folder) / "state.npz")
        wall, core = time.perf_counter() - begin, time.process_time() - begin_core
    read = sum(int(curve.tokens[-1]) for curve in curves.values()) // SAMPLE_TOKENS
    return f"{read:,} | {core / 60:.2f} | {wall / 60:.2f} | {core / read * 1e6 / 60:.1f}"


def thread_speed(rows: dict[str, np.ndarray], pool_tokens: int = 200_000, rounds: int = 7) -> str:
    """Cells of a row of the third table; both are measured side by side, so that other work slows both."""
    pool_rows = pool_tokens // SAMPLE_TOKENS
    pools = {name: part[:pool_rows].ravel() for name, part in rows.items()}
    base = base_distribution([part[pool_rows:].ravel() for part in rows.values()], vocabulary(rows))
    both = [InfluenceModels(pools, base, NgramSettings(), threads=threads) for threads in (1, 2)]
    left = min(len(part) for part in rows.values()) - pool_rows
    stream = [(part[pool_rows + number], own) for number in range(left) for own, part in enumerate(rows.values())]
    ratios = []
    for part in np.array_split(np.arange(len(stream)), rounds):
        samples, own = zip(*(stream[number] for number in part), strict=True)
        seconds = []
        for models in both:
            begin = time.perf_counter()
            models.measure(samples, own)
            seconds.append(time.perf_counter() - begin)
        ratios.append(seconds[0] / seconds[1])
    for models in both:
        models.close()
    return f"{np.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


# regmix


def regmix(options: argparse.Namespace) -> list[str]:
    """A row for each regressor and number of runs, printed as they come."""
    lines = ["| regressor | features | runs | test | out of fold | core s |", "|---|---|---:|---:|---:|---:|"]
    train, test = load_runs("train"), load_runs("test")
    ways = [(name, FEATURES["logs-roots"]) for name in options.regressors if "logs-roots" in options.features]
    alone = [name for name in options.regressors if name in ("linear", "neural", "trees")]
    ways += [(name, FEATURES["weights"]) for name in alone if "weights" in options.features]
    for name, blocks in ways:
        for count in (64, 128, 256, 512):
            lines.append(
                f"| {name} | {' and '.join(blocks)} | {count} | {regmix_scores(name, blocks, train, test, count)} |"
            )
            print(lines[-1], file=sys.stderr, flush=True)
    if ("neural", FEATURES["logs-roots"]) in ways:
        lines += ["", *neural_seeds(train, test, options.neural_seeds)]
    return lines


def neural_seeds(train: Runs, test: Runs, seeds: int) -> list[str]:
    """A table of what other seeds do to the neural regressor."""
    lines = ["| neural, 512 runs, seed | test |", "|---|---:|"]
    scores = []
    for seed in range(seeds):
        fitted = REGRESSORS["neural"](seed).fit(mixture_features(train.weights), train.losses)
        predicted, _ = fitted.predict(mixture_features(test.weights))
        scores.append(100 * rank_correlation(predicted, test.losses).mean())
        lines.append(f"| {seed} | {scores[-1]:.2f} |")
    return [*lines, f"| mean, least, most | {np.mean(scores):.2f}, {min(scores):.2f}, {max(scores):.2f} |"]


def regmix_scores(name: str, blocks: tuple[str, ...], train: Runs, test: Runs, count: int) -> str:
    """Cells of a row; a stack is out of fold inside already, and five times itself would take an hour."""
    features, losses = mixture_features(train.weights[:count], blocks=blocks), train.losses[:count]
    begin = time.process_time()
    predicted, _ = REGRESSORS[name](0).fit(features, losses).predict(mixture_features(test.weights, blocks=blocks))
    seconds, unseen = time.process_time() - begin, "-"
    if name != "stack":
        fold_predictions = out_of_fold(REGRESSORS[name], features, losses, folds=4)
        unseen = f"{100 * rank_correlation(fold_predictions, losses).mean():.2f}"
    return f"{100 * rank_correlation(predicted, test.losses).mean():.2f} | {unseen} | {seconds:.1f}"


# students


def students(options: argparse.Namespace) -> list[str]:
    """Bits per byte by mixture and domain, then the differences seed by seed."""
    mix(str(options.plan), output=options.output)
    plan = load_mix_plan(options.plan, output=options.output)
    found = tomllib.loads((plan.folder / "weights.toml").read_text())["data"]["datasets"]
    tokens = natural_tokens(plan)
    mixtures = {"ours": np.array([table["weight"] for table in found])} | baseline_weights(
        plan.names, [*tokens.values()]
    )
    results = {name: np.empty((len(options.seeds), len(plan.domains))) for name in mixtures}  # bits per byte
    for number, seed in enumerate(options.seeds):
        words = (f"--debug.seed={seed}", f"--data.seed={seed}", f"--training.steps={options.steps}")
        seeded = replace(plan, words=(*plan.words, *words))
        folders = {name: plan.folder / "students" / f"{name}_{options.steps}_{seed}" for name in mixtures}
        proxies = [Proxy(name, folders[name], tuple(weights.tolist())) for name, weights in mixtures.items()]
        for proxy in proxies:
            write_mixture(seeded, proxy)
        missing = [proxy for proxy in proxies if not (proxy.folder / HELD_OUT).is_file()]
        run_proxies(seeded, missing, write_test_job(plan))
        for name, folder in folders.items():
            bits = json.loads((folder / HELD_OUT).read_text())["by_corpus"]
            results[name][number] = [bits[domain.name] for domain in plan.domains]
    return student_tables(plan, mixtures, results, options)


def student_tables(
    plan: MixPlan, mixtures: dict[str, np.ndarray], results: dict[str, np.ndarray], options: argparse.Namespace
) -> list[str]:
    """Of results [seeds, domains] of each mixture."""
    training, names = plan.base.training, [domain.name for domain in plan.domains]
    values = np.array([domain.weight for domain in plan.domains])
    lines = [
        f"{plan.proxy.count} proxies of {training.steps} steps, students of {options.steps} steps of "
        f"{training.global_batch_size} x {training.seq_len} tokens, seeds {', '.join(map(str, options.seeds))}",
        "",
        f"| mixture | weights of {', '.join(plan.names)} | {' | '.join(names)} | mean, with interval |",
        f"|---|---|{'---:|' * (len(names) + 1)}",
    ]
    for name, bits in results.items():
        weights = ", ".join(f"{weight:.3f}" for weight in mixtures[name])
        cells = " | ".join(f"{value:.4f}" for value in bits.mean(0))
        lines.append(f"| {name} | {weights} | {cells} | {interval(bits @ values)} |")
    lines += ["", "| difference of the means, seed by seed | with interval |", "|---|---:|"]
    for name in list(results)[1:]:
        lines.append(f"| {name} minus ours | {interval((results[name] - results['ours']) @ values, '+')} |")
    return lines


def interval(values: np.ndarray, sign: str = "") -> str:
    """Mean and half width of the 95 % t-interval."""
    half = float(student_t.ppf(0.975, len(values) - 1)) * values.std(ddof=1) / len(values) ** 0.5
    return f"{values.mean():{sign}.4f} ± {half:.4f}"


SECTIONS: dict[str, Callable[[argparse.Namespace], list[str]]] = {
    "influence": influence,
    "regmix": regmix,
    "students": students,
}


def main() -> None:
    """Command line."""
    parser = section_parser(__doc__, SECTIONS)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--samples", type=int, default=50_000, help="of `simulate` in the section influence")
    parser.add_argument("--regressors", nargs="+", choices=REGRESSORS, default=list(REGRESSORS), help="of regmix")
    parser.add_argument("--features", nargs="+", choices=FEATURES, default=list(FEATURES), help="of regmix")
    parser.add_argument("--neural-seeds", type=int, default=5, help="of regmix")
    parser.add_argument("--tokens", type=Path, default=ROOT / "outputs/debug/tokens", help="prepared debug corpora")
    plan = ROOT / "train_configs/debug/0_data_mix.toml"
    parser.add_argument("--plan", type=Path, default=plan, help="of `mix`, for students")
    parser.add_argument("--output", help="folder of `mix`, for students, instead of the plan's")
    parser.add_argument("--seeds", type=int, nargs="+", default=[11, 12, 13], help="of students, at least two")
    parser.add_argument("--steps", type=int, default=200, help="of students")
    options = parser.parse_args()
    head = ["# Data mixing", "", *describe(["numpy", "numba", "scikit-learn", "scipy"])]
    write_sections(head, {name: partial(SECTIONS[name], options) for name in options.only}, options.write)


if __name__ == "__main__":
    main()

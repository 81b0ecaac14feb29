"""`0_data_mix.toml`: corpora, validation domains and the settings of each step of the verb `mix`, read strictly.

    output = "outputs/debug/0_data_mix"
    seed = 1
    [[corpus]]                          gets a weight
    name = "code"
    path = "outputs/debug/tokens/code"
    [[domain]]                          says what the student shall be good at; default: every corpus, all alike
    name = "code"
    path = "outputs/debug/tokens/code"
    weight = 1.0
    [simulation]  [proxy]  [proxy.overrides]  [fit]  [weights]

Paths of corpora are relative to the working directory, as in a job; that of the job to the file's own folder.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mobilellm_pro.config import ConfigError, JobConfig, Problem
from mobilellm_pro.config.table_arrays import missing_or_repeated
from mobilellm_pro.config.toml import read_toml
from mobilellm_pro.config.typed_values import check_table
from mobilellm_pro.data_mix.ngram_table import MAX_SLOTS
from mobilellm_pro.data_mix.regression import REGRESSORS
from mobilellm_pro.data_mix.regressor import MIN_RUNS
from mobilellm_pro.pipeline.data_mix_tables import (
    CorpusTable,
    DomainTable,
    FitTable,
    MixTable,
    ProxyTable,
    SimulationTable,
    WeightsTable,
)
from mobilellm_pro.pipeline.varied_job import load_varied, override_problems, words_of

STACK_RUNS = 6
"""The fewest of which the largest of four folds leaves `MIN_RUNS`: `stack` weighs its members out of fold."""
_KEPT = {
    "job.dump_folder": "no such key: every proxy gets a folder of its own (output)",
    "data.mix": "no such key: every proxy gets a mixture of its own",
}


@dataclass(frozen=True)
class MixPlan:
    """What can be run."""

    path: Path
    folder: Path
    """For everything."""

    seed: int
    corpora: tuple[CorpusTable, ...]
    domains: tuple[DomainTable, ...]
    """What the utility is made of; weights sum to 1."""

    simulation: SimulationTable
    proxy: ProxyTable
    fit: FitTable
    weights: WeightsTable
    job: Path
    words: tuple[str, ...]
    """Of the proxies' job, the same for all."""

    base: JobConfig
    """The job with these words, before it gets a mixture."""

    @property
    def names(self) -> list[str]:
        """Of the corpora."""
        return [corpus.name for corpus in self.corpora]

    @property
    def targets(self) -> list[DomainTable]:
        """Domains that are no corpus."""
        return [domain for domain in self.domains if domain.name not in self.names]


def load_mix_plan(path: str | Path, *, output: str | Path | None = None) -> MixPlan:
    """Reads the file and the job of its proxies.

    Args:
        path: of the file.
        output: folder for everything, instead of the file's.

    Raises:
        ConfigError: with all problems of both.
    """
    path = Path(path)
    values, problems = check_table(MixTable, read_toml(path, "corpora and settings of `mix`"), str(path))
    tables = {name: table(**values.pop(name, {})) for name, table in _SECTIONS.items()}
    file = MixTable(**{**values, **({} if output is None else {"output": str(output)})}, **tables)
    job = Path(os.path.normpath(path.parent / file.proxy.job))
    problems += _problems(file, str(path))
    base = None
    if file.proxy.job:
        place = f"{path}: proxy.overrides"
        problems += override_problems(file.proxy.overrides, place, _KEPT)
        base = load_varied(job, words_of(file.proxy.overrides), place, problems)
    if base is not None:
        problems += _job_problems(base, job)
    if problems or base is None:
        raise ConfigError(str(path), list(dict.fromkeys(problems)))
    domains = file.domain or [DomainTable(corpus.name, corpus.path) for corpus in file.corpus]
    total = sum(domain.weight for domain in domains)
    shares = tuple(DomainTable(domain.name, domain.path, domain.weight / total) for domain in domains)
    return MixPlan(
        path, Path(file.output), file.seed, tuple(file.corpus), shares, file.simulation, file.proxy, file.fit,
        file.weights, job, tuple(words_of(file.proxy.overrides)), base,
    )  # fmt: skip


_SECTIONS: dict[str, type] = {
    "simulation": SimulationTable, "proxy": ProxyTable, "fit": FitTable, "weights": WeightsTable,
}  # fmt: skip


def _problems(file: MixTable, source: str) -> Iterator[Problem]:
    if not file.output:
        yield Problem(source, "output", "nothing", "a folder for everything")
    if file.seed < 0:
        yield Problem(source, "seed", str(file.seed), "at least 0")
    if not file.proxy.job:
        yield Problem(
            source, "proxy.job", "nothing", "the TOML file of the proxies' job, relative to this file's folder"
        )
    if len(file.corpus) < 2:
        yield Problem(source, "corpus", f"{len(file.corpus)} tables", "at least two [[corpus]] tables to mix")
    for kind, tables in (("corpus", file.corpus), ("domain", file.domain)):
        yield from missing_or_repeated(tables, kind, source, given=("name", "path"), unique=("name",))
    paths = {corpus.name: corpus.path for corpus in file.corpus}
    for number, domain in enumerate(file.domain):
        key = f"domain[{number}]"
        if paths.get(domain.name, domain.path) != domain.path:
            found = f'"{domain.path}", while the corpus "{domain.name}" is {paths[domain.name]}'
            yield Problem(source, f"{key}.path", found, "the same folder, or another name")
        if not 0 <= domain.weight < float("inf"):
            yield Problem(source, f"{key}.weight", str(domain.weight), "a number of at least 0")
    if file.domain and not any(domain.weight > 0 for domain in file.domain):
        yield Problem(source, "domain", "weights that are all 0", "one above 0: they make the utility")
    yield from _range_problems(file, source)


def _range_problems(file: MixTable, source: str) -> Iterator[Problem]:
    proxy, weights, number = file.proxy, file.weights, len(file.corpus)
    finite = float("inf")
    regressors = [file.fit.regressor, *file.fit.compare]
    least, why = (STACK_RUNS, ", and `stack` sets some of these aside") if "stack" in regressors else (MIN_RUNS, "")
    ranges: list[tuple[str, Any, bool, str]] = [
        *_simulation_ranges(file.simulation),
        ("proxy.count", proxy.count, proxy.count - len(set(proxy.leave_out)) > least,
         f"at least {least + 1} and those left out: one is predicted from the others{why}"),
        ("proxy.concentration", proxy.concentration, 0 < proxy.concentration < finite, "a number above 0"),
        ("proxy.share_power", proxy.share_power, 0 <= proxy.share_power <= 1, "a number from 0 to 1"),
        ("proxy.least_weight", proxy.least_weight, 0 < proxy.least_weight < 1 / max(number, 1),
         f"a number above 0 and below 1 / {number} corpora"),
        ("proxy.parallel", proxy.parallel, proxy.parallel >= 1, "at least 1"),
        ("proxy.leave_out", proxy.leave_out, all(0 <= n < proxy.count for n in proxy.leave_out),
         "numbers of mixtures, from 0"),
        ("fit.draws", file.fit.draws, file.fit.draws >= 0, "0 (no intervals), or more"),
        ("weights.train_tokens", weights.train_tokens, weights.train_tokens >= 1, "tokens of the run they are for"),
        ("weights.temperature", weights.temperature, 0 < weights.temperature < finite, "a number above 0"),
        ("weights.epoch_cap", weights.epoch_cap, 0 < weights.epoch_cap < finite, "a number above 0"),
        ("weights.floor", weights.floor, 0 <= weights.floor * number <= 1, f"0 up to 1 / {number} corpora"),
    ]  # fmt: skip
    known = f"one of {', '.join(REGRESSORS)}"
    ranges += [("fit.regressor", name, name in REGRESSORS, known) for name in [file.fit.regressor]]
    ranges += [("fit.compare", name, name in REGRESSORS, known) for name in file.fit.compare]
    for key, value, fits, expected in ranges:
        if not fits:
            yield Problem(source, key, str(value), expected)


def _simulation_ranges(table: SimulationTable) -> Iterator[tuple[str, Any, bool, str]]:
    """Those of `SimulationSettings` and `NgramSettings`, which name one at a time and no file."""
    for key in ("sample_tokens", "order", "base_tokens", "record_tokens", "save_samples", "threads"):
        value = getattr(table, key)
        yield f"simulation.{key}", value, value >= 1, "at least 1"
    order, most, slots = table.order, table.max_tokens, table.table_slots
    yield "simulation.pool_tokens", table.pool_tokens, table.pool_tokens >= max(order, 1), f"at least order = {order}"
    yield "simulation.max_tokens", most, most is None or most >= 1, "at least 1"
    growth, numbers = table.record_growth, table.concentration
    yield "simulation.record_growth", growth, 1 <= growth < float("inf"), "a number of at least 1"
    fits = len(numbers) == order and all(0 < number < float("inf") for number in numbers)
    yield "simulation.concentration", numbers, fits, f"order = {order} numbers above 0"
    shares = table.order_weights
    fits = len(shares) == order and all(share >= 0 for share in shares) and abs(sum(shares) - 1) <= 1e-9
    yield "simulation.order_weights", shares, fits, f"order = {order} numbers of at least 0 that sum to 1"
    fits = slots is None or (1 < slots <= MAX_SLOTS and slots & (slots - 1) == 0)
    yield "simulation.table_slots", slots, fits, "a power of two, at most 2^30"


def _job_problems(base: JobConfig, job: Path) -> Iterator[Problem]:
    if not base.checkpoint.enable:
        yield Problem(str(job), "checkpoint.enable", "false", "true: the last checkpoint of a proxy is tested")
    if not base.validation.enable:
        yield Problem(str(job), "validation.enable", "false", "true: it says how much text a proxy is tested on")
    if base.training.global_batch_size < 1:
        found, expected = str(base.training.global_batch_size), "at least 1: all proxies read as many tokens"
        yield Problem(str(job), "training.global_batch_size", found, f"{expected}, on any number of processes")

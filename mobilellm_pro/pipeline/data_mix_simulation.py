"""The step `simulate` of the verb `mix`: prepared corpora as samples, their held-out parts as pools.

A sample is a row of the corpus' training order (`data.packing`): so many tokens, documents one after another, shuffled
by seed; each corpus is read once. Pools are rows of the held-out split. Memory holds the pools, the tables of their
n-grams, the first simulation.base_tokens of each corpus until they have been read, and with `export` what is known of
simulation.save_samples samples.
"""

import math
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from mobilellm_pro.atomic_file import replacement
from mobilellm_pro.data.packing import CorpusStream
from mobilellm_pro.data.shards import Corpus
from mobilellm_pro.data.tokenizer import Tokenizer
from mobilellm_pro.data_mix.influence_curve import InfluenceCurve
from mobilellm_pro.data_mix.ngram_model import NgramSettings
from mobilellm_pro.data_mix.ngram_table import NODE
from mobilellm_pro.data_mix.simulation import SimulationSettings, simulate
from mobilellm_pro.data_mix.simulation_export import PATTERN
from mobilellm_pro.data_mix.simulation_order import draw_pool
from mobilellm_pro.pipeline.data_mix_folder import CURVES, SIMULATION, agree, content
from mobilellm_pro.pipeline.data_mix_plan import MixPlan


def open_corpora(plan: MixPlan, split: str) -> dict[str, Corpus]:
    """The corpora of a plan, and with "valid" also its other domains, in the order of the simulation's domains.

    Raises:
        FileNotFoundError: no such corpus.
        ValueError: a damaged corpus, an empty split, another tokenizer than the job's.
    """
    fingerprint = Tokenizer.load(plan.base.data.tokenizer).fingerprint
    paths = {corpus.name: corpus.path for corpus in plan.corpora}
    paths |= {domain.name: domain.path for domain in plan.targets if split == "valid"}
    return {name: Corpus.open(path, split, fingerprint=fingerprint) for name, path in paths.items()}


def natural_tokens(plan: MixPlan) -> dict[str, int]:
    """Training tokens of each corpus: natural share, in tokens."""
    return {name: corpus.num_tokens for name, corpus in open_corpora(plan, "train").items()}


def run_simulation(plan: MixPlan) -> dict[str, InfluenceCurve]:
    """Simulates, goes on with a simulation that was interrupted, or reads the curves of a finished one.

    Raises:
        FileNotFoundError: no such corpus.
        ValueError: too little held-out text for a pool, or settings other than those that the simulation in this
            folder was begun with; samples are to be exported and the simulation is finished without.
    """
    sources, held_out = open_corpora(plan, "train"), open_corpora(plan, "valid")
    settings, identity = _settings(plan, sources), _identity(plan, sources, held_out)
    agree(plan.folder, "simulate", identity, begin=False)
    exported = plan.folder / "influence" if plan.simulation.export else None
    if (plan.folder / CURVES).is_file():
        _check_exported(plan.folder, exported)
        print(f"simulate: done, {plan.folder / CURVES}", flush=True)
        return read_curves(plan.folder)
    size = plan.simulation.sample_tokens
    pools = {
        name: draw_pool(name, samples(corpus, size, plan.seed), settings.pool_tokens)
        for name, corpus in held_out.items()
    }
    rows = {name: samples(corpus, size, plan.seed) for name, corpus in sources.items()}
    total = sum(corpus.num_tokens // size * size for corpus in sources.values())
    total = min(total, settings.max_tokens or total)
    print(f"simulate: tables of {_table_words(settings, len(pools))}", flush=True)
    with tqdm(total=total, desc="simulate", unit="token", unit_scale=True, disable=None) as bar:
        noted = False

        def advance(tokens: int) -> None:
            nonlocal noted
            bar.update(tokens)
            # What fails before a state is saved may be mended in the plan, so the settings bind from the state on.
            if not noted and (plan.folder / SIMULATION).is_file():
                agree(plan.folder, "simulate", identity)
                noted = True

        state_file = plan.folder / SIMULATION
        curves = simulate(rows, pools, settings, state_file=state_file, export_folder=exported, progress=advance)
    agree(plan.folder, "simulate", identity)
    write_curves(plan.folder, curves)
    print(f"simulate: {total:,} tokens of {', '.join(sources)} on {', '.join(pools)}", flush=True)
    return curves


def samples(corpus: Corpus, sample_tokens: int, seed: int) -> Iterator[np.ndarray]:
    """One pass over a split: int32 [sample_tokens] each, in the shuffled order of a training; what is left is dropped.

    Raises:
        ValueError: the split is smaller than one sample.
    """
    stream = CorpusStream(corpus, seq_len=sample_tokens, seed=seed)
    for row in range(corpus.num_tokens // sample_tokens):
        # A row of training has one token more, the last label, which is the first token of the next one.
        yield np.concatenate(stream.pieces(row).ids, dtype=np.int32)[:sample_tokens]


def write_curves(folder: Path, curves: dict[str, InfluenceCurve]) -> None:
    """Writes curves.npz by rename."""
    arrays = {f"{key}/{name}": value for name, curve in curves.items() for key, value in vars(curve).items()}
    with replacement(folder / CURVES) as temporary, temporary.open("wb") as file:
        np.savez(file, allow_pickle=False, names=np.array(list(curves)), **arrays)


def read_curves(folder: Path) -> dict[str, InfluenceCurve]:
    """The curves of a finished simulation.

    Raises:
        FileNotFoundError: it is not finished.
    """
    path = folder / CURVES
    if not path.is_file():
        raise FileNotFoundError(f"{path}: not found; the simulation comes first: `mix ... --only simulate`")
    with np.load(path, allow_pickle=False) as file:
        return {
            str(name): InfluenceCurve(*(file[f"{key}/{name}"] for key in ("tokens", "mean", "variance")))
            for name in file["names"]
        }


def _identity(plan: MixPlan, sources: dict[str, Corpus], held_out: dict[str, Corpus]) -> dict[str, Any]:
    """What the curves depend on; domains are columns, so their order counts."""
    how = ("threads", "save_samples", "export", "table_slots")
    identity: dict[str, Any] = {"seed": plan.seed, "corpora": list(sources), "domains": list(held_out)}
    identity |= {f"simulation.{key}": value for key, value in asdict(plan.simulation).items() if key not in how}
    identity |= {f"corpus {name}": content(corpus) for name, corpus in sources.items()}
    return identity | {f"held-out part of {name}": content(corpus) for name, corpus in held_out.items()}


def _check_exported(folder: Path, exported: Path | None) -> None:
    """Raises ValueError where a finished simulation has not exported what is asked for."""
    if exported is not None and not any(exported.glob(PATTERN)):
        raise ValueError(
            f"{exported}: has no files, and the simulation is finished: simulation.export = true writes while it "
            f"runs; choose another output, delete {folder / SIMULATION} and {folder / CURVES} to run it again, or set "
            "it to false"
        )


def _table_words(settings: SimulationSettings, num_domains: int) -> str:
    """Memory of the n-grams, for the log: what is stated, or the most that the pools can ask for."""
    ngrams = settings.ngrams
    # Tables double until they are at most half full, and a pool has at most one n-gram of each order a token.
    slots = ngrams.table_slots or 2 ** math.ceil(math.log2(2 * ngrams.order * settings.pool_tokens))
    size = f"{slots * NODE.itemsize * num_domains / 1e6:,.1f} MB"
    return f"{num_domains} domains: {'' if ngrams.table_slots else 'at most '}{size}"


def _settings(plan: MixPlan, sources: dict[str, Corpus]) -> SimulationSettings:
    table = plan.simulation
    ngrams = NgramSettings(table.order, tuple(table.concentration), tuple(table.order_weights), table.table_slots)
    return SimulationSettings(
        vocab_size=max(corpus.vocab_size for corpus in sources.values()),
        natural_share={name: float(corpus.num_tokens) for name, corpus in sources.items()},
        ngrams=ngrams,
        base=table.base,
        base_tokens=table.base_tokens,
        pool_tokens=table.pool_tokens,
        targets=tuple(domain.name for domain in plan.targets),
        max_tokens=table.max_tokens,
        record_tokens=table.record_tokens,
        record_growth=table.record_growth,
        seed=plan.seed,
        save_samples=table.save_samples,
        threads=table.threads,
    )

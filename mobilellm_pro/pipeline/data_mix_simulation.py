"""The step `simulate` of the verb `mix`: prepared corpora as samples, their held-out parts as pools.

A sample is a row of the corpus' training order (`data.packing`): so many tokens, documents one after another, shuffled
by seed; each corpus is read once. Pools are rows of the held-out split. Memory holds the pools, the tables of their
n-grams and one sample of each corpus.
"""

import io
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from mobilellm_pro.data.packing import CorpusStream
from mobilellm_pro.data.shards import Corpus
from mobilellm_pro.data.tokenizer import Tokenizer
from mobilellm_pro.data_mix.influence_curve import InfluenceCurve
from mobilellm_pro.data_mix.ngram_model import NgramSettings
from mobilellm_pro.data_mix.simulation import SimulationSettings, simulate
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
        ValueError: too little held-out text for a pool, settings outside their range or other than those that the
            simulation in this folder was begun with.
    """
    sources, held_out = open_corpora(plan, "train"), open_corpora(plan, "valid")
    settings = _settings(plan, sources)
    identity: dict[str, Any] = {"seed": plan.seed}
    how = ("threads", "save_samples", "export")
    identity |= {f"simulation.{key}": value for key, value in asdict(plan.simulation).items() if key not in how}
    identity |= {f"corpus {name}": content(corpus) for name, corpus in sources.items()}
    identity |= {f"held-out part of {name}": content(corpus) for name, corpus in held_out.items()}
    agree(plan.folder, "simulate", identity)
    if (plan.folder / CURVES).is_file():
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
    with tqdm(total=total, desc="simulate", unit="token", unit_scale=True, disable=None) as bar:
        curves = simulate(
            rows,
            pools,
            settings,
            state_file=plan.folder / SIMULATION,
            export_folder=plan.folder / "influence" if plan.simulation.export else None,
            progress=bar.update,
        )
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
    """Writes curves.npz under a temporary name and renames it."""
    arrays = {f"{key}/{name}": value for name, curve in curves.items() for key, value in vars(curve).items()}
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, names=np.array(list(curves)), **arrays)
    temporary = folder / f"{CURVES}.tmp"
    temporary.write_bytes(buffer.getvalue())
    temporary.replace(folder / CURVES)


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


def _settings(plan: MixPlan, sources: dict[str, Corpus]) -> SimulationSettings:
    table = plan.simulation
    ngrams = NgramSettings(table.order, tuple(table.concentration), tuple(table.order_weights))
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

"""The simulation: one pass over all sources that shows what a sample of each does to every domain, and how that falls.

No network is trained. Each domain has a small n-gram model and a pool (`ngram_model`); the sources are read once,
interleaved by natural share (`simulation_order`); every sample is measured on all domains and stays in the model of its
own (`influence`). What comes out is a curve for each source (`influence_curve`).

    pools = {name: draw_pool(name, samples[name], 200_000) for name in samples}
    settings = SimulationSettings(vocab_size=202_048, natural_share={"web": 1300, "code": 264}, max_tokens=10**9)
    curves = simulate(samples, pools, settings, state_file=Path("outputs/mix/simulation.npz"), progress=bar.update)
    features = influence_features(curves)

The result is a function of settings, pools and samples: not of threads, batches or interruptions, to the bit (on one
kind of processor; another may round a logarithm differently).

Paper: section 4. Left open there and options here: kind and smoothing of the models, sizes, what is recorded when.
"""

import dataclasses
import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from mobilellm_pro.data_mix.influence import InfluenceModels, check_ids, check_names
from mobilellm_pro.data_mix.influence_curve import CurveRecorder, InfluenceCurve
from mobilellm_pro.data_mix.ngram_model import NgramSettings, base_distribution
from mobilellm_pro.data_mix.simulation_export import InfluenceExport
from mobilellm_pro.data_mix.simulation_order import Interleaving, Sample
from mobilellm_pro.data_mix.simulation_state import read_state, write_state

BASES = ("unigram", "uniform")
_CURVE = "curve_"
_HOW = ("batch_samples", "save_samples", "threads")  # settings that the result does not depend on


@dataclass(frozen=True)
class SimulationSettings:
    """What a simulation depends on, and how it is run.

    Attributes:
        vocab_size: ids are below.
        natural_share: name of each source and its share of tokens, in any unit (tokens of the corpus will do).
        ngrams: of the language models.
        base: what all orders are smoothed with: "unigram" of the beginnings of all sources, or "uniform".
        base_tokens: of each source for the unigram.
        pool_tokens: of each pool; more that is given is not used, so that all domains are measured alike.
        targets: domains without a source: they have a pool, and a model that never learns.
        max_tokens: of all samples together, after which the simulation ends; None: with the last source.
        record_tokens: of all samples together, to the first point of the curves.
        record_growth: each interval between points is as many times longer than the one before, at least 1.
        seed: of the order of the sources.
        batch_samples: measured in one call.
        save_samples: after each so many samples the state is saved.
        threads: that measure, at most one a domain.

    Raises:
        ValueError: a value outside its range; names the key.
    """

    vocab_size: int
    natural_share: Mapping[str, float]
    ngrams: NgramSettings = field(default_factory=NgramSettings)
    base: str = "unigram"
    base_tokens: int = 1_000_000
    pool_tokens: int = 200_000
    targets: tuple[str, ...] = ()
    max_tokens: int | None = None
    record_tokens: int = 1_000_000
    record_growth: float = 1.3
    seed: int = 0
    batch_samples: int = 512
    save_samples: int = 100_000
    threads: int = 1

    def __post_init__(self) -> None:
        positive = ("vocab_size", "base_tokens", "pool_tokens", "record_tokens", *_HOW)
        for key in (*positive, *(["max_tokens"] if self.max_tokens is not None else [])):
            if getattr(self, key) < 1:
                raise ValueError(f"{key} = {getattr(self, key)}: expected at least 1")
        if not 1 <= self.record_growth < math.inf:
            raise ValueError(f"record_growth = {self.record_growth}: expected at least 1")
        if self.base not in BASES:
            raise ValueError(f"base = {self.base!r}: expected one of {', '.join(BASES)}")
        check_names(self.targets, "targets")
        for name, share in self.natural_share.items():
            if not 0 < share < math.inf:
                raise ValueError(f"natural_share of {name!r} = {share}: expected a number above 0")


def simulate(
    sources: Mapping[str, Iterable[np.ndarray]],
    pools: Mapping[str, np.ndarray],
    settings: SimulationSettings,
    *,
    state_file: Path | None = None,
    export_folder: Path | None = None,
    progress: Callable[[int], object] | None = None,
) -> dict[str, InfluenceCurve]:
    """Reads the sources once and returns the influence of each on every domain.

    Args:
        sources: name of each and its samples, int [tokens] each (a few hundred tokens), in an order that is the same
            at every call. They should be shuffled: a curve of sorted documents shows their sorting.
        pools: name of each domain and the int [tokens] that it is measured on, from documents that are in no source;
            the domains are the sources and the targets. Their order is that of the columns of the curves.
        settings: see there.
        state_file: .npz that the state is saved in; where it exists the simulation goes on from it, or returns its
            result. None: nothing is saved.
        export_folder: for the influence of every sample (`simulation_export`); None: not written.
        progress: called with the number of tokens read since the last call (`tqdm.update` fits).

    Raises:
        ValueError: names that do not fit, a pool with too little text, a source without samples, an empty sample, an
            id outside the vocabulary, a state of another simulation; names the source, domain, key or file.
    """
    pools = _checked_pools(sources, pools, settings)
    identity = _identity(sources, pools, settings)
    state = read_state(state_file, identity) if state_file is not None and state_file.exists() else None
    run = _Run(sources, pools, settings, state, export_folder)
    if state is None or not state["finished"]:
        with closing(run.begin(state)):
            if progress and run.order.num_tokens:
                progress(run.order.num_tokens)
            for batch in run.batches():
                run.measure(batch)
                if progress:
                    progress(sum(len(sample.ids) for sample in batch))
                if run.order.num_samples % settings.save_samples == 0:
                    run.save(state_file, identity, finished=False)
        run.recorder.close_point()
        run.save(state_file, identity, finished=True)
    return run.recorder.curves(list(sources))


class _Run:
    """What `simulate` works with; every part of it can be saved and can go on.

    Attributes:
        order, recorder: see their modules.
    """

    def __init__(
        self, sources: Mapping[str, Iterable[np.ndarray]], pools: Mapping[str, np.ndarray],
        settings: SimulationSettings, state: Mapping[str, np.ndarray] | None, export_folder: Path | None,
    ) -> None:  # fmt: skip
        """Arguments are those of `simulate`, and the state of an earlier run; reads no sample yet."""
        self._pools, self._settings = pools, settings
        self._own = [list(pools).index(name) for name in sources]
        self.order = Interleaving(sources, settings.natural_share, settings.seed, settings.vocab_size)
        self.recorder = CurveRecorder(len(sources), len(pools), settings.record_tokens, settings.record_growth)
        read = 0
        if state is not None:
            curve = {key: array for key, array in state.items() if key.startswith(_CURVE)}
            self.recorder.load_state({key.removeprefix(_CURVE): array for key, array in curve.items()})
            read = int(state["order"][:, 0].sum())
        self._export = None if export_folder is None else InfluenceExport(export_folder, [*sources], [*pools], read)

    def begin(self, state: Mapping[str, np.ndarray] | None) -> InfluenceModels:
        """Makes the models, brings them and the sources to where the state was taken; who calls it closes them."""
        settings = self._settings
        self._base = _base(self.order, settings) if state is None else state["base"]
        self._models = InfluenceModels(self._pools, self._base, settings.ngrams, threads=settings.threads)
        if state is not None:
            self._models.load_counts([state[f"counts_{number}"] for number in range(len(self._pools))])
            self.order.load_state(state["order"])
        return self._models

    def batches(self) -> Iterator[list[Sample]]:
        """Samples in order; a batch ends where a point is due or a state is to be saved."""
        most, save = self._settings.max_tokens or math.inf, self._settings.save_samples
        batch: list[Sample] = []
        for sample in self.order if self.order.num_tokens < most else ():
            batch.append(sample)
            tokens = self.order.num_tokens
            pause = self.recorder.is_due(tokens) or self.order.num_samples % save == 0 or tokens >= most
            if pause or len(batch) == self._settings.batch_samples:
                yield batch
                batch = []
            if tokens >= most:
                return
        if batch:
            yield batch

    def measure(self, batch: list[Sample]) -> None:
        """Measures and records the samples of a batch."""
        own = [self._own[sample.source] for sample in batch]
        influence_BK = self._models.measure([sample.ids for sample in batch], own)
        for sample, influence_K in zip(batch, influence_BK, strict=True):
            self.recorder.add(sample.source, len(sample.ids), influence_K)
            if self._export is not None:
                self._export.add(sample, influence_K)
        if self.recorder.is_due(self.order.num_tokens):
            self.recorder.close_point()

    def save(self, state_file: Path | None, identity: Mapping[str, str], finished: bool) -> None:
        """Writes what there is to export, then the state, which tells a later run that it need not be written again."""
        if self._export is not None:
            self._export.write()
        if state_file is not None:
            arrays = {"base": self._base, "order": self.order.state(), "finished": np.array(finished)}
            arrays |= {f"counts_{number}": array for number, array in enumerate(self._models.counts())}
            arrays |= {_CURVE + key: array for key, array in self.recorder.state().items()}
            write_state(state_file, identity, arrays)


def _checked_pools(
    sources: Mapping[str, Iterable[np.ndarray]], pools: Mapping[str, np.ndarray], settings: SimulationSettings
) -> dict[str, np.ndarray]:
    """The first pool_tokens tokens of each pool; raises ValueError where names do not fit or text is missing."""
    expected = [*sources, *settings.targets]
    if not sources:
        raise ValueError("no source was given: expected at least one")
    check_names(expected, "sources and targets")
    if missing := [name for name in expected if name not in pools]:
        raise ValueError(f"domain {missing[0]!r}: it has no pool (pools: {', '.join(pools)}): give it one")
    if unknown := [name for name in pools if name not in expected]:
        raise ValueError(
            f"pool {unknown[0]!r}: no source has this name (sources: {', '.join(sources)}): correct it, or name it "
            "among the targets"
        )
    if set(settings.natural_share) != set(sources):
        shared = ", ".join(settings.natural_share)
        raise ValueError(
            f"natural_share names {shared or 'none'}, the sources are {', '.join(sources)}: expected the same"
        )
    for name, pool in pools.items():
        if len(pool) < settings.pool_tokens:
            raise ValueError(
                f"domain {name!r}: its pool has {len(pool)} tokens, pool_tokens = {settings.pool_tokens} are needed: "
                "give it more text, or lower pool_tokens"
            )
        check_ids(pool, settings.vocab_size, f"the pool of {name!r}")
    return {name: np.ascontiguousarray(pool[: settings.pool_tokens], "<i4") for name, pool in pools.items()}


def _identity(
    sources: Mapping[str, Iterable[np.ndarray]], pools: Mapping[str, np.ndarray], settings: SimulationSettings
) -> dict[str, str]:
    """What the result depends on, in words; the samples have checksums of their own."""
    fields = dataclasses.asdict(settings)
    identity = {key: str(value) for key, value in fields.items() if key not in (*_HOW, "natural_share", "ngrams")}
    identity |= {key: str(value) for key, value in fields["ngrams"].items()}  # counts stand in the order of the slots
    identity |= {f"natural_share of {name}": repr(float(x)) for name, x in sorted(settings.natural_share.items())}
    digests = {f"pool of {name}": hashlib.sha256(pool.data).hexdigest()[:16] for name, pool in pools.items()}
    return {"format": "1", "sources": ", ".join(sources), "domains": ", ".join(pools)} | identity | digests


def _base(order: Interleaving, settings: SimulationSettings) -> np.ndarray:
    """float64 [vocabulary]: the base distribution; raises ValueError for a source that would not be read."""
    beginnings = [source.first_tokens(settings.base_tokens) for source in order.sources]
    shares = settings.natural_share
    needed, name = max((2 * s.next_length() * sum(shares.values()) / shares[s.name], s.name) for s in order.sources)
    if settings.max_tokens is not None and settings.max_tokens < needed:
        raise ValueError(
            f"source {name!r}: max_tokens = {settings.max_tokens} would end before two of its samples are due: give "
            f"max_tokens at least {math.ceil(needed)}, or leave the source out"
        )
    return base_distribution(beginnings if settings.base == "unigram" else [], settings.vocab_size)

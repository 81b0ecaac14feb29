"""What may stand in `0_data_mix.toml`: a dataclass a table, a field a key, the text under it its documentation."""

from dataclasses import dataclass, field
from typing import Literal

from mobilellm_pro.data_mix.ngram_model import NgramSettings


@dataclass
class CorpusTable:
    """One [[corpus]]."""

    name: str = ""
    """As in the job."""

    path: str = ""
    """Folder that `mobilellm-pro prepare` wrote."""


@dataclass
class DomainTable:
    """One [[domain]]: held-out text that proxies are judged by."""

    name: str = ""
    """That of a corpus, or another one."""

    path: str = ""
    """Folder of a prepared corpus; its held-out part is read."""

    weight: float = 1.0
    """Of its bits per byte in the utility, which is minus their weighted mean."""


@dataclass
class SimulationTable:
    """How the corpora are read, and with what models."""

    sample_tokens: int = 256
    """Tokens of a sample."""

    pool_tokens: int = 200_000
    """Held-out tokens that each domain is measured on."""

    max_tokens: int | None = None
    """Of all samples together. Default: all there are."""

    order: int = 3
    """Tokens of the longest n-gram."""

    concentration: list[float] = field(default_factory=lambda: list(NgramSettings().concentration))
    """For each order the tokens that the base distribution counts for."""

    order_weights: list[float] = field(default_factory=lambda: list(NgramSettings().order_weights))
    """Share of each order in the cross entropy."""

    table_slots: int | None = None
    """Of each domain's table of n-grams, a power of two, 32 bytes each. Default: the least that is at most half full.
    The curves do not depend on it."""

    base: Literal["unigram", "uniform"] = "unigram"
    """What all orders are smoothed with."""

    base_tokens: int = 1_000_000
    """Of each corpus for the unigram."""

    record_tokens: int = 1_000_000
    """Of all samples together, to the first point of the curves."""

    record_growth: float = 1.3
    """Each interval between points is as many times longer than the one before."""

    save_samples: int = 100_000
    """After so many samples the state is saved."""

    threads: int = 1
    """That measure; at most one a domain is of use."""

    export: bool = False
    """Write the influence of every sample, for filtering."""


@dataclass
class ProxyTable:
    """The small runs that say what a mixture comes to."""

    job: str = ""
    """TOML file of the job, relative to this file's folder; its corpora are replaced."""

    count: int = 24
    """Mixtures: natural share, equal weights, and then Dirichlet draws. More may be asked for later."""

    concentration: float = 5.0
    """Sum of the Dirichlet's parameters: low values give mixtures of few corpora."""

    share_power: float = 0.5
    """The Dirichlet's mean is natural share to this power, renormalised: 1 is natural share, 0 equal weights."""

    least_weight: float = 0.005
    """No corpus has less in a proxy's mixture."""

    parallel: int = 1
    """Proxies that train at the same time."""

    leave_out: list[int] = field(default_factory=list)
    """Numbers of mixtures that are neither trained nor used: proxies that diverge."""

    overrides: dict = field(default_factory=dict)
    """Keys of the job and their values, the same for all proxies."""


@dataclass
class FitTable:
    """From mixtures to utility."""

    regressor: str = "gaussian_process"
    """Of `mobilellm_pro.data_mix.regression`; it makes the weights. `stack` ranks mixtures little better, in about
    twelve times as long."""

    compare: list[str] = field(default_factory=list)
    """Others that are judged beside it."""

    draws: int = 40
    """Intervals are over so many fits with other seeds to losses as the proxies could have come out, and in each one
    function that it holds possible; 0: no intervals."""


@dataclass
class WeightsTable:
    """From utility to weights."""

    train_tokens: int = 0
    """Of the run that the weights are for."""

    method: Literal["tilt", "search"] = "search"
    """`search`: the mixture with the best predicted utility, held near natural share by the temperature. `tilt`: the
    same for a utility that is linear, its slope at natural share: natural share times exp(gain / temperature)."""

    temperature: float = 0.02
    """Bits per byte: about what a difference of utility must be to outweigh natural share. Low values follow utility,
    high ones natural share."""

    epoch_cap: float = 4.0
    """Passes over a corpus that its weight must not exceed."""

    floor: float = 0.0
    """Least weight of a corpus."""


@dataclass
class MixTable:
    """The file."""

    output: str = ""
    """Folder for everything."""

    seed: int = 0
    """Of order, mixtures and fits."""

    corpus: list[CorpusTable] = field(default_factory=list)
    domain: list[DomainTable] = field(default_factory=list)
    simulation: SimulationTable = field(default_factory=SimulationTable)
    proxy: ProxyTable = field(default_factory=ProxyTable)
    fit: FitTable = field(default_factory=FitTable)
    weights: WeightsTable = field(default_factory=WeightsTable)

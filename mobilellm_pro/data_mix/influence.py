"""Exact influence of samples on all domains: what each of them does to the cross entropy of every domain's pool.

    delta_D(x) = L(E_D; SLM_D) - L(E_D; SLM_D + x)            nats per token of the pool; positive: x helps D

x is added to the model of every domain, measured, and taken back, except from the model of its own domain, where it
stays ("is committed"): the models learn as the corpora are read, each from its own. `ngram_model` says why this costs
the same for any pool.

    models = InfluenceModels({"web": web_pool, "code": code_pool}, base, NgramSettings())
    influence_BK = models.measure([sample, ...], own=[0, ...])

Domains do not touch each other, so they are spread over threads, and the numbers do not depend on how many.

Paper: section 4 ("the influence of sample x on a domain"). Names: B samples, K domains.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from mobilellm_pro.data_mix.ngram_model import DomainModel, NgramSettings
from mobilellm_pro.repeated_names import repeated

NO_DOMAIN = -1
"""As `own`: of a sample that no model learns."""


class InfluenceModels:
    """The language models of K domains.

    Attributes:
        domains: one model each.
        names: of the domains, in the order of the columns of `measure`.
    """

    def __init__(
        self, pools: Mapping[str, np.ndarray], base: np.ndarray, settings: NgramSettings, *, threads: int = 1
    ) -> None:
        """
        Args:
            pools: name of each domain and the int [tokens] on which its cross entropy is taken.
            base: float64 [vocabulary] (`ngram_model.base_distribution`).
            settings: of all models.
            threads: that measure at the same time; close the models where it is above 1.

        Raises:
            ValueError: no pool, one that is too short, an id outside the vocabulary, n-grams that exceed table_slots,
                threads below 1; names the domain.
        """
        if not pools:
            raise ValueError("no pool was given: expected one a domain")
        if threads < 1:
            raise ValueError(f"threads = {threads}: expected at least 1")
        for name, pool in pools.items():
            check_ids(pool, len(base), f"the pool of {name!r}")
        self.names = list(pools)
        self.domains = [DomainModel(name, pool, base, settings) for name, pool in pools.items()]
        self._vocab_size = len(base)
        self._threads = ThreadPoolExecutor(min(threads, len(pools)), "influence") if threads > 1 else None

    @property
    def table_bytes(self) -> int:
        """Memory of all tables."""
        return sum(domain.table_bytes for domain in self.domains)

    def measure(self, samples: Sequence[np.ndarray], own: Sequence[int]) -> np.ndarray:
        """Influence of samples in their order, each of them with all earlier ones in the models of their domains.

        Args:
            samples: int [tokens] each, not empty, inside the vocabulary.
            own: number of the domain whose model keeps the sample; NO_DOMAIN: none.

        Returns:
            float64 [B, K], nats per token of the pool.

        Raises:
            ValueError: another number of `own` than of samples, a domain that does not exist, an empty sample, an id
                outside the vocabulary; says which sample. Nothing has been counted then.
        """
        if len(samples) != len(own):
            raise ValueError(f"{len(own)} domains for {len(samples)} samples: expected one each")
        for number, (sample, domain) in enumerate(zip(samples, own, strict=True)):
            check_ids(sample, self._vocab_size, f"sample {number}")
            if not NO_DOMAIN <= domain < len(self.domains):
                raise ValueError(
                    f"sample {number}: its domain is {domain}, expected 0 .. {len(self.domains) - 1} or none"
                )
        if not samples:
            return np.empty((0, len(self.domains)))
        tokens = np.concatenate([np.asarray(sample, dtype=np.int32) for sample in samples])
        starts = np.concatenate(([0], np.cumsum([len(sample) for sample in samples])))
        owners = np.asarray(own)

        def of_domain(number: int) -> np.ndarray:
            return self.domains[number].measure(tokens, starts, owners == number)

        apply = map if self._threads is None else self._threads.map
        return np.stack(list(apply(of_domain, range(len(self.domains)))), axis=1)

    def cross_entropies(self) -> np.ndarray:
        """float64 [K]: L(E_D; SLM_D) of each domain, nats per token; walks over the pools."""
        return np.array([domain.cross_entropy() for domain in self.domains])

    def counts(self) -> list[np.ndarray]:
        """What each model has learnt; of use for models of the same pools and settings only."""
        return [domain.counts() for domain in self.domains]

    def load_counts(self, counts: Sequence[np.ndarray]) -> None:
        """Replaces what the models have learnt by what `counts` gave."""
        for domain, learnt in zip(self.domains, counts, strict=True):
            domain.load_counts(learnt)

    def close(self) -> None:
        """Ends the threads; the models cannot measure after that where there were any."""
        if self._threads is not None:
            self._threads.shutdown()


def check_names(names: Sequence[str], what: str) -> None:
    """Raises ValueError where a name is empty or comes twice; `what` says of what, for the message."""
    if "" in names:
        raise ValueError(f"{what}: a name is empty: give each one a name")
    if twice := repeated(names):
        raise ValueError(f"{what}: the name {twice[0]!r} is given {list(names).count(twice[0])} times: expected once")


def check_ids(ids: np.ndarray, vocab_size: int, what: str) -> None:
    """Raises ValueError where ids are none at all, no line of integers, or outside the vocabulary; names `what`."""
    array = np.asarray(ids)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise ValueError(f"{what}: {array.dtype} of the shape {array.shape}, expected integers in one line")
    if not len(array):
        raise ValueError(f"{what}: no tokens, expected at least one: leave empty samples out")
    least, most = array.min(), array.max()
    if least < 0 or most >= vocab_size:
        wrong = least if least < 0 else most
        raise ValueError(
            f"{what}: id {wrong} is outside the vocabulary of {vocab_size}: correct vocab_size, or tokenize with the "
            "tokenizer it belongs to"
        )

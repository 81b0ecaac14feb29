"""What influence is, in ten lines, and the fastest that plain Python makes of it; tests compare, the benchmark times.

`cross_entropy` walks over the pool position by position with counts in dictionaries; an influence is the difference of
two such walks. `PythonModel` has the incremental update of the compiled table in dictionaries.
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence

from mobilellm_pro.data_mix.ngram_model import NgramSettings


def grams(sample: Sequence[int], n: int) -> list[tuple[int, ...]]:
    return [tuple(sample[i : i + n]) for i in range(len(sample) - n + 1)]


def cross_entropy(
    pool: Sequence[int], samples: Iterable[Sequence[int]], base: Sequence[float], settings: NgramSettings
) -> float:
    """L(E; SLM) of a pool under the model that has counted the samples, by its definition."""
    loss, samples = 0.0, list(samples)
    for n, a, weight in zip(range(1, settings.order + 1), settings.concentration, settings.order_weights, strict=True):
        count = Counter(gram for sample in samples for gram in grams(sample, n))
        context = Counter(gram[:-1] for sample in samples for gram in grams(sample, n))
        p = [(count[g] + a * base[g[-1]]) / (context[g[:-1]] + a) for g in grams(pool, n)]
        loss -= weight * sum(map(math.log, p)) / len(p)
    return loss


class PythonModel:
    """The incremental update of one domain in dictionaries: all n-grams of the pool, and what has been seen of them."""

    def __init__(self, pool: Sequence[int], base: Sequence[float], settings: NgramSettings) -> None:
        self.base, self.settings = base, settings
        self.pool = [Counter(grams(pool, n)) for n in range(1, settings.order + 1)]
        self.pool_contexts = [Counter(gram[:-1] for gram in grams(pool, n)) for n in range(1, settings.order + 1)]
        self.seen: list[dict] = [{} for _ in range(settings.order)]
        self.seen_contexts: list[dict] = [{} for _ in range(settings.order)]

    def measure(self, sample: Sequence[int], commit: bool) -> float:
        """Influence of one sample, which stays in the counts where told."""
        fall = 0.0
        for n in range(self.settings.order):
            pool, contexts = self.pool[n], self.pool_contexts[n]
            seen, seen_contexts = self.seen[n], self.seen_contexts[n]
            a, added = self.settings.concentration[n], 0.0
            new = Counter(zip(*(sample[i:] for i in range(n + 1)), strict=False))
            new_contexts: Counter = Counter()
            for gram, number in new.items():
                new_contexts[gram[:-1]] += number
                if gram in pool:
                    before = seen.get(gram, 0) + a * self.base[gram[-1]]
                    added += pool[gram] * math.log1p(number / before)
            for context, number in new_contexts.items():
                if context in contexts:
                    added -= contexts[context] * math.log1p(number / (seen_contexts.get(context, 0) + a))
            fall += self.settings.order_weights[n] * added / pool.total()
            if commit:
                for counts, more in ((seen, new), (seen_contexts, new_contexts)):
                    for key, number in more.items():
                        counts[key] = counts.get(key, 0) + number
        return fall

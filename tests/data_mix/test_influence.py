"""Influence of samples on pools: equal to the definition by brute force, whatever the corpora, tables and threads."""

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mobilellm_pro.data_mix.influence import NO_DOMAIN, InfluenceModels, check_names
from mobilellm_pro.data_mix.ngram_model import DomainModel, NgramSettings, base_distribution
from tests.data_mix.influence_definition import PythonModel, cross_entropy

TOLERANCE = 1e-10
UNIFORM_5 = base_distribution([], 5)


def ngrams(order: int, **values: object) -> NgramSettings:
    weights = tuple((n + 1) / (order * (order + 1) / 2) for n in range(order))
    return NgramSettings(order, tuple(50.0 / 4**n for n in range(order)), weights, **values)


def corpora(vocab_size: int, samples: int) -> st.SearchStrategy:
    """A few ids, so that n-grams repeat inside a sample; samples shorter than the order too."""
    ids = st.lists(st.integers(0, vocab_size - 1), min_size=1, max_size=30)
    return st.lists(st.tuples(ids, st.integers(NO_DOMAIN, 2)), min_size=1, max_size=samples)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_equals_the_definition(data: st.DataObject):
    """delta = L before - L after, with commits in between; what was not committed leaves nothing behind."""
    vocab_size = data.draw(st.sampled_from([1, 2, 5, 40]), "vocabulary")
    model = ngrams(data.draw(st.integers(1, 5), "order"))
    ids = st.lists(st.integers(0, vocab_size - 1), min_size=model.order, max_size=60)
    pools = {name: data.draw(ids, "pool") for name in "abc"}
    base = base_distribution([np.array(pools["a"])], vocab_size)
    stream = data.draw(corpora(vocab_size, 8), "stream")
    models = InfluenceModels({name: np.array(pool) for name, pool in pools.items()}, base, model)
    influence_BK = models.measure([np.array(sample) for sample, _ in stream], [own for _, own in stream])
    for number, pool in enumerate(pools.values()):
        kept: list[list[int]] = []
        for (sample, own), delta in zip(stream, influence_BK[:, number], strict=True):
            before, after = (cross_entropy(pool, texts, base, model) for texts in (kept, [*kept, sample]))
            assert abs((before - after) - delta) < TOLERANCE
            kept += [sample] if own == number else []
        assert abs(models.cross_entropies()[number] - cross_entropy(pool, kept, base, model)) < TOLERANCE


@pytest.fixture(scope="module")
def stream() -> tuple[np.ndarray, list[np.ndarray]]:
    """A pool with many n-grams and 60 samples of the same language, frequent ids first."""
    rng = np.random.default_rng(0)
    ids = (rng.pareto(0.7, 20_000) * 2).astype(np.int64) % 300
    return ids[:8_000], list(ids[8_000:].reshape(60, 200))


@pytest.mark.parametrize("table_slots", [2**13, 2**15, 2**19, None])
def test_table_size_changes_nothing(stream: tuple, table_slots: int | None):
    """Also where the table is so full that many n-grams are found only after several probes."""
    pool, samples = stream
    base = base_distribution([pool], 300)
    model = DomainModel("a", pool, base, ngrams(3, table_slots=table_slots))
    reference = PythonModel(pool.tolist(), base.tolist(), ngrams(3))
    assert model.num_nodes == sum(map(len, reference.pool))
    probes = model.probes_per_node()
    if table_slots == 2**13:
        assert model.num_nodes > 0.85 * model.num_slots and 3 < probes < 8
    else:
        assert model.num_nodes <= model.num_slots / 2 and 1 < probes < 1.6
    if table_slots is None:
        assert model.num_nodes > model.num_slots / 4 and model.table_bytes == 32 * model.num_slots
    for number, sample in enumerate(samples):
        commit = number % 3 == 0
        ours = model.measure(sample.astype(np.int32), np.array([0, len(sample)]), np.array([commit]))
        assert abs(ours.item() - reference.measure(sample.tolist(), commit)) < TOLERANCE


def test_threads_and_batches_change_no_bit(stream: tuple):
    pool, samples = stream
    base, own = base_distribution([], 300), [number % 4 - 1 for number in range(60)]
    pools = {str(k): pool[2_000 * k : 2_000 * (k + 1)] for k in range(4)}

    def measured(threads: int, cuts: list[int]) -> tuple[np.ndarray, list[np.ndarray]]:
        models = InfluenceModels(pools, base, ngrams(3), threads=threads)
        parts = [models.measure(samples[a:b], own[a:b]) for a, b in pairwise([0, *cuts, 60])]
        models.close()
        return np.concatenate(parts), models.counts()

    whole, counts = measured(1, [])
    for threads, cuts in ((1, [7, 31]), (3, []), (8, [1, 59])):
        other, other_counts = measured(threads, cuts)
        assert np.array_equal(whole, other)
        assert all(map(np.array_equal, counts, other_counts))


def test_counts_restore_a_model(stream: tuple):
    pool, samples = stream
    base, own = base_distribution([], 300), [0] * 60
    through, restored = (InfluenceModels({"a": pool}, base, ngrams(3)) for _ in range(2))
    through.measure(samples[:30], own[:30])
    restored.measure(samples[40:], own[40:])  # replaced
    restored.load_counts(through.counts())
    assert np.array_equal(*(models.measure(samples[30:], own[30:]) for models in (through, restored)))
    assert np.array_equal(through.cross_entropies(), restored.cross_entropies())


def test_each_order_is_a_distribution():
    """exp(-L) of a pool of n-1 fixed tokens and one that varies sums to one over the vocabulary, for each order."""
    base = base_distribution([np.array([0, 1, 1, 4])], 5)
    assert math.isclose(base.sum(), 1) and base.min() > 0
    for order in (1, 2, 3):
        last_only = NgramSettings(order, (3.0,) * order, (0.0,) * (order - 1) + (1.0,))
        total = 0.0
        for token in range(5):
            model = InfluenceModels({"a": np.array([*[1] * (order - 1), token])}, base, last_only)
            model.measure([np.array([1, 1, 2, 1, 1, 4, 4, 1, 1, 1])], [0])
            pool_positions = model.cross_entropies()[0]
            total += math.exp(-pool_positions)
        assert math.isclose(total, 1)


def test_sample_like_the_pool_helps_and_helps_less_and_less():
    rng = np.random.default_rng(0)
    pool, like, other = (np.tile(rng.permutation(50)[:20], 40) for _ in range(3))
    models = InfluenceModels({"a": pool}, base_distribution([], 50), ngrams(3))
    influence = models.measure([other[:200], *[like[:200]] * 4], [NO_DOMAIN] * 5)[:, 0]
    own = models.measure([pool[:200]] * 5, [0] * 5)[:, 0]
    assert own[0] > max(0, influence.max()) and (np.diff(own) < 0).all() and own[-1] > 0
    assert np.array_equal(influence[1:], influence[1:2].repeat(4)), "nothing was learnt meanwhile"


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        ([], "sample 1: .*no tokens, expected at least one"),
        ([1, 5], "sample 1: id 5 is outside the vocabulary of 5"),
        ([-1, 2], "sample 1: id -1 is outside the vocabulary of 5"),
        ([2**32 + 1], "sample 1: id 4294967297 is outside"),
        ([0.5], "sample 1: float64 of the shape"),
        ([[1, 2]], "sample 1: int64 of the shape"),
    ],
)
def test_bad_samples_leave_the_models_as_they_were(sample: list, message: str):
    models = InfluenceModels({"a": np.array([1, 2, 3, 4])}, UNIFORM_5, ngrams(2))
    before = models.cross_entropies()
    array = np.array(sample) if sample else np.array([], dtype=np.int64)
    with pytest.raises(ValueError, match=message):
        models.measure([np.array([1, 2]), array], [0, 0])
    assert np.array_equal(before, models.cross_entropies())


def test_bad_models():
    pool = np.array([1, 2, 3, 4] * 10)
    with pytest.raises(ValueError, match="no pool was given"):
        InfluenceModels({}, UNIFORM_5, ngrams(2))
    with pytest.raises(ValueError, match="domain 'b': its pool has 2 tokens, an n-gram has 3"):
        InfluenceModels({"a": pool, "b": pool[:2]}, UNIFORM_5, ngrams(3))
    with pytest.raises(ValueError, match="the pool of 'b': id 5 is outside the vocabulary of 5"):
        InfluenceModels({"a": pool, "b": pool + 1}, UNIFORM_5, ngrams(3))
    with pytest.raises(ValueError, match=r"'a': .* 40 tokens do not fit into table_slots = 8 \(7 n-grams at most\)"):
        InfluenceModels({"a": pool}, UNIFORM_5, ngrams(2, table_slots=8))
    with pytest.raises(ValueError, match="threads = 0"):
        InfluenceModels({"a": pool}, UNIFORM_5, ngrams(2), threads=0)
    with pytest.raises(ValueError, match="1 domains for 2 samples"):
        InfluenceModels({"a": pool}, UNIFORM_5, ngrams(2)).measure([pool, pool], [0])
    with pytest.raises(ValueError, match=r"sample 1: its domain is 1, expected 0 \.\. 0 or none"):
        InfluenceModels({"a": pool}, UNIFORM_5, ngrams(2)).measure([pool, pool], [0, 1])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"order": 0}, "order = 0"),
        ({"order": 2}, "concentration = .*: expected one for each of the 2 orders"),
        ({"concentration": (1.0, 0.0, 1.0)}, "concentration = .*above 0"),
        ({"concentration": (1.0, math.nan, 1.0)}, "concentration = .*above 0"),
        ({"order_weights": (0.5, 0.5, 0.5)}, "order_weights = .* sum to 1"),
        ({"order_weights": (1.5, -0.5, 0.0)}, "order_weights = .* at least 0"),
        ({"table_slots": 1000}, "table_slots = 1000: expected a power of two"),
    ],
)
def test_bad_settings(values: dict, message: str):
    with pytest.raises(ValueError, match=message):
        NgramSettings(**values)


def test_names():
    check_names(["a", "b"], "sources")
    with pytest.raises(ValueError, match="sources: the name 'b' is given 2 times"):
        check_names(["b", "a", "b"], "sources")
    with pytest.raises(ValueError, match="a name is empty"):
        check_names(["a", ""], "sources")

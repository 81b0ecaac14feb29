"""The simulation: what it records is what its definition says, and interruptions, threads and batches change no bit."""

import multiprocessing
import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from pyarrow import parquet

from mobilellm_pro.data_mix import simulation
from mobilellm_pro.data_mix.influence import InfluenceModels
from mobilellm_pro.data_mix.influence_curve import (
    InfluenceCurve,
    influence_feature_names,
    influence_features,
    influence_matrix,
)
from mobilellm_pro.data_mix.ngram_model import NgramSettings, base_distribution
from mobilellm_pro.data_mix.simulation import SimulationSettings, simulate
from mobilellm_pro.data_mix.simulation_export import PATTERN
from mobilellm_pro.data_mix.simulation_order import Interleaving, draw_pool
from mobilellm_pro.data_mix.simulation_state import write_state

VOCAB = 120
NAMES = ("web", "code", "math")
SETTINGS = SimulationSettings(
    vocab_size=VOCAB,
    natural_share={"web": 70.0, "code": 25.0, "math": 5.0},
    pool_tokens=400,
    base_tokens=500,
    record_tokens=700,
    record_growth=1.5,
    targets=("exam",),
    batch_samples=7,
    save_samples=13,
)


def text(name: str, samples: int, *, ragged: bool = True) -> Iterator[np.ndarray]:
    """Samples of a language of its own: a Markov chain over the ids, 1 to 59 tokens each."""
    rng = np.random.default_rng(sum(name.encode()))
    follows = np.stack([rng.permutation(VOCAB)[:6] for _ in range(VOCAB)])
    token = 0
    for _ in range(samples):
        ids = np.empty(rng.integers(1, 60) if ragged else 30, dtype=rng.choice([np.int32, np.int64, np.uint16]))
        for place in range(len(ids)):
            ids[place] = token = follows[token, int(rng.integers(6) * rng.random())]
        yield ids


def world(samples: int = 150) -> tuple[dict[str, Iterator[np.ndarray]], dict[str, np.ndarray]]:
    sources = {name: text(name, samples) for name in NAMES}
    pools = {name: draw_pool(name, source, 400) for name, source in sources.items()}
    return sources, pools | {"exam": draw_pool("exam", islice(text("code", samples + 40), samples, None), 500)}


def assert_equal(ours: dict[str, InfluenceCurve], other: dict[str, InfluenceCurve]) -> None:
    assert list(ours) == list(other)
    for name in ours:
        for attribute in ("tokens", "mean", "variance"):
            assert np.array_equal(getattr(ours[name], attribute), getattr(other[name], attribute)), (name, attribute)


@pytest.fixture(scope="module")
def curves() -> dict[str, InfluenceCurve]:
    return simulate(*world(), SETTINGS)


def test_curves_by_their_definition(curves: dict[str, InfluenceCurve]):
    """Sample by sample: due time, influence, commit, then mean and variance of each interval from all its samples."""
    sources, pools = world()
    samples = {name: list(source) for name, source in sources.items()}
    base = base_distribution([np.concatenate(samples[name])[:500] for name in NAMES], VOCAB)
    models = InfluenceModels({name: pool[:400] for name, pool in pools.items()}, base, NgramSettings())
    order = Interleaving(samples, SETTINGS.natural_share, 0, VOCAB)
    total, due, interval = 0, 700.0, 700.0
    read: dict[str, list[tuple[int, np.ndarray]]] = {name: [] for name in NAMES}
    points: dict[str, list] = {name: [] for name in NAMES}

    def close() -> None:
        for name in NAMES:
            if new := read[name][sum(point[3] for point in points[name]) :]:
                lengths, y = np.array([n for n, _ in new]), np.stack([1000 * delta / n for n, delta in new])
                mean = np.average(y, axis=0, weights=lengths)
                variance = np.average((y - mean) ** 2, axis=0, weights=lengths)
                points[name].append((sum(n for n, _ in read[name]), mean, variance, len(new)))

    for source, number, ids in order:
        assert np.array_equal(ids, samples[NAMES[source]][number])
        read[NAMES[source]].append((len(ids), models.measure([ids], [source])[0]))
        total += len(ids)
        if total >= due:
            close()
            while due <= total:
                interval *= 1.5
                due += interval
    close()
    assert all(len(read[name]) == len(samples[name]) for name in NAMES)
    for name, curve in curves.items():
        tokens, mean, variance, _ = zip(*points[name], strict=True)
        assert len(tokens) > 3 and curve.tokens.tolist() == list(tokens)
        np.testing.assert_allclose(curve.mean, np.stack(mean), rtol=1e-11, atol=1e-14)
        np.testing.assert_allclose(curve.variance, np.stack(variance), rtol=1e-9, atol=1e-14)


def test_what_the_curves_say(curves: dict[str, InfluenceCurve]):
    """Own text helps most and less and less; a target is helped by the source it is made of."""
    matrix = influence_matrix(curves)
    assert matrix.shape == (3, 4)
    assert (np.argmax(matrix[:, :3], axis=0) == [0, 1, 2]).all() and np.argmax(matrix[:, 3]) == 1
    for number, curve in enumerate(curves.values()):
        assert curve.mean_between(0, 1 / 3)[number] > curve.mean_between(2 / 3, 1)[number] > 0
    features = influence_features(curves)
    names = influence_feature_names([*NAMES, "exam"])
    assert features.shape == (3, 12) and names[0] == "early web" and names[-1] == "decay exam"
    assert features[1, names.index("decay code")] > 0 and np.abs(features[:, 8:]).max() <= 1


def test_features_by_hand():
    """Two points in the first third, one point over the middle, one in the last third; and a source of one point."""
    mean = np.array([[8.0, -1.0], [2.0, -1.0], [100.0, 50.0], [1.0, 3.0]])
    long = InfluenceCurve(np.array([1, 3, 8, 9]), mean, np.zeros((4, 2)))
    short = InfluenceCurve(np.array([5]), np.array([[0.0, 4.0]]), np.zeros((1, 2)))
    features = influence_features({"long": long, "short": short})
    late = [(5 * 100 + 1) / 6, (5 * 50 + 3) / 6]
    decay = [(4 - late[0]) / (4 + late[0]), (-1 - late[1]) / (1 + late[1])]
    np.testing.assert_allclose(features, [[4, -1, *late, *decay], [0, 4, 0, 4, 0, 0]])
    np.testing.assert_allclose(influence_matrix({"long": long})[0], [(8 + 4 + 500 + 1) / 9, (-3 + 250 + 3) / 9])


@pytest.mark.parametrize("how", [{"threads": 3}, {"batch_samples": 1}, {"batch_samples": 1000, "save_samples": 10**9}])
def test_how_it_runs_changes_no_bit(curves: dict[str, InfluenceCurve], how: dict):
    assert_equal(simulate(*world(), replace(SETTINGS, **how)), curves)


def test_seed_moves_the_order(curves: dict[str, InfluenceCurve]):
    other = simulate(*world(), replace(SETTINGS, seed=1))
    assert not np.array_equal(other["web"].mean[0], curves["web"].mean[0])
    np.testing.assert_allclose(influence_matrix(other), influence_matrix(curves), rtol=0.2, atol=0.05)


def test_table_size_changes_no_bit(curves: dict[str, InfluenceCurve]):
    assert_equal(simulate(*world(), replace(SETTINGS, ngrams=NgramSettings(table_slots=2**16))), curves)


def test_order_follows_the_shares_at_every_moment():
    samples = {name: list(text(name, 400, ragged=False)) for name in NAMES}
    shares = {"web": 12.0, "code": 3.0, "math": 0.6}
    seen = np.zeros(3)
    for source, _, ids in Interleaving(samples, shares, 3, VOCAB):
        seen[source] += len(ids)
        if seen[0] == 400 * 30:
            break
        assert (np.abs(seen - seen.sum() * np.array([12, 3, 0.6]) / 15.6) <= 60).all()
    rest = [source for source, _, _ in Interleaving(samples, shares, 3, VOCAB)]
    assert np.bincount(rest).tolist() == [400, 400, 400], "those that end late are read to their end"


def killed_run(folder: Path, after_tokens: int) -> None:
    """Runs until so many tokens are read and then dies without any clean-up."""
    tokens = 0

    def progress(more: int) -> None:
        nonlocal tokens
        tokens += more
        if tokens >= after_tokens:
            os.kill(os.getpid(), signal.SIGKILL)

    simulate(*world(), SETTINGS, state_file=folder / "state.npz", export_folder=folder / "rows", progress=progress)


def read_export(folder: Path) -> tuple[list[str], dict[str, list]]:
    files = sorted(folder.glob("*"))
    tables = [parquet.read_table(file) for file in files]
    columns = {name: [x for table in tables for x in table[name].to_pylist()] for name in tables[0].column_names}
    return [file.name for file in files], columns


def test_killed_and_resumed_is_uninterrupted(curves: dict[str, InfluenceCurve], tmp_path: Path):
    """Killed between two saved states, twice: equal curves and equal exported files in the end."""
    context = multiprocessing.get_context("spawn")
    for after_tokens in (3_000, 7_000):
        child = context.Process(target=partial(killed_run, tmp_path, after_tokens))
        child.start()
        child.join(120)
        assert child.exitcode == -signal.SIGKILL
    heard: list[int] = []
    state, rows = tmp_path / "state.npz", tmp_path / "rows"
    saved = len(read_export(rows)[1]["sample"])
    assert 100 < saved < 400
    resumed = simulate(*world(), SETTINGS, state_file=state, export_folder=rows, progress=heard.append)
    assert_equal(resumed, curves)
    assert heard[0] > 5_000 and sum(heard) == sum(curve.tokens[-1] for curve in curves.values())
    simulate(*world(), SETTINGS, export_folder=tmp_path / "whole")
    (names, ours), (other_names, whole) = read_export(rows), read_export(tmp_path / "whole")
    assert names == other_names and len(names) == -(-len(whole["sample"]) // 13)
    assert ours == whole

    def unread() -> Iterator[np.ndarray]:
        raise AssertionError("a finished simulation reads nothing")
        yield

    again = simulate(dict.fromkeys(NAMES, unread()), world()[1], SETTINGS, state_file=state, export_folder=rows)
    assert_equal(again, curves)


def test_killed_at_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Everything is read and saved, only the last word is missing: no further sample is taken."""
    short = replace(SETTINGS, max_tokens=2_500, save_samples=1)
    state = tmp_path / "state.npz"

    def write_unless_finished(path: Path, identity: dict, arrays: dict) -> None:
        if arrays["finished"]:
            raise KeyboardInterrupt
        write_state(path, identity, arrays)

    monkeypatch.setattr(simulation, "write_state", write_unless_finished)
    with pytest.raises(KeyboardInterrupt):
        simulate(*world(), short, state_file=state)
    monkeypatch.undo()
    assert_equal(simulate(*world(), short, state_file=state), simulate(*world(), short))


def test_stopped_between_export_and_state(
    curves: dict[str, InfluenceCurve], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Exported samples that the state does not know of are exported again, not twice, however often it is saved."""
    state, rows, calls = tmp_path / "state.npz", tmp_path / "rows", iter(range(3))

    def write_twice(path: Path, identity: dict, arrays: dict) -> None:
        if next(calls) == 2:
            raise KeyboardInterrupt
        write_state(path, identity, arrays)

    monkeypatch.setattr(simulation, "write_state", write_twice)
    with pytest.raises(KeyboardInterrupt):
        simulate(*world(), SETTINGS, state_file=state, export_folder=rows)
    monkeypatch.undo()
    assert len(read_export(rows)[1]["sample"]) == 3 * 13
    often = replace(SETTINGS, save_samples=5)
    assert_equal(simulate(*world(), often, state_file=state, export_folder=rows), curves)
    simulate(*world(), SETTINGS, export_folder=tmp_path / "whole")
    assert read_export(rows)[1] == read_export(tmp_path / "whole")[1]


def test_export_adds_up_to_the_curves(curves: dict[str, InfluenceCurve], tmp_path: Path):
    simulate(*world(), SETTINGS, export_folder=tmp_path)
    columns = read_export(tmp_path)[1]
    for name, curve in curves.items():
        chosen = [row for row, source in enumerate(columns["source"]) if source == name]
        assert [columns["sample"][row] for row in chosen] == list(range(len(list(world()[0][name]))))
        tokens = sum(columns["tokens"][row] for row in chosen)
        for number, domain in enumerate([*NAMES, "exam"]):
            total = sum(columns[f"influence {domain}"][row] for row in chosen)
            assert abs(1000 * total / tokens - curve.mean_between(0, 1)[number]) < 1e-12
    with pytest.raises(ValueError, match="has samples of another simulation .*delete them"):
        simulate(*world(), SETTINGS, export_folder=tmp_path)


def test_states_that_do_not_fit(tmp_path: Path):
    state, rows = tmp_path / "state.npz", tmp_path / "rows"

    def stop(_: int) -> None:
        if state.exists():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        simulate(*world(), SETTINGS, state_file=state, export_folder=rows, progress=stop)
    resume = partial(simulate, state_file=state)
    sources, pools = world()
    with pytest.raises(
        ValueError, match=r"state\.npz: holds a simulation with seed = 0, this one has seed = 1: delete"
    ):
        resume(sources, pools, replace(SETTINGS, seed=1))
    with pytest.raises(ValueError, match="with pool of exam = .*, this one has pool of exam = "):
        resume(sources, pools | {"exam": pools["code"]}, SETTINGS)
    with pytest.raises(ValueError, match=r"natural_share of math = 5\.0, this one has natural_share of math = 6\.0"):
        resume(sources, pools, replace(SETTINGS, natural_share=SETTINGS.natural_share | {"math": 6.0}))
    with pytest.raises(ValueError, match="source 'code': its first . samples are not those of the interrupted"):
        resume(world()[0] | {"code": text("math", 50)}, pools, SETTINGS)
    with pytest.raises(ValueError, match=r"source 'math': its first 1 samples are not .*\(0 were read\)"):
        resume(world()[0] | {"math": iter(())}, pools, SETTINGS)
    next(rows.glob(PATTERN)).unlink()
    with pytest.raises(ValueError, match="rows: has 0 of the 13 samples .*delete them and the saved state"):
        simulate(*world(), SETTINGS, state_file=state, export_folder=rows)
    state.write_bytes(state.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"state\.npz: damaged .*: delete it"):
        resume(*world(), SETTINGS)
    assert not list(tmp_path.rglob("*.tmp"))


def test_ends_at_max_tokens():
    heard: list[int] = []
    curves = simulate(*world(), replace(SETTINGS, max_tokens=2_500), progress=heard.append)
    total = sum(curve.tokens[-1] for curve in curves.values())
    assert total == sum(heard) and 2_500 <= total < 2_500 + 60


def test_bad_worlds():
    sources, pools = world()
    sources = {name: list(source) for name, source in sources.items()}
    cases = [
        (sources, pools | {"code": pools["code"][:399]}, {}, "'code': its pool has 399 tokens, pool_tokens = 400 are"),
        (sources, {key: pools[key] for key in ("web", "code", "exam")}, {}, "domain 'math': it has no pool"),
        (sources, pools | {"wiki": pools["web"]}, {}, "pool 'wiki': no source has this name"),
        (sources, pools | {"web": pools["web"] + 100}, {}, "the pool of 'web': id .* is outside the vocabulary of 120"),
        ({}, pools, {}, "no source was given"),
        (sources, pools, {"targets": ("exam", "web")}, "sources and targets: the name 'web' is given 2 times"),
        (sources, pools, {"natural_share": {"web": 1.0}}, "natural_share names web, the sources are web, code, math"),
        (sources | {"math": iter(())}, pools, {}, "source 'math': it has no samples"),
        (sources | {"web": [*sources["web"][:2], np.array([], np.int64)]}, pools, {}, "'web': sample 2: no tokens"),
        (sources | {"code": [np.array([3, 120])]}, pools, {}, "'code': sample 0: id 120 is outside the vocabulary"),
        (sources, pools, {"max_tokens": 100}, "'math': max_tokens = 100 would end before .* at least [0-9]{3,4}"),
    ]  # fmt: skip
    for bad_sources, bad_pools, changes, message in cases:
        with pytest.raises(ValueError, match=message):
            simulate(bad_sources, bad_pools, replace(SETTINGS, **changes))


def test_pool_is_not_in_the_stream():
    rest = text("web", 50)
    pool = draw_pool("web", rest, 100)
    whole = np.concatenate(list(text("web", 50)))
    left = np.concatenate(list(rest))
    assert np.array_equal(pool, whole[:100]) and np.array_equal(left, whole[-len(left) :])
    assert len(left) <= len(whole) - 100
    with pytest.raises(ValueError, match="'web': its text has [0-9]+ tokens, its pool needs pool_tokens = 100000"):
        draw_pool("web", text("web", 50), 100_000)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"pool_tokens": 0}, "pool_tokens = 0: expected at least 1"),
        ({"max_tokens": 0}, "max_tokens = 0"),
        ({"threads": 0}, "threads = 0"),
        ({"record_growth": 0.5}, r"record_growth = 0\.5"),
        ({"base": "bigram"}, "base = 'bigram': expected one of unigram, uniform"),
        ({"targets": ("a", "a")}, "targets: the name 'a' is given 2 times"),
        ({"natural_share": {"web": 0.0}}, "natural_share of 'web' = 0"),
    ],
)
def test_bad_settings(values: dict, message: str):
    with pytest.raises(ValueError, match=message):
        replace(SETTINGS, **values)

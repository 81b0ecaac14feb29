"""From corpora to weights: the whole chain with tiny proxies, a kill in the middle, and what stops it."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mobilellm_pro.__main__ import main
from mobilellm_pro.config import JobError, load
from mobilellm_pro.data.shards import Corpus
from mobilellm_pro.data_mix.influence_curve import influence_matrix
from mobilellm_pro.data_mix.mixture_file import datasets_text
from mobilellm_pro.data_mix.report_record import MixReport
from mobilellm_pro.evaluation.held_out import held_out
from mobilellm_pro.pipeline import data_mix_calibration, data_mix_proxies
from mobilellm_pro.pipeline.data_mix import mix
from mobilellm_pro.pipeline.data_mix_plan import load_mix_plan
from mobilellm_pro.pipeline.data_mix_proxies import draw_mixtures, plan_proxies
from mobilellm_pro.pipeline.data_mix_simulation import read_curves, samples
from mobilellm_pro.pipeline.run_command import CommandFailed
from tests.data.synthetic import make_corpora
from tests.pipeline.test_data_mix_plan import write_plan
from tests.training.small_world import SmallWorld

PROXIES = 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three corpora: two to mix, and one that is a domain only."""
    path = tmp_path_factory.mktemp("mix")
    make_corpora(path, ("a", "b", "exam"), documents=300)
    return path


def files_of(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def mixed(world: SmallWorld, folder: Path) -> tuple[Path, dict[str, int]]:
    """The plan, after a start that was killed and one that went on; and the files at the kill."""
    plan, proxies = write_plan(folder, world), folder / "out/mix/proxies"
    command = [sys.executable, "-m", "mobilellm_pro", "mix", str(plan)]
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        deadline = time.monotonic() + 200
        while not list(proxies.glob("*/held_out.json")):
            assert process.poll() is None and time.monotonic() < deadline, "no proxy has finished"
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    time.sleep(1)  # proxies end with their parent
    at_kill = files_of(folder / "out/mix")
    assert len(list(proxies.glob("*/held_out.json"))) < PROXIES and not (folder / "out/mix/weights.toml").exists()
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TRAIN_COMMAND", raising=False)
        assert main(["mix", str(plan)]) == 0
    return plan, at_kill


@pytest.mark.slow
def test_from_corpora_to_weights(mixed: tuple[Path, dict[str, int]], world: SmallWorld) -> None:
    plan, at_kill = mixed
    folder = plan.parent / "out/mix"
    after = files_of(folder)
    kept = [path for path in at_kill if Path(path).name in ("held_out.json", "curves.npz")]
    assert len(kept) >= 2 and all(after[path] == at_kill[path] for path in kept)
    # The tables are of use to a job, within floor and cap.
    config = load(world.job, ["--data.mix", str(folder / "weights.toml")])
    weights = {dataset.name: dataset.weight for dataset in config.data.datasets}
    assert list(weights) == ["a", "b"] and sum(weights.values()) == pytest.approx(1, abs=1e-12)
    tokens = {name: Corpus.open(plan.parent / "tokens" / name, "train").num_tokens for name in weights}
    assert all(0.05 <= w and w * 5000 <= 4 * tokens[name] for name, w in weights.items())
    # The report holds what the steps found.
    report = MixReport.from_json((folder / "mix_report.json").read_text())
    assert {row["name"]: row["weight"] for row in report.weights} == weights
    assert set(report.baselines) == {"uniform", "natural", "regression on weights alone"}
    assert report.domains == ["a", "b", "exam"] and set(report.scores) == {
        f"{name}{alone}" for name in ("linear", "gaussian_process") for alone in ("", ", weights alone")
    }
    assert np.allclose(report.influence, influence_matrix(read_curves(folder)))
    assert len(report.predictions["utility"]["runs"]) == PROXIES
    page = (folder / "mix_report.html").read_text()
    assert "data:image/png" in page and "Measured utility of the natural share" in page


@pytest.mark.slow
def test_a_proxy_is_what_its_folder_says(mixed: tuple[Path, dict[str, int]]) -> None:
    plan = load_mix_plan(mixed[0])
    record = json.loads((plan.folder / "calibration.json").read_text())
    assert record["tokens"] == 3 * 4 * 64 and record["domains"] == ["a", "exam"]
    shares = Corpus.open(plan.corpora[0].path).num_tokens, Corpus.open(plan.corpora[1].path).num_tokens
    for proxy, row in zip(plan_proxies(plan), record["proxies"], strict=True):
        run = tomllib.loads((proxy.folder / "run/config.toml").read_text())
        assert [x["weight"] for x in run["data"]["datasets"]] == row["weights"] == list(proxy.weights)
        assert run["training"]["steps"] == 3 and run["distill"]["objective"] == "ce"
    natural, equal = (row["weights"] for row in record["proxies"][:2])
    assert natural[0] == pytest.approx(0.05 + 0.9 * shares[0] / sum(shares), abs=1e-6) and equal == [0.5, 0.5]
    last = record["proxies"][-1]
    words = [*plan.words, f"--data.mix={plan.folder / 'domains.toml'}"]
    result = held_out(str(plan.folder / f"proxies/{last['name']}/run"), load(plan.job, words))
    assert result is not None and list(result["by_corpus"].values()) == last["bits_per_byte"]
    # Twelve rows are too few to tell all mixtures apart.
    assert len({tuple(row["bits_per_byte"]) for row in record["proxies"]}) > PROXIES / 2


@pytest.mark.slow
def test_a_second_start_does_nothing(
    mixed: tuple[Path, dict[str, int]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files_of(mixed[0].parent / "out/mix")
    monkeypatch.setattr(data_mix_calibration, "run_proxies", lambda *_: pytest.fail("a proxy was started"))
    mix(str(mixed[0]))
    after = files_of(mixed[0].parent / "out/mix")
    changed = {Path(path).name for path in before if before[path] != after[path]}
    assert after.keys() == before.keys() and not changed
    assert capsys.readouterr().out.count(": done, ") == 4


def copy_of(mixed: tuple[Path, dict[str, int]], folder: Path, *changes: str) -> Path:
    """The plan with changed lines, on a copy of the finished folder."""
    plan = mixed[0]
    shutil.copytree(plan.parent / "out/mix", folder / "mix")
    shutil.copy(plan.parent / "job.toml", folder / "job.toml")
    text = plan.read_text().replace(f"{plan.parent}/out/mix", f"{folder}/mix")
    for old, new in [change.split(" -> ") for change in changes]:
        assert old in text
        text = text.replace(old, new)
    (folder / "mix.toml").write_text(text)
    return folder / "mix.toml"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("training.steps = 3 -> training.steps = 4", r"(?s)calibrate was begun.*training.steps: '3' there, '4' now"),
        ("concentration = 3.0 -> concentration = 2.0", "proxy.concentration: 3.0 there, 2.0 now"),
        ("seed = 3 -> seed = 4", "simulate was begun with other settings:\n  seed: 3 there, 4 now"),
        ("sample_tokens = 32 -> sample_tokens = 16", "simulation.sample_tokens: 32 there, 16 now"),
        ("save_samples = 50 -> export = true", "influence: has no files, and the simulation is finished: .*curves.npz"),
        ("train_tokens = 5000 -> train_tokens = 5000000", r"(?s)epoch_cap = 4 is infeasible.*a at most.*b at most"),
    ],
)
def test_what_changed_is_named(mixed: tuple[Path, dict[str, int]], tmp_path: Path, change: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mix(str(copy_of(mixed, tmp_path, change)))


@pytest.mark.slow
def test_the_order_of_the_corpora_belongs_to_the_proxies(mixed: tuple[Path, dict[str, int]], tmp_path: Path) -> None:
    plan = copy_of(mixed, tmp_path)
    before = files_of(tmp_path / "mix")
    head, first, second, rest = re.split(r"(?=\[\[corpus\]\])|(?=\[\[domain\]\])", plan.read_text(), maxsplit=3)
    plan.write_text(head + second + first + rest)
    for step in ("simulate", "calibrate"):
        with pytest.raises(
            ValueError, match=rf"{step} was begun with.*\n  corpora: \['a', 'b'\] there, \['b', 'a'\] now"
        ):
            mix(str(plan), only=step)
    assert files_of(tmp_path / "mix") == before


@pytest.mark.slow
def test_a_finished_proxy_keeps_its_mixture(
    mixed: tuple[Path, dict[str, int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = copy_of(mixed, tmp_path)
    before = (tmp_path / "mix/proxies/003/mixture.toml").read_text()

    def other_draws(*arguments: Any) -> np.ndarray:
        return draw_mixtures(*arguments[:-1], arguments[-1] + 1)

    monkeypatch.setattr(data_mix_proxies, "draw_mixtures", other_draws)
    with pytest.raises(ValueError, match='002/mixture.toml: proxy "002" ran on .*the plan gives .*release of numpy'):
        mix(str(plan), only="calibrate")
    assert (tmp_path / "mix/proxies/003/mixture.toml").read_text() == before


@pytest.mark.slow
def test_what_is_wrong_with_proxies_is_named(mixed: tuple[Path, dict[str, int]], tmp_path: Path) -> None:
    plan = copy_of(mixed, tmp_path)
    result = tmp_path / "mix/proxies/002/held_out.json"
    good = result.read_text()

    def spoil(**bits: float) -> None:
        record = json.loads(good)
        record["by_corpus"] = {key: value for key, value in (record["by_corpus"] | bits).items() if value}
        result.write_text(json.dumps(record))

    spoil(exam=float("nan"))
    with pytest.raises(ValueError, match='proxy "002": nan bits per byte on .exam.: it diverged; .*put 2 into'):
        mix(str(plan), only="calibrate")
    spoil(exam=0.0)
    with pytest.raises(ValueError, match="domain 'exam': it is absent from .*002/held_out.json"):
        mix(str(plan), only="calibrate")
    spoil(exam=80.0)
    mix(str(plan), only="calibrate")
    with pytest.raises(ValueError, match="run 'proxy 002' diverged: exam is 80"):
        mix(str(plan), only="fit")
    result.write_text(good)
    mix(str(plan), only="calibrate")
    calibration = tmp_path / "mix/calibration.json"
    calibration.write_text(calibration.read_text().replace('"exam"', '"other"'))
    with pytest.raises(ValueError, match="'exam' is absent from its domains"):
        mix(str(plan), only="weights")
    calibration.unlink()
    with pytest.raises(FileNotFoundError, match="proxies come first: .*--only calibrate"):
        mix(str(plan), only="fit")


def test_a_step_asks_for_those_before_it(world: SmallWorld, folder: Path, tmp_path: Path) -> None:
    plan = write_plan(folder, world, output=tmp_path / "mix", name="early.toml")
    with pytest.raises(FileNotFoundError, match="--only calibrate"):
        mix(str(plan), only="weights")
    text = plan.read_text().replace("pool_tokens = 300", "pool_tokens = 300000")
    plan.write_text(text)
    with pytest.raises(ValueError, match="domain 'a': its text has .* tokens, its pool needs pool_tokens = 300000"):
        mix(str(plan), only="simulate")


def test_a_plan_may_be_corrected_until_a_state_is_saved(
    world: SmallWorld, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = write_plan(folder, world, output=tmp_path / "mix", name="corrected.toml")
    good = plan.read_text()
    for wrong, message in (
        ("pool_tokens = 300000", "its pool needs pool_tokens = 300000"),
        ("pool_tokens = 300\nmax_tokens = 40", "max_tokens = 40 would end before"),
        ("pool_tokens = 300\ntable_slots = 16", "do not fit into table_slots = 16"),
    ):
        plan.write_text(good.replace("pool_tokens = 300", wrong))
        with pytest.raises(ValueError, match=message):
            mix(str(plan), only="simulate")
        assert not list((tmp_path / "mix").glob("*")), "nothing has begun"
    plan.write_text(good.replace("pool_tokens = 300", "pool_tokens = 300\ntable_slots = 4096\nmax_tokens = 6000"))
    mix(str(plan), only="simulate")
    assert f"tables of 3 domains: {3 * 4096 * 32 / 1e6:.1f} MB" in capsys.readouterr().out
    settings = json.loads((tmp_path / "mix/simulate_settings.json").read_text())
    assert settings["simulation.pool_tokens"] == 300 and settings["domains"] == ["a", "b", "exam"]
    # Where it was interrupted after a state, the settings bind.
    (tmp_path / "mix/curves.npz").unlink()
    plan.write_text(good)
    with pytest.raises(ValueError, match="simulation.max_tokens: 6000 there, None now"):
        mix(str(plan), only="simulate")


def test_a_domain_with_less_text_than_the_others_is_named(world: SmallWorld, folder: Path, tmp_path: Path) -> None:
    make_corpora(tmp_path, ("exam",), documents=100)
    plan = write_plan(folder, world, output=tmp_path / "mix", name="short.toml")
    text = plan.read_text().replace(f"{folder}/tokens/exam", f"{tmp_path}/tokens/exam")
    plan.write_text(text.replace("validation.steps = 2", "validation.steps = 8"))
    corpus = Corpus.open(tmp_path / "tokens/exam", "valid")
    found = int(np.minimum(corpus.lengths(0, corpus.num_documents), 64).sum())
    message = rf"domain 'exam': .* has {found} held-out tokens .* = 64, proxies are tested on {8 * 4 * 64 // 2} of each"
    with pytest.raises(ValueError, match=message):
        mix(str(plan), only="calibrate")
    assert not list((tmp_path / "mix").glob("*settings.json")), "nothing has begun: the plan may still be corrected"


def test_words_that_json_and_toml_write_differently() -> None:
    name = 'a "b" \\ \x7f \U0001f600 \n'
    tables = tomllib.loads(datasets_text([(name, "/tmp/ä", 0.5)]))["data"]["datasets"]
    assert tables == [{"name": name, "path": "/tmp/ä", "weight": 0.5}]


def test_a_proxy_that_fails_is_named(
    world: SmallWorld, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "train.sh"
    program.write_text('echo "trains $*"\necho "out of luck" >&2\nexit 3\n')
    monkeypatch.setenv("TRAIN_COMMAND", f"bash {program}")
    plan = write_plan(folder, world, output=tmp_path / "mix", name="failing.toml")
    with pytest.raises(CommandFailed) as error:
        mix(str(plan), only="calibrate")
    name = str(error.value).split('"')[1]
    log = tmp_path / f"mix/proxies/{name}/log.txt"
    assert str(error.value).startswith(f'proxy "{name}": train ended with status 3') and str(log) in str(error.value)
    assert f"--data.mix={tmp_path}/mix/proxies/{name}/mixture.toml" in log.read_text() and "out of luck" in str(error)
    broken = plan.read_text().replace("training.steps = 3", "training.steps = 3\nmodel.flavor = 'no'")
    plan.write_text(broken.replace(f"{tmp_path}/mix", f"{tmp_path}/other"))
    with pytest.raises(JobError, match="flavor"):
        mix(str(plan), only="calibrate")
    assert not list((tmp_path / "other").glob("*settings.json")), "nothing has begun: the plan may still be corrected"


def test_mixtures() -> None:
    tokens = [900, 90, 10]
    few, many = (draw_mixtures(tokens, count, 5.0, 0.5, 0.02, seed=1) for count in (6, 600))
    assert np.array_equal(few, many[:6]) and np.allclose(many.sum(1), 1) and many.min() >= 0.02
    assert np.allclose(many[0], 0.02 + 0.94 * np.array([0.9, 0.09, 0.01])) and np.allclose(many[1], 1 / 3)
    mean = np.sqrt([0.9, 0.09, 0.01]) / np.sqrt([0.9, 0.09, 0.01]).sum()
    assert np.allclose(many[2:].mean(0), 0.02 + 0.94 * mean, atol=0.03)
    assert not np.array_equal(few[2:], draw_mixtures(tokens, 6, 5.0, 0.5, 0.02, seed=2)[2:])


def test_samples_are_one_pass_over_a_corpus(folder: Path) -> None:
    corpus = Corpus.open(folder / "tokens/a")
    found = list(samples(corpus, 32, seed=1))
    assert {len(sample) for sample in found} == {32} and len(found) == corpus.num_tokens // 32
    read = np.bincount(np.concatenate(found), minlength=4096)
    there = np.bincount(np.concatenate(corpus.shard_ids), minlength=4096)
    assert (read <= there).all() and there.sum() - read.sum() < 32
    assert not all(np.array_equal(x, y) for x, y in zip(found, samples(corpus, 32, seed=2), strict=True))

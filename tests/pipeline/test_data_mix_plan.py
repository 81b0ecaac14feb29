"""The plan of a mix is read strictly: every mistake in it and in its proxies' job is named, at once."""

import tomllib
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mobilellm_pro.config import ConfigError
from mobilellm_pro.data.shards import Corpus
from mobilellm_pro.data_mix.influence_curve import influence_matrix
from mobilellm_pro.data_mix.regression import REGRESSORS, mixture_features
from mobilellm_pro.data_mix.regression_score import leave_one_out
from mobilellm_pro.data_mix.regression_stack import Stack
from mobilellm_pro.data_mix.simulation import SimulationSettings, simulate
from mobilellm_pro.pipeline import data_mix_simulation
from mobilellm_pro.pipeline.data_mix import mix
from mobilellm_pro.pipeline.data_mix_plan import load_mix_plan
from mobilellm_pro.pipeline.data_mix_simulation import read_curves
from tests.data.synthetic import DEBUG_TOKENIZER, make_corpora
from tests.training.small_world import SmallWorld

PLAN = """
output = "{output}"
seed = 3
[[corpus]]
name = "a"
path = "{folder}/tokens/a"
[[corpus]]
name = "b"
path = "{folder}/tokens/b"
[[domain]]
name = "a"
path = "{folder}/tokens/a"
weight = 1.0
[[domain]]
name = "exam"
path = "{folder}/tokens/exam"
weight = 3.0
[simulation]
sample_tokens = 32
pool_tokens = 300
record_tokens = 2000
base_tokens = 1000
save_samples = 50
[proxy]
job = "job.toml"
count = 5
concentration = 3.0
least_weight = 0.05
parallel = 2
[proxy.overrides]
distill.objective = "ce"
training.steps = 3
checkpoint.enable = true
checkpoint.interval = 3
validation.enable = true
validation.seq_len = 64
validation.local_batch_size = 4
validation.steps = 2
[fit]
regressor = "linear"
compare = ["gaussian_process"]
draws = 3
[weights]
train_tokens = 5000
temperature = 0.1
floor = 0.05
"""


def write_plan(folder: Path, world: SmallWorld, *, output: Path | None = None, name: str = "mix.toml") -> Path:
    """A plan for corpora in `folder/tokens`, and its job beside it."""
    job = world.job.read_text().replace(f"{world.folder}/run", f"{folder}/run")
    (folder / "job.toml").write_text(job)
    (folder / name).write_text(PLAN.format(folder=folder, output=output or folder / "out/mix"))
    return folder / name


def test_a_good_plan(world: SmallWorld, tmp_path: Path) -> None:
    path = write_plan(tmp_path, world)
    plan = load_mix_plan(path)
    assert plan.names == ["a", "b"] and [x.name for x in plan.targets] == ["exam"]
    assert [(x.name, x.weight) for x in plan.domains] == [("a", 0.25), ("exam", 0.75)]
    assert plan.job == tmp_path / "job.toml" and plan.base.training.steps == 3
    assert "--distill.objective=ce" in plan.words and plan.weights.epoch_cap == 4.0
    text = path.read_text()
    path.write_text(text[: text.index("[[domain]]")] + text[text.index("[simulation]") :])
    assert [(x.name, x.weight) for x in load_mix_plan(path).domains] == [("a", 0.5), ("b", 0.5)]


CASES = [
    ("seed = 3", "sede = 3", ["sede: found an unknown key", "did you mean seed?"]),
    ('output = "', 'output = ""\n# "', ["output: found nothing; expected a folder"]),
    ('name = "b"', 'name = "a"', ['corpus[1].name: found "a" a second time; expected one name for one corpus']),
    ('name = "exam"', 'name = "a"', ['domain[1].name: found "a" a second time', "while the corpus"]),
    ('name = "exam"', 'name = "b"', ["domain[1].path", "the same folder, or another name"]),
    ('name = "b"', 'nam = "b"', ["corpus[1].nam: found an unknown key", "did you mean name?"]),
    ("weight = 3.0", "weight = -1.0", ["domain[1].weight: found -1.0"]),
    ("pool_tokens", "pool_token", ["simulation.pool_token: found an unknown key", "did you mean pool_tokens?"]),
    ("sample_tokens = 32", "sample_tokens = 0", ["simulation.sample_tokens: found 0; expected at least 1"]),
    ("seed = 3", "seed = -1", ["seed: found -1; expected at least 0"]),
    ("pool_tokens = 300", "pool_tokens = 2", ["simulation.pool_tokens: found 2; expected at least order = 3"]),
    ("record_tokens = 2000", "record_growth = 0.9", ["simulation.record_growth: found 0.9; expected a number of at"]),
    ("base_tokens = 1000", "order = 2", ["simulation.concentration: found [", "expected order = 2 numbers above 0"]),
    ("base_tokens = 1000", "order_weights = [0.2, 0.2, 0.2]", ["simulation.order_weights: found [0.2", "sum to 1"]),
    ("base_tokens = 1000", "max_tokens = 0", ["simulation.max_tokens: found 0; expected at least 1"]),
    ("base_tokens = 1000", "table_slots = 1000", ["simulation.table_slots: found 1000; expected a power of two"]),
    ("save_samples = 50", "threads = 0", ["simulation.threads: found 0; expected at least 1"]),
    ('job = "job.toml"', "", ["proxy.job: found nothing"]),
    ('job = "job.toml"', 'job = "nowhere.toml"', ["nowhere.toml: found no such file"]),
    ("count = 5", "count = 4", ["proxy.count: found 4; expected at least 5"]),
    ("count = 5", "count = 5\nleave_out = [1]", ["proxy.count: found 5", "those left out"]),
    ("count = 5", "count = 9\nleave_out = [9]", ["proxy.leave_out: found [9]"]),
    ("least_weight = 0.05", "least_weight = 0.5", ["proxy.least_weight: found 0.5", "below 1 / 2 corpora"]),
    ("training.steps = 3", "training.step = 3", ["proxy.overrides: training.step: found an unknown key"]),
    ("training.steps = 3", "training.steps = -3", ["proxy.overrides: training.steps: found -3"]),
    ("training.steps = 3", 'data.mix = "x"', ["every proxy gets a mixture of its own"]),
    ("training.steps = 3", 'job.dump_folder = "x"', ["every proxy gets a folder of its own"]),
    ("checkpoint.enable = true", "", ["checkpoint.enable: found false; expected true"]),
    ("validation.enable = true", "validation.enable = false", ["validation.enable: found false"]),
    ('regressor = "linear"', 'regressor = "stack"', ["proxy.count: found 5; expected at least 7", "`stack`"]),
    ('compare = ["', 'compare = ["stack", "', ["proxy.count: found 5; expected at least 7", "`stack`"]),
    ("training.steps = 3", "training.global_batch_size = -1", ["training.global_batch_size: found -1", "as many"]),
    ('regressor = "linear"', 'regressor = "liner"', ["fit.regressor: found liner; expected one of gaussian_process"]),
    ("train_tokens = 5000", "", ["weights.train_tokens: found 0; expected tokens of the run"]),
    ("temperature = 0.1", "temperature = 0.0", ["weights.temperature: found 0.0"]),
    ("floor = 0.05", "floor = 0.6", ["weights.floor: found 0.6; expected 0 up to 1 / 2 corpora"]),
    ("[weights]", "[weights", ["no readable TOML"]),
]


@pytest.mark.parametrize(("old", "new", "messages"), CASES, ids=[f"{case[1]:.30}" for case in CASES])
def test_a_mistake_is_named(world: SmallWorld, tmp_path: Path, old: str, new: str, messages: list[str]) -> None:
    path = write_plan(tmp_path, world)
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(ConfigError) as error:
        load_mix_plan(path)
    for message in messages:
        assert message in str(error.value), str(error.value)


@pytest.mark.parametrize("value", [6, 7])
def test_stack_has_enough_runs_where_the_plan_says_so(world: SmallWorld, tmp_path: Path, value: int) -> None:
    path = write_plan(tmp_path, world)
    path.write_text(path.read_text().replace("count = 5", f"count = {value}").replace('"linear"', '"stack"'))
    mixtures = np.random.default_rng(1).dirichlet(np.ones(2), value)
    if value == 7:
        load_mix_plan(path)
    else:
        with pytest.raises(ConfigError, match="proxy.count"):
            load_mix_plan(path)
    stack = Stack({"linear": REGRESSORS["linear"]})
    with nullcontext() if value == 7 else pytest.raises(ValueError, match="at least 4"):
        predicted = leave_one_out(lambda seed: replace(stack, seed=seed), mixture_features(mixtures), mixtures[:, :1])
        assert np.isfinite(predicted).all()


def test_all_mistakes_are_named_at_once(world: SmallWorld, tmp_path: Path) -> None:
    path = write_plan(tmp_path, world)
    text = path.read_text().replace("count = 5", "count = 1").replace("floor = 0.05", "floor = 2.0")
    path.write_text(text.replace('objective = "ce"', 'objective = "cd"'))
    with pytest.raises(ConfigError, match="(?s)3 problems.*proxy.count.*weights.floor.*distill.objective"):
        load_mix_plan(path)


def test_the_plan_of_the_report_simulates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """train_configs/mobilellm_pro_1b/0_data_mix.toml with other folders, so that its settings have been in force.

    Only pools are smaller than there: seven of 200,000 held-out tokens would take longer to make than to read.
    """
    shipped = Path("train_configs/mobilellm_pro_1b/0_data_mix.toml").resolve()
    names = [table["name"] for table in tomllib.loads(shipped.read_text())["corpus"]]
    make_corpora(tmp_path, tuple(names), documents=200, shard_tokens=100_000)
    text = shipped.read_text().replace('"data/tokens/', f'"{tmp_path}/tokens/').replace("200_000", "600")
    text = text.replace('job = "1_language.toml"', f'job = "{shipped.parent / "1_language.toml"}"')
    overrides = f'[proxy.overrides]\ndata.tokenizer = "{DEBUG_TOKENIZER}"\n'
    (tmp_path / "mix.toml").write_text(text.replace("[proxy.overrides]\n", overrides))
    asked: list[SimulationSettings] = []

    def noted(sources: Any, pools: Any, settings: SimulationSettings, **others: Any) -> Any:
        asked.append(settings)
        return simulate(sources, pools, settings, **others)

    monkeypatch.setattr(data_mix_simulation, "simulate", noted)
    mix(str(tmp_path / "mix.toml"), output=str(tmp_path / "mix"), only="simulate")
    (settings,), table = asked, tomllib.loads(shipped.read_text())["simulation"]
    in_force = {key: getattr(settings, key) for key in table if hasattr(settings, key) and key != "pool_tokens"}
    assert in_force == {key: table[key] for key in in_force} and len(in_force) == len(table) - 3
    curves = read_curves(tmp_path / "mix")
    assert list(curves) == names and all(curve.mean.shape[1] == len(names) for curve in curves.values())
    matrix = influence_matrix(curves)
    others = (matrix.sum() - np.trace(matrix)) / (matrix.size - len(matrix))
    assert np.trace(matrix) / len(matrix) > others, "each helps itself more than it helps another"
    assert not (tmp_path / "mix/influence").exists(), "export = false"
    tokens = {name: Corpus.open(tmp_path / "tokens" / name).num_tokens for name in names}
    read = {name: int(curve.tokens[-1]) for name, curve in curves.items()}
    assert read == {name: count // 256 * 256 for name, count in tokens.items()}, "samples of 256, each once"

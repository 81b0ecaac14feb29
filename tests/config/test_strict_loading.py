"""The strict loader: layers, types, and all problems at once."""

from pathlib import Path

import pytest

from mobilellm_pro.config import ConfigError, JobConfig, load

VALID = """
[teacher]
path = "teacher"
[data]
tokenizer = "llama4"
[[data.datasets]]
name = "prose"
path = "shards/prose"
weight = 0.75
[[data.datasets]]
name = "code"
path = "shards/code"
weight = 0.25
"""


def written(folder: Path, text: str, name: str = "job.toml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def problems_of(path: Path, *overrides: str) -> dict[str, str]:
    """Problems by key."""
    with pytest.raises(ConfigError) as caught:
        load(path, overrides)
    return {problem.key: str(problem) for problem in caught.value.problems}


def test_a_valid_file_loads(tmp_path: Path):
    config = load(written(tmp_path, VALID + "[training]\nsteps = 700\nmax_norm = 1\n"))
    assert isinstance(config, JobConfig)
    assert config.training.steps == 700 and config.training.seq_len == 2048
    assert [dataset.name for dataset in config.data.datasets] == ["prose", "code"]


def test_all_problems_are_reported_together(tmp_path: Path):
    path = written(
        tmp_path,
        """
        trainig = 3
        [training]
        sed_len = 3
        local_batch_size = true
        steps = "x"
        lr = 0.1
        [training.dataloader]
        num_workrs = 2
        [optimizer]
        implementation = "fussed"
        [distill]
        temperature = 0
        [[data.datasets]]
        nam = "a"
        weight = "much"
        """,
    )
    problems = problems_of(path, "--training.seq_len", "long")
    assert set(problems) == {
        "trainig",
        "training.sed_len",
        "training.local_batch_size",
        "training.steps",
        "training.lr",
        "training.dataloader.num_workrs",
        "optimizer.implementation",
        "distill.temperature",
        "data.datasets[0].nam",
        "data.datasets[0].weight",
        "data.tokenizer",
        "teacher.path",
        "training.seq_len",
    }
    for key, guess in {
        "trainig": "training",
        "training.sed_len": "seq_len",
        "training.lr": "optimizer.lr",
        "training.dataloader.num_workrs": "num_workers",
        "optimizer.implementation": "fused",
        "data.datasets[0].nam": "name",
    }.items():
        assert f"did you mean {guess}?" in problems[key]
        assert problems[key].startswith(f"{path}: {key}: ")
    assert problems["training.seq_len"].startswith("command line: ")
    assert 'found "x" (a string); expected an integer' in problems["training.steps"]
    assert "found true (a boolean); expected an integer" in problems["training.local_batch_size"]


@pytest.mark.parametrize(
    ("text", "key", "expected"),
    [
        ("training = 3", "training", "a table"),
        ("[training]\nseq_len = 3.0", "training.seq_len", "an integer"),
        ("[optimizer]\nlr = '3'", "optimizer.lr", "a number"),
        ("[optimizer]\nlr = nan", "optimizer.lr", "a number"),
        ("[compile]\nenable = 1", "compile.enable", "a boolean"),
        ("[compile]\ncomponents = 'model'", "compile.components", "an array (a string each)"),
        ("[attention]\nglobal_layers = [0, 'x']", "attention.global_layers[1]", "an integer"),
        ("[attention]\nwindow = '4'", "attention.window", "an integer"),
        ("[training]\nmax_norm = '4'", "training.max_norm", "a number"),
        ("[distill]\nobjective = 'KL'", "distill.objective", 'one of "kl", "ce", "weighted"'),
        ("[data]\ndatasets = 'x'", "data.datasets", "an array of tables"),
        ("[data]\ndatasets = ['x']", "data.datasets[0]", "a table"),
        ("[data.datasets]\nname = 'x'", "data.datasets", "an array of tables"),
        ("[training]\nsteps = 2026-01-01", "training.steps", "an integer"),
    ],
)
def test_wrong_types(tmp_path: Path, text: str, key: str, expected: str):
    assert f"expected {expected}" in problems_of(written(tmp_path, text))[key]


def test_a_wrong_value_is_not_reported_again_by_the_checks_that_need_it(tmp_path: Path):
    problems = problems_of(written(tmp_path, "[teacher]\npath = 3\n[data]\ntokenizer = 3\ndatasets = 3"))
    assert set(problems) == {"teacher.path", "data.tokenizer", "data.datasets"}


def test_errors_of_the_dataclass_are_attributed(tmp_path: Path):
    problems = problems_of(written(tmp_path, VALID + "[validation]\nsteps = -5\nenable = true\n[training]\nsteps = 0"))
    assert "steps = -5" in problems["validation"] and "must be positive or -1" in problems["validation"]
    assert "training.steps" in problems


@pytest.mark.parametrize(
    ("content", "found"),
    [(b"a = = 1", "not TOML"), (b"\xff\xfe", "not UTF-8"), (None, "no such file")],
)
def test_unreadable_files(tmp_path: Path, content: bytes | None, found: str):
    path = tmp_path / "job.toml"
    if content is not None:
        path.write_bytes(content)
    assert found in problems_of(path)[""]


def test_tables_merge_and_arrays_replace(tmp_path: Path):
    lists = "[checkpoint]\nexclude_from_loading = ['a', 'b']"
    written(tmp_path, VALID + "[training]\nsteps = 700\nseq_len = 64\n" + lists, "common.toml")
    path = written(
        tmp_path,
        """
        base = "common.toml"
        [training]
        steps = 800
        [checkpoint]
        exclude_from_loading = ["c"]
        [[data.datasets]]
        name = "web"
        path = "shards/web"
        weight = 1
        """,
    )
    config = load(path, ["--training.steps", "900"])
    assert (config.training.steps, config.training.seq_len) == (900, 64)
    assert config.checkpoint.exclude_from_loading == ["c"]
    assert [(dataset.name, dataset.weight) for dataset in config.data.datasets] == [("web", 1.0)]


def test_problems_name_the_file_that_has_them(tmp_path: Path):
    wrong = "[training]\nsteps = 'x'\nlocal_batch_size = 0\n[distill]\nchunk_tokens = 0"
    base = written(tmp_path, VALID + wrong, "b.toml")
    path = written(tmp_path, 'base = "b.toml"\n[distill]\ntemperature = 0\n[training]\nlocal_batch_size = -1')
    problems = problems_of(path)
    assert problems["training.steps"].startswith(f"{base}: ")
    assert problems["distill.chunk_tokens"].startswith(f"{base}: ")
    assert problems["distill.temperature"].startswith(f"{path}: ")
    assert problems["training.local_batch_size"].startswith(f"{path}: ")


def test_a_base_has_no_base(tmp_path: Path):
    written(tmp_path, VALID, "first.toml")
    written(tmp_path, 'base = "first.toml"', "second.toml")
    problems = problems_of(written(tmp_path, 'base = "second.toml"'))
    assert "one level" in problems["base"]


def test_a_missing_base_is_named(tmp_path: Path):
    problems = problems_of(written(tmp_path, 'base = "nowhere.toml"\n' + VALID))
    assert str(tmp_path / "nowhere.toml") in problems[""]
    assert "base" in problems_of(written(tmp_path, "base = 3\n" + VALID))


@pytest.mark.parametrize(
    ("words", "key", "value"),
    [
        (["--training.steps", "500"], "training.steps", 500),
        (["--training.steps=500", "--training.steps=600"], "training.steps", 600),
        (["--training.seq-len", "64"], "training.seq_len", 64),
        (["--training.dataloader.num_workers", "2"], "training.dataloader.num_workers", 2),
        (["--validation.steps", "-1"], "validation.steps", -1),
        (["--optimizer.lr", "1e-4"], "optimizer.lr", 1e-4),
        (["--training.max_norm", "2"], "training.max_norm", 2),
        (["--training.max_norm", "2.5"], "training.max_norm", 2.5),
        (["--metrics.enable_tensorboard"], "metrics.enable_tensorboard", True),
        (["--metrics.enable_tensorboard", "true"], "metrics.enable_tensorboard", True),
        (["--checkpoint.no_initial_load_model_only"], "checkpoint.initial_load_model_only", False),
        (["--checkpoint.initial_load_model_only", "False"], "checkpoint.initial_load_model_only", False),
        (["--attention.global_layers", "0,3"], "attention.global_layers", [0, 3]),
        (["--attention.global_layers=[0, 3]"], "attention.global_layers", [0, 3]),
        (["--attention.window", "16", "--attention.window", "none"], "attention.window", None),
        (["--checkpoint.exclude_from_loading", "a,b"], "checkpoint.exclude_from_loading", ["a", "b"]),
        (["--model.converters", ""], "model.converters", []),
        (["--job.description", "5"], "job.description", "5"),
        (["--job.description", "a=b"], "job.description", "a=b"),
        (["--distill.objective", "ce"], "distill.objective", "ce"),
    ],
)
def test_overrides(tmp_path: Path, words: list[str], key: str, value: object):
    config = load(written(tmp_path, VALID), words)
    for name in key.split("."):
        config = getattr(config, name)
    assert config == value and type(config) is type(value)


def test_an_array_of_tables_from_the_command_line(tmp_path: Path):
    tables = '[{name = "web", path = "w", weight = 1}]'
    assert load(written(tmp_path, VALID), ["--data.datasets", tables]).data.datasets[0].name == "web"


@pytest.mark.parametrize(
    ("words", "key", "text"),
    [
        (["--training.stepz", "5"], "training.stepz", "did you mean training.steps?"),
        (["--steps", "5"], "steps", "did you mean training.steps"),
        (["--training.steps"], "training.steps", "found no value; expected an integer"),
        (["--training.steps", "five"], "training.steps", 'found "five" (a string); expected an integer'),
        (["--training.steps", "5.5"], "training.steps", "found 5.5 (a number); expected an integer"),
        (["--compile.enable", "maybe"], "compile.enable", "expected a boolean"),
        (["--attention.global_layers", "1,x"], "attention.global_layers[1]", "expected an integer"),
        (["stray"], "", 'found "stray"; expected --section.key value'),
        (["--training", "5"], "training", "an unknown key"),
    ],
)
def test_wrong_overrides(tmp_path: Path, words: list[str], key: str, text: str):
    problem = problems_of(written(tmp_path, VALID), *words)[key]
    assert problem.startswith("command line") and text in problem

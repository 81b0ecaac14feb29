"""`pipeline.toml`: what is wrong with one is said at once, with the place and the cure; what flows by name."""

from pathlib import Path

import pytest

from mobilellm_pro.config import ConfigError
from mobilellm_pro.pipeline.ledger import Record, changed_keys
from mobilellm_pro.pipeline.phase_kinds import KINDS
from mobilellm_pro.pipeline.phases import Pipeline, load_pipeline

FOLDER = Path(__file__).parents[2] / "train_configs"
GOOD = """
output = "out"
[[phase]]
name = "corpora"
kind = "prepare"
config = "job.toml"
[[phase]]
name = "mix"
kind = "data_mix"
config = "job.toml"
needs = ["corpora"]
[[phase]]
name = "base"
kind = "train"
config = "job.toml"
nproc = 3
overrides.data.mix = "phase:mix"
[[phase]]
name = "one"
kind = "train"
config = "job.toml"
initial_checkpoint = "phase:base"
[[phase]]
name = "two"
kind = "train"
config = "job.toml"
initial_checkpoint = "phase:base"
[[phase]]
name = "merged"
kind = "merge"
config = "job.toml"
initial_checkpoint = "phase:base"
branches.a = "phase:one"
branches.b = "phase:two"
[[phase]]
name = "folder"
kind = "convert"
initial_checkpoint = "phase:merged"
"""


def load_text(folder: Path, text: str) -> Pipeline:
    (folder / "job.toml").write_text("")
    path = folder / "pipeline.toml"
    path.write_text(text)
    return load_pipeline(path)


def test_what_is_named_is_needed(tmp_path: Path) -> None:
    pipeline = load_text(tmp_path, GOOD)
    assert pipeline["base"].needs == ("corpora", "mix") and pipeline["base"].corpora == ("corpora",)
    assert pipeline["merged"].needs == ("corpora", "mix", "base", "one", "two")
    assert pipeline.dependents("one") == ["merged", "folder"] and pipeline.dependents("folder") == []
    assert pipeline["base"].references == {"data.mix": "mix"} and pipeline["base"].folder == Path("out/base")
    assert (pipeline["base"].nproc, pipeline["one"].nproc) == (3, None)


def test_a_word_reaches_trainings_only(tmp_path: Path) -> None:
    load_text(tmp_path, GOOD)
    pipeline = load_pipeline(tmp_path / "pipeline.toml", "elsewhere", ["--debug.seed", "2"])
    assert {phase.name for phase in pipeline.phases if phase.words} == {"base", "one", "two"}
    assert pipeline["mix"].folder == Path("elsewhere/mix")


def test_processes_are_those_of_trainings(tmp_path: Path) -> None:
    """Small runs of a data mix have a number of their own, which the one of the file must not reach."""
    pipeline = load_text(tmp_path, f"nproc = 5\n{GOOD}")
    assert {phase.name: phase.nproc for phase in pipeline.phases if phase.nproc} == {"base": 3, "one": 5, "two": 5}


@pytest.mark.parametrize(
    ("before", "after", "problem"),
    [
        ('output = "out"', "", "output: found nothing; expected a folder for everything"),
        ('name = "mix"', 'name = "corpora"', 'phase[1].name: found "corpora" a second time'),
        ('name = "mix"', 'name = "logs"', "none of ledger, logs, replaced"),
        ('name = "mix"', 'name = "a/b"', "expected the name of a folder"),
        ('kind = "data_mix"', 'kind = "datamix"', 'did you mean data_mix?'),
        ('kind = "data_mix"\n', "", 'phase "mix": kind: found nothing; expected one of prepare'),
        ('needs = ["corpora"]', 'needs = ["copora"]', 'found "copora"; expected one of corpora; did you mean corpora?'),
        ('needs = ["corpora"]', 'needs = ["two"]', 'found "two"; expected a phase that stands before this one'),
        ('"phase:mix"', '"phase:base"', "overrides.data.mix: found \"base\"; expected a phase that stands before"),
        ('"phase:mix"', '"phase:corpora"', "corpora go by their folders"),
        ('initial_checkpoint = "phase:merged"', "", "initial_checkpoint: found nothing"),
        ('"phase:merged"', '"merged"', 'expected "phase:NAME"'),
        ('branches.a = "phase:one"\nbranches.b = "phase:two"\n', "", "branches: found nothing; expected at least two"),
        ('branches.a = "phase:one"', 'branches.a = ""', 'branches.a: found "" (a string); expected "phase:NAME"'),
        ("overrides.data.mix", "overrides.data.mixx", "did you mean mix?"),
        ("nproc = 3", "nproc = 0", "nproc: found 0; expected at least 1"),
        ("nproc = 3", 'overrides.job.dump_folder = "x"', "a phase's folder is that of the pipeline and its name"),
        ('kind = "prepare"\nconfig = "job.toml"', 'kind = "prepare"', "the TOML file of `prepare`"),
        ('kind = "prepare"\nconfig = "job.toml"', 'kind = "prepare"\nconfig = "nowhere.toml"', "nowhere.toml"),
        ('kind = "convert"', 'kind = "convert"\nconfig = "job.toml"', "`convert` has no file"),
        ('needs = ["corpora"]', "nproc = 2", "no such key: this is no training"),
        ('needs = ["corpora"]', "nedes = []", "did you mean needs?"),
    ],
)  # fmt: skip
def test_a_mistake_is_named(tmp_path: Path, before: str, after: str, problem: str) -> None:
    assert GOOD.count(before) >= 1
    with pytest.raises(ConfigError) as caught:
        load_text(tmp_path, GOOD.replace(before, after, 1))
    assert problem in str(caught.value) and "pipeline.toml" in str(caught.value)


def test_all_mistakes_at_once(tmp_path: Path) -> None:
    text = GOOD.replace("nproc = 3", "nproc = 0").replace('name = "mix"', 'name = "corpora"')
    with pytest.raises(ConfigError, match="3 problems"):
        load_text(tmp_path, text)  # the second name, the number, and `mix`, which nobody is called now


def test_no_pipeline(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no readable TOML"):
        load_pipeline(tmp_path / "nowhere.toml")
    with pytest.raises(ConfigError, match=r"phase: found nothing; expected \[\[phase\]\] tables"):
        load_text(tmp_path, 'output = "out"')


def test_debug_has_the_phases_of_the_real_run() -> None:
    """And a teacher before them, of which there is none to download."""
    debug, real = (load_pipeline(FOLDER / folder / "pipeline.toml") for folder in ("debug", "mobilellm_pro_1b"))
    teacher = ("0_teacher", "0_teacher_hugging_face")
    ours = [(phase.name, phase.kind, phase.branches) for phase in debug.phases if phase.name not in teacher]
    assert ours == [(phase.name, phase.kind, phase.branches) for phase in real.phases]
    for phase in real.phases:
        twin = debug[phase.name]
        assert [name for name in twin.needs if name not in teacher] == list(phase.needs)
        added = set() if "teacher.path" in phase.overrides else {"teacher.path"}
        assert twin.overrides.keys() - added == phase.overrides.keys()
        assert (twin.config and twin.config.name) == (phase.config and phase.config.name)
    assert sum(phase.name.startswith("3_specialist_") for phase in real.phases) >= 4


def test_identity_is_settings_and_inputs() -> None:
    record = Record("a", "train", settings={"x": 1}, inputs={"b": "1"})
    same = Record("other", "train", "done", settings={"x": 1}, inputs={"b": "1"}, wall_seconds=3.0)
    assert record.identity == same.identity
    assert record.identity != Record("a", "train", settings={"x": 2}, inputs={"b": "1"}).identity
    assert record.identity != Record("a", "train", settings={"x": 1}, inputs={"b": "2"}).identity


def test_changes_name_both_values() -> None:
    found = changed_keys({"same": 1, "other": 1, "gone": [1]}, {"same": 1, "other": 2, "new": "x"})
    assert found == ["gone ([1] then, the default now)", 'new (the default then, "x" now)', "other (1 then, 2 now)"]


def test_the_job_that_a_phases_file_names_decides_about_the_phase_too() -> None:
    phase = load_pipeline("train_configs/debug/pipeline.toml")["3_merge"]
    settings = KINDS["merge"].settings(phase, {})
    assert settings["job.data.tokenizer"] == "tests/assets/debug_tokenizer.model"
    assert settings["branches.code"] == "phase:3_specialist_code" and "job.job.dump_folder" not in settings

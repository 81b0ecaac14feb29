"""A grid is read strictly: every mistake in it and in the jobs of its variants is named, at once."""

from pathlib import Path
from typing import Any

import pytest

from mobilellm_pro.config import ConfigError
from mobilellm_pro.pipeline.ablation_grid import choose, load_grid
from mobilellm_pro.pipeline.varied_job import flatten
from tests.training.small_world import SmallWorld

JOB_WORDS = """
[checkpoint]
enable = true
initial_load_path = "{folder}/phase_1/checkpoint/step-3"
[validation]
enable = true
seq_len = 64
local_batch_size = 2
steps = 1
freq = 2
"""
GOOD = """
job = "job.toml"
[overrides]
training.steps = 2
training.seq_len = 256
[needle]
lengths = [200, 240]
depths = 2
needles = 1
[[variant]]
name = "plain"
why = "The job."
[[variant]]
name = "before"
why = "Where it starts."
train = false
[[variant]]
name = "labels"
why = "Without a teacher."
overrides.distill.objective = "ce"
overrides.attention.rope_base = 500
"""


def write_grid(folder: Path, world: SmallWorld, text: str = GOOD) -> Path:
    """A grid and its job, in a folder of their own."""
    folder.mkdir(parents=True, exist_ok=True)
    job = world.job.read_text().replace(f"{world.folder}/run", f"{folder}/outputs/run")
    (folder / "job.toml").write_text(job + JOB_WORDS.format(folder=folder))
    (folder / "grid.toml").write_text(text)
    return folder / "grid.toml"


def test_a_good_grid(world: SmallWorld, tmp_path: Path) -> None:
    grid = load_grid(write_grid(tmp_path, world))
    assert [variant.name for variant in grid.variants] == ["plain", "before", "labels"]
    assert grid.folder == tmp_path / "outputs/ablations/grid" and grid.base.training.steps == 2
    labels = grid.variants[2]
    assert labels.config.distill.objective == "ce" and labels.config.attention.rope_base == 500.0
    assert labels.changes == {"distill.objective": "ce", "attention.rope_base": 500}
    assert labels.words == (
        "--training.steps=2",
        "--training.seq_len=256",
        "--distill.objective=ce",
        "--attention.rope_base=500",
        f"--job.dump_folder={grid.folder}/labels",
    )
    assert [variant.name for variant in choose(grid, ["labels", "plain"])] == ["plain", "labels"]
    with pytest.raises(
        ValueError, match="--only label: .* has the variants plain, before, labels; did you mean labels"
    ):
        choose(grid, ["label"])
    assert load_grid(tmp_path / "grid.toml", tmp_path / "else").variants[0].folder == tmp_path / "else/plain"


def test_values_of_every_kind_arrive(world: SmallWorld, tmp_path: Path) -> None:
    values: dict[str, Any] = {
        "attention.global_layers": [0, 3],
        "compile.enable": False,
        "attention.student_mask": "causal",
        "optimizer.lr": 1e-4,
        "data.max_document_tokens": 32,
        "job.description": "--a=b 'c' \"d\"",
    }
    lines = ["overrides.attention.global_layers = [0, 3]", "overrides.compile.enable = false",
             'overrides.attention.student_mask = "causal"', "overrides.optimizer.lr = 1e-4",
             "overrides.data.max_document_tokens = 32",
             "overrides.job.description = '''--a=b 'c' \"d\"'''"]  # fmt: skip
    text = GOOD.replace('overrides.distill.objective = "ce"', "\n".join(lines))
    variant = load_grid(write_grid(tmp_path, world, text)).variants[2]
    for key, value in values.items():
        found: Any = variant.config
        for name in key.split("."):
            found = getattr(found, name)
        assert found == value, key


CASES = [
    ('job = "job.toml"', 'jb = "job.toml"', ["jb: found an unknown key", "did you mean job?", "job: found nothing"]),
    ('job = "job.toml"', 'job = "nowhere.toml"', ["nowhere.toml: found no such file"]),
    ("depths = 2", "depth = 2", ["needle.depth: found an unknown key", "did you mean depths?"]),
    ("depths = 2", "depths = 0", ["needle.depths: found 0"]),
    ("[200, 240]", "[]", ["needle.lengths: found []"]),
    ("[200, 240]", "[200, 200]", ["needle.lengths: found [200, 200]"]),
    ("[200, 240]", "[200, 300]", ['variant "plain": needle.lengths: found 300; expected lengths up to']),
    ('name = "labels"', 'name = "plain"', ['variant[2].name: found "plain" a second time']),
    ('name = "labels"', 'name = "a/b"', ['variant[2].name: found "a/b"; expected the name of a folder']),
    ('name = "labels"', "name = 3", ["variant[2].name: found 3 (an integer); expected a string"]),
    ('why = "The job."', "", ['variant "plain": why: found nothing']),
    ('why = "The job."', 'wy = "The job."', ["variant[0].wy: found an unknown key", "did you mean why?"]),
    ('objective = "ce"', 'objective = "weigted"', ['variant "labels": distill.objective', "did you mean weighted?"]),
    ("rope_base = 500", 'rope_base = "500"', ['attention.rope_base: found "500" (a string); expected a number']),
    ("rope_base = 500", "rope_bas = 500", ["attention.rope_bas: found an unknown key", "did you mean rope_base?"]),
    ("rope_base = 500", "rope_base = -1", ['variant "labels": attention.rope_base: found -1']),
    ("attention.rope_base = 500", 'job.dump_folder = "x"', ["every variant gets a folder of its own"]),
    (
        "train = false",
        "train = false\noverrides.debug.seed = 3",
        ['variant "before": overrides: found keys with train'],
    ),
    ('overrides.distill.objective = "ce"\noverrides.attention.rope_base = 500', "", ['those of "plain"']),
    ("training.steps = 2", "training.step = 2", ["overrides: training.step: found an unknown key"]),
    ("training.steps = 2", "checkpoint.enable = false", ["overrides: ", "would not be loaded with checkpoint.enable"]),
    (
        "attention.rope_base = 500",
        'checkpoint.enable = false\noverrides.checkpoint.initial_load_path = ""',
        ['variant "labels": checkpoint.enable: found false; expected true: the last checkpoint is tested'],
    ),
    ("training.steps = 2", 'checkpoint.initial_load_path = ""', ["what is tested with train = false"]),
    ("[[variant]]", "[[variants]]", ["variants: found an unknown key", "variant: found nothing"]),
    ("[needle]", "[needle", ["no readable TOML"]),
]


@pytest.mark.parametrize(("old", "new", "messages"), CASES, ids=[f"{case[1]:.30}" for case in CASES])
def test_a_mistake_is_named(world: SmallWorld, tmp_path: Path, old: str, new: str, messages: list[str]) -> None:
    assert old in GOOD
    with pytest.raises(ConfigError) as error:
        load_grid(write_grid(tmp_path, world, GOOD.replace(old, new)))
    for message in messages:
        assert message in str(error.value), str(error.value)


def test_all_mistakes_are_named_at_once(world: SmallWorld, tmp_path: Path) -> None:
    text = GOOD.replace("depths = 2", "depths = 0").replace('"ce"', '"cd"').replace('why = "The job."', "")
    with pytest.raises(ConfigError, match="(?s)3 problems.*needle.depths.*plain.*why.*distill.objective"):
        load_grid(write_grid(tmp_path, world, text))
    text = GOOD.replace("rope_base = 500", "window = -1") + (
        '[[variant]]\nname = "short"\nwhy = "x"\noverrides.training.seq_len = -64\n'
    )
    with pytest.raises(ConfigError, match='(?s)variant "labels": attention.window.*variant "short": training.seq_len'):
        load_grid(write_grid(tmp_path, world, text))
    with pytest.raises(ConfigError, match=r"nowhere.toml: found no readable TOML"):
        load_grid(tmp_path / "nowhere.toml")


def test_flatten() -> None:
    assert flatten({"a": {"b": 1, "c": {"d": [1]}}, "e": "f"}) == {"a.b": 1, "a.c.d": [1], "e": "f"}

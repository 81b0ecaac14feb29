"""`data.mix`: the tables of a file that `mix` wrote take the place of the base's, as strictly read as those."""

from pathlib import Path

import pytest

from mobilellm_pro.config import ConfigError, load, resolved_toml
from tests.config.test_strict_loading import VALID, problems_of, written

TABLES = """
[[data.datasets]]
name = "prose"
path = "shards/prose"
weight = 0.4
[[data.datasets]]
name = "law"
path = "shards/law"
weight = 0.6
"""


def mixed(folder: Path, text: str = TABLES) -> str:
    return str(written(folder, text, "weights.toml"))


def test_its_tables_replace_those_of_the_base(tmp_path: Path):
    written(tmp_path, VALID, "common.toml")
    job = written(tmp_path, f'base = "common.toml"\n[data]\nseed = 5\nmix = "{mixed(tmp_path)}"\n')
    by_file, by_word = load(job), load(tmp_path / "common.toml", ["--data.mix", mixed(tmp_path), "--data.seed=5"])
    assert [(x.name, x.weight) for x in by_file.data.datasets] == [("prose", 0.4), ("law", 0.6)]
    assert by_file == by_word and by_file.data.seed == 5
    # What a run keeps does not follow the file.
    resolved = written(tmp_path, resolved_toml(by_file), "resolved.toml")
    (tmp_path / "weights.toml").unlink()
    assert load(resolved) == by_file and by_file.data.mix == ""


def test_a_later_layer_wins(tmp_path: Path):
    written(tmp_path, VALID.split("[[data")[0] + f'mix = "{mixed(tmp_path)}"\n', "common.toml")
    tables = VALID[VALID.index("[[data") :]
    config = load(written(tmp_path, f'base = "common.toml"\n{tables}'))
    assert [x.name for x in config.data.datasets] == ["prose", "code"]


@pytest.mark.parametrize(
    ("text", "key", "message"),
    [
        (TABLES.replace("0.6", '"a lot"'), "data.datasets[1].weight", 'found "a lot" (a string); expected a number'),
        (TABLES.replace("path", "pth"), "data.datasets[0].pth", "found an unknown key"),
        (TABLES.replace("0.6", "0.5"), "data.datasets", "weights that sum to 0.9"),
        (TABLES.replace("law", "prose"), "data.datasets", '2 corpora named "prose"'),
        (TABLES + "[data]\nseed = 3\n", "", "found something else than [[data.datasets]]"),
        ("[training]\nsteps = 3\n", "", "found something else than [[data.datasets]]"),
        ("[[data", "", "found text that is not TOML"),
    ],
)
def test_a_mistake_in_the_file_is_named(tmp_path: Path, text: str, key: str, message: str):
    path = mixed(tmp_path, text)
    problem = problems_of(written(tmp_path, VALID), f"--data.mix={path}")[key]
    assert message in problem and path in problem


def test_the_file_and_tables_together_are_refused(tmp_path: Path):
    path = written(tmp_path, VALID.replace("[data]", f'[data]\nmix = "{mixed(tmp_path)}"'))
    assert "beside [[data.datasets]]" in problems_of(path)["data.mix"]
    with pytest.raises(ConfigError, match=r"nowhere\.toml: found no such file"):
        load(written(tmp_path, VALID), ["--data.mix=nowhere.toml"])

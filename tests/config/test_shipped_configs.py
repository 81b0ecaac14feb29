"""Every shipped TOML loads strictly, and the debug folder has the same files, sections and keys as the real one."""

import tomllib
from pathlib import Path
from typing import Any

import pytest

from mobilellm_pro.config import load, resolved_toml

FOLDER = Path(__file__).parents[2] / "train_configs"
FILES = {path: tomllib.loads(path.read_text()) for path in sorted(FOLDER.rglob("*.toml"))}
BASES = {path.parent / values["base"] for path, values in FILES.items() if isinstance(values.get("base"), str)}
JOBS = [path for path, values in FILES.items() if ("base" in values or "training" in values) and path not in BASES]


def keys_of(values: dict[str, Any], prefix: str = "") -> set[str]:
    """Dotted keys of a file; an array of tables counts as one key, and so does a list of corpora."""
    keys: set[str] = set()
    for name, value in values.items():
        keys |= keys_of(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}"}
    return keys


@pytest.mark.parametrize("path", JOBS, ids=lambda path: str(path.relative_to(FOLDER)))
def test_it_loads(path: Path, tmp_path: Path):
    config = load(path)
    resolved = tmp_path / "resolved.toml"
    resolved.write_text(resolved_toml(config))
    assert load(resolved) == config


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(FOLDER)))
def test_debug_has_the_same_keys(path: Path):
    twin = FOLDER / {"debug": "mobilellm_pro_1b", "mobilellm_pro_1b": "debug"}[path.parent.name] / path.name
    if twin not in FILES:
        pytest.skip(f"no {twin.relative_to(FOLDER)} yet")
    assert keys_of(FILES[path]) == keys_of(FILES[twin])


@pytest.mark.parametrize("folder", ["debug", "mobilellm_pro_1b"])
def test_what_prepare_writes_is_what_training_reads(folder: str):
    datasets = FILES[FOLDER / folder / "datasets.toml"]
    written = {table["name"]: f"{datasets['output']}/{table['name']}" for table in datasets["dataset"]}
    common = FILES[FOLDER / folder / "common.toml"]["data"]
    assert {table["name"]: table["path"] for table in common["datasets"]} == written
    assert common["tokenizer"] == datasets["tokenizer"]

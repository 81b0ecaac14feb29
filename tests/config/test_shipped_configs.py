"""Every shipped TOML loads strictly, and the debug folder has the same files, sections and keys as the real one."""

import tomllib
from pathlib import Path
from typing import Any

import pytest

from mobilellm_pro.config import load, resolved_toml
from mobilellm_pro.evaluation.needle_grid import Grid
from mobilellm_pro.pipeline.ablation_grid import load_grid
from mobilellm_pro.pipeline.data_mix_plan import load_mix_plan

FOLDER = Path(__file__).parents[2] / "train_configs"
FILES = {path: tomllib.loads(path.read_text()) for path in sorted(FOLDER.rglob("*.toml"))}
BASES = {path.parent / values["base"] for path, values in FILES.items() if isinstance(values.get("base"), str)}
SIZES = [path for path in FILES if path.relative_to(FOLDER).parts[0] != "suites"]
JOBS = [path for path, values in FILES.items() if {"base", "training"} & values.keys() and path not in BASES]
JOBS = [path for path in JOBS if path.name != "5_evaluate.toml"]  # its base is a suite


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


@pytest.mark.parametrize("path", SIZES, ids=lambda path: str(path.relative_to(FOLDER)))
def test_debug_has_the_same_keys(path: Path):
    own = path.relative_to(FOLDER)
    twin = FOLDER / {"debug": "mobilellm_pro_1b", "mobilellm_pro_1b": "debug"}[own.parts[0]] / Path(*own.parts[1:])
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


GRIDS = [path for path in FILES if path.parent.name == "ablations"]


@pytest.mark.parametrize("path", GRIDS, ids=lambda path: str(path.relative_to(FOLDER)))
def test_a_grid_loads_with_all_its_jobs(path: Path):
    grid = load_grid(path)
    assert grid.job.parent == path.parents[1] and len(grid.variants) == len(FILES[path]["variant"])
    first, *others = grid.variants
    assert first.name == "paper" and first.train and not first.changes, "the report's phase comes first"
    assert all(variant.changes or not variant.train for variant in others)
    assert all(variant.config.training.steps == first.config.training.steps for variant in others)


def test_the_grid_of_phase_2_turns_every_switch():
    (path,) = [path for path in GRIDS if path.parts[-3:] == ("mobilellm_pro_1b", "ablations", "context.toml")]
    grid = load_grid(path)
    assert {key for variant in grid.variants for key in variant.changes} == {
        "attention.student_mask",
        "attention.teacher_mask",
        "attention.positions",
        "attention.rope_base",
        "data.max_document_tokens",
        "data.min_document_tokens",
        "distill.objective",
    }
    phase_1 = load(path.parents[1] / "1_language.toml")
    by_name = {variant.name: variant.config for variant in grid.variants}
    assert by_name["base_of_phase_1"].attention.rope_base == phase_1.attention.rope_base
    assert by_name["truncated_documents"].data.max_document_tokens == phase_1.training.seq_len
    assert by_name["no_phase_2"].checkpoint.initial_load_path.startswith(phase_1.job.dump_folder)
    test = grid.needle
    assert (tuple(test.lengths), test.depths, test.needles) == (Grid().lengths, Grid().num_depths, Grid().num_needles)


@pytest.mark.parametrize("path", [path for path in GRIDS if "debug" in path.parts], ids=lambda path: path.name)
def test_debug_grids_have_the_same_variants(path: Path):
    twin = FOLDER / "mobilellm_pro_1b/ablations" / path.name
    ours, theirs = (
        [(table["name"], table.get("train"), keys_of(table.get("overrides", {}))) for table in FILES[file]["variant"]]
        for file in (path, twin)
    )
    assert ours == theirs


@pytest.mark.parametrize("folder", ["debug", "mobilellm_pro_1b"])
def test_the_mix_is_of_the_corpora_of_the_phases(folder: str):
    plan = load_mix_plan(FOLDER / folder / "0_data_mix.toml")
    phase = load(FOLDER / folder / "1_language.toml")
    assert plan.job == FOLDER / folder / "1_language.toml" and plan.base.distill.objective == "ce"
    assert {(x.name, x.path) for x in plan.corpora} == {(x.name, x.path) for x in phase.data.datasets}
    training = phase.training
    tokens = training.steps * training.global_batch_size * training.seq_len
    assert plan.weights.train_tokens == pytest.approx(tokens, rel=0.01)
    assert plan.folder.parent == Path(phase.job.dump_folder).parent

"""A grid of ablations as a file: the job that is varied, and variants that change some of its keys.

    job = "../2_context.toml"                  relative to the grid's own folder
    [overrides]                                of every variant, before its own
    training.steps = 20
    [needle]                                   the test that every variant takes at the end
    lengths = [200, 320, 512]
    [[variant]]
    name = "reset_positions"
    why = "Positions start at 0 in every document, so nothing says where in the row it stands."
    overrides.attention.positions = "reset"

A variant with `train = false` is the checkpoint that the job begins with, tested as it is.
"""

import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mobilellm_pro.config import ConfigError, JobConfig, Problem
from mobilellm_pro.config.config_error import nearest_name
from mobilellm_pro.config.needle_cells import NeedleCells
from mobilellm_pro.config.table_arrays import check_tables
from mobilellm_pro.config.toml import read_toml
from mobilellm_pro.config.typed_values import check_table
from mobilellm_pro.pipeline.varied_job import flatten, load_varied, override_problems, words_of

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass
class NeedleTest(NeedleCells):
    """Cells of the final needle test: as many places and prompts as the verb `needle` has by default."""

    depths: int = 9
    needles: int = 5


@dataclass
class VariantTable:
    """One [[variant]] as it stands in the file."""

    name: str = ""
    """Also the name of its folder."""

    why: str = ""
    """What it shows, in a sentence."""

    train: bool = True
    """Whether it is a run; else the checkpoint that the job begins with is tested."""

    overrides: dict = field(default_factory=dict)
    """Keys of the job and their values."""


@dataclass
class GridTable:
    """The file, but for its variants."""

    job: str = ""
    """TOML file of the job."""

    overrides: dict = field(default_factory=dict)
    """Keys of the job and their values, for every variant."""

    needle: NeedleTest = field(default_factory=NeedleTest)
    variant: list[VariantTable] = field(default_factory=list)


@dataclass(frozen=True)
class Variant:
    """A variant that can be run."""

    name: str
    why: str
    train: bool
    changes: Mapping[str, Any]
    """Dotted key -> value, its own ones."""

    words: tuple[str, ...]
    """The words of the command line: of the grid, of the variant, and its folder."""

    config: JobConfig
    folder: Path


@dataclass(frozen=True)
class AblationGrid:
    """A grid that can be run."""

    path: Path
    job: Path
    needle: NeedleTest
    folder: Path
    """Holds a folder for each variant, and the table."""

    base: JobConfig
    """The job with the overrides of every variant."""

    base_words: tuple[str, ...]
    """Those overrides as words of the command line."""

    variants: tuple[Variant, ...]


def load_grid(path: str | Path, folder: str | Path | None = None) -> AblationGrid:
    """Reads a grid and loads the job of every variant.

    Args:
        path: the file.
        folder: for all results; default `ablations/NAME` beside the job's own dump folder, NAME that of the file.

    Raises:
        ConfigError: with all problems of the grid and of all its jobs.
    """
    path = Path(path)
    raw = read_toml(path, "a grid")
    raw_variants = raw.pop("variant", None)
    values, problems = check_table(GridTable, raw, str(path))
    if not values.get("job"):
        problems.append(Problem(str(path), "job", "nothing", "the TOML file of the job, relative to the grid's folder"))
    expected = "[[variant]] tables with name, why and overrides"
    tables, more = check_tables(VariantTable, raw_variants, str(path), "variant", expected)
    problems += more
    needle = NeedleTest(**values.get("needle", {}))
    job = Path(os.path.normpath(path.parent / values.get("job", "")))
    common = values.get("overrides", {})
    problems += [*_override_problems(common, f"{path}: overrides"), *_needle_problems(needle, path)]
    problems += _variant_problems(tables, path)
    base = None if problems else load_varied(job, words_of(common), f"{path}: overrides", problems)
    if base is None:
        raise ConfigError(str(path), list(dict.fromkeys(problems)))
    root = Path(folder) if folder else Path(base.job.dump_folder).parent / "ablations" / path.stem
    found = [_variant(table, common, job, root, path, needle, problems) for table in tables]
    if problems:
        raise ConfigError(str(path), list(dict.fromkeys(problems)))
    variants = tuple(variant for variant in found if variant is not None)
    return AblationGrid(path, job, needle, root, base, tuple(words_of(common)), variants)


def choose(grid: AblationGrid, only: list[str] | None) -> list[Variant]:
    """The variants of these names, in the grid's order; all without names.

    Raises:
        ValueError: there is none of that name.
    """
    names = [variant.name for variant in grid.variants]
    for name in only or ():
        if name not in names:
            nearest = nearest_name(name, names)
            guess = f"; did you mean {nearest}?" if nearest else ""
            raise ValueError(f"--only {name}: {grid.path} has the variants {', '.join(names)}{guess}")
    return [variant for variant in grid.variants if not only or variant.name in only]


def _variant_problems(tables: list[VariantTable], path: Path) -> Iterator[Problem]:
    seen: dict[str, str] = {}
    names: set[str] = set()
    for index, table in enumerate(tables):
        key, place = f"variant[{index}]", f'{path}: variant "{table.name}"'
        if not _NAME.fullmatch(table.name):
            yield Problem(str(path), f"{key}.name", f'"{table.name}"', "the name of a folder: letters, digits, - _ .")
        elif table.name in names:
            yield Problem(str(path), f"{key}.name", f'"{table.name}" a second time', "one name for one variant")
        if not table.why:
            yield Problem(place, "why", "nothing", "a sentence: what this variant shows")
        if not table.train and table.overrides:
            yield Problem(place, "overrides", "keys with train = false", "none: nothing is trained")
        yield from _override_problems(table.overrides, place)
        same = json.dumps([table.train, dict(sorted(flatten(table.overrides).items()))], default=str)
        if same in seen:
            yield Problem(place, "overrides", f'those of "{seen[same]}"', "another change: it would be the same run")
        names.add(table.name)
        seen.setdefault(same, table.name)


def _override_problems(overrides: dict[str, Any], place: str) -> Iterator[Problem]:
    """Unknown keys and wrong types, and keys that a grid must not change."""
    kept = {"job.dump_folder": "no such key: every variant gets a folder of its own (--output)"}
    yield from override_problems(overrides, place, kept)


def _needle_problems(needle: NeedleTest, path: Path) -> Iterator[Problem]:
    for mismatch in needle.mismatches():
        yield Problem(str(path), f"needle.{mismatch.place}", mismatch.found, mismatch.expected)


def _variant(
    table: VariantTable,
    common: dict[str, Any],
    job: Path,
    root: Path,
    path: Path,
    needle: NeedleTest,
    problems: list[Problem],
) -> Variant | None:
    place, folder = f'{path}: variant "{table.name}"', root / table.name
    words = [*words_of(common), *words_of(table.overrides), f"--job.dump_folder={folder}"]
    config = load_varied(job, words, place, problems)
    if config is None:
        return None
    checkpoint = config.checkpoint
    if table.train and not checkpoint.enable:
        problems.append(Problem(place, "checkpoint.enable", "false", "true: the last checkpoint is tested"))
    if not table.train and not checkpoint.initial_load_path:
        problems.append(Problem(place, "checkpoint.initial_load_path", "nothing", "what is tested with train = false"))
    if table.train and max(needle.lengths) > config.training.seq_len:
        expected = f"lengths up to training.seq_len = {config.training.seq_len}"
        problems.append(Problem(place, "needle.lengths", str(max(needle.lengths)), expected))
    return Variant(table.name, table.why, table.train, flatten(table.overrides), tuple(words), config, folder)

"""`pipeline.toml`: the phases of a whole run in their order, and what flows from one to another by name.

    output = "outputs/debug"
    [[phase]]
    name = "2_context"                             its folder is outputs/debug/2_context
    kind = "train"
    config = "2_context.toml"                      relative to this file's folder
    needs = ["0_prepare"]
    initial_checkpoint = "phase:1_language"        the last checkpoint of that phase, which is needed too
    overrides.teacher.path = "phase:0_teacher_hugging_face"

A phase may only need phases that stand before it, so the file is read from top to bottom and there are no circles. What
a phase's kind makes of its table is in `phase_kinds.py`.
"""

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from mobilellm_pro.config import ConfigError, Problem
from mobilellm_pro.config.config_error import nearest_name
from mobilellm_pro.config.table_arrays import check_tables
from mobilellm_pro.config.toml import read_toml
from mobilellm_pro.config.typed_values import check_table, describe_value
from mobilellm_pro.pipeline.varied_job import flatten, override_problems

KindName = Literal["prepare", "data_mix", "train", "merge", "convert", "evaluate", "export"]
PREFIX = "phase:"

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_RESERVED = ("ledger", "logs", "replaced")
_KEPT = {
    "job.dump_folder": "no such key: a phase's folder is that of the pipeline and its name",
    "checkpoint.initial_load_path": 'initial_checkpoint = "phase:NAME" in the phase\'s table',
}


@dataclass
class PhaseTable:
    """One [[phase]] as it stands in the file."""

    name: str = ""
    """Also the name of its folder."""

    kind: KindName | None = None
    """What is done: which verb runs."""

    config: str = ""
    """The TOML file of that verb, relative to the pipeline's folder; `convert` has none."""

    needs: list[str] = field(default_factory=list)
    """Phases that must be done before; those named by `phase:NAME` are needed anyway."""

    initial_checkpoint: str = ""
    """`phase:NAME`: what a training begins with, and what is merged back to, converted, evaluated or exported."""

    branches: dict = field(default_factory=dict)
    """Of a merge: name of the branch in its TOML -> `phase:NAME`."""

    overrides: dict = field(default_factory=dict)
    """Of a training: keys of its job; a value `phase:NAME` is what that phase has made."""

    nproc: int | None = None
    """Of a training: processes on each node. Default: the file's, then $NPROC, then one for each GPU."""


@dataclass
class PipelineTable:
    """The file, but for its phases."""

    output: str = ""
    """Folder for everything but the corpora, which `prepare` writes where its own TOML says."""

    nproc: int | None = None
    """Processes of a training on each node."""


@dataclass(frozen=True)
class Phase:
    """A phase that can be run."""

    name: str
    kind: KindName
    config: Path | None
    needs: tuple[str, ...]
    """With those that it refers to, and all that these need, in the file's order."""

    corpora: tuple[str, ...]
    """Those of them that prepare corpora."""

    initial: str | None
    """Name of the phase whose checkpoint it begins with."""

    branches: dict[str, str]
    """Branch -> name of the phase."""

    overrides: dict[str, Any]
    """Dotted key -> value, `phase:NAME` as it stands."""

    words: tuple[str, ...]
    """Overrides of every training from the command line; they come last."""

    nproc: int | None
    """Of a training; small runs of a data mix have a number of their own."""

    folder: Path

    @property
    def references(self) -> dict[str, str]:
        """Dotted key -> name of the phase whose product is its value."""
        return {key: str(value).removeprefix(PREFIX) for key, value in self.overrides.items() if _refers(value)}


@dataclass(frozen=True)
class Pipeline:
    """A pipeline that can be run."""

    path: Path
    output: Path
    phases: tuple[Phase, ...]

    def __getitem__(self, name: str) -> Phase:
        return next(phase for phase in self.phases if phase.name == name)

    def dependents(self, name: str) -> list[str]:
        """Names of the phases that need this one, directly or not, in order."""
        return [phase.name for phase in self.phases if name in phase.needs]

    def choose(self, names: Sequence[str] | None, option: str) -> list[Phase]:
        """The phases of these names in the file's order; all without names.

        Raises:
            ValueError: there is none of that name; `option` says who asked.
        """
        known = [phase.name for phase in self.phases]
        for name in names or ():
            if name not in known:
                nearest = nearest_name(name, known)
                guess = f"; did you mean {nearest}?" if nearest else ""
                raise ValueError(f"{option} {name}: {self.path} has the phases {', '.join(known)}{guess}")
        return [phase for phase in self.phases if names is None or phase.name in names]


def load_pipeline(path: str | Path, output: str | Path | None = None, words: Sequence[str] = ()) -> Pipeline:
    """Reads the file; the files of its phases are read by their kinds.

    Args:
        path: the file.
        output: replaces the file's.
        words: overrides of every training, as on the command line.

    Raises:
        ConfigError: with all problems of the file.
    """
    path = Path(path)
    raw = read_toml(path, "a pipeline: output and [[phase]] tables")
    raw_phases = raw.pop("phase", None)
    values, problems = check_table(PipelineTable, raw, str(path))
    file = PipelineTable(**values)
    expected = "[[phase]] tables with name, kind, config and needs"
    tables, more = check_tables(PhaseTable, raw_phases, str(path), "phase", expected)
    problems += more
    if not file.output and not output:
        problems.append(Problem(str(path), "output", "nothing", "a folder for everything"))
    problems += [*_nproc_problems(file.nproc, f"{path}", "nproc"), *_table_problems(tables, path)]
    if problems:
        raise ConfigError(str(path), problems)
    folder, phases = Path(output or file.output), dict[str, Phase]()
    for table in tables:
        phases[table.name] = _phase(table, phases, file, path, folder, words)
    return Pipeline(path, folder, tuple(phases.values()))


def _table_problems(tables: list[PhaseTable], path: Path) -> Iterator[Problem]:
    names = [table.name for table in tables]
    for index, table in enumerate(tables):
        key, place = f"phase[{index}]", f'{path}: phase "{table.name}"'
        if not _NAME.fullmatch(table.name) or table.name in _RESERVED:
            expected = f"the name of a folder: letters, digits, - _ . and none of {', '.join(_RESERVED)}"
            yield Problem(str(path), f"{key}.name", f'"{table.name}"', expected)
        elif table.name in names[:index]:
            yield Problem(str(path), f"{key}.name", f'"{table.name}" a second time', "one name for one phase")
        if table.kind is None:
            yield Problem(place, "kind", "nothing", f"one of {', '.join(get_args(KindName))}")
            continue
        yield from _need_problems(table, tables, index, place)
        yield from _kind_problems(table, path, place)
        yield from _nproc_problems(table.nproc, place, "nproc")


def _nproc_problems(nproc: int | None, place: str, key: str) -> Iterator[Problem]:
    if nproc is not None and nproc < 1:
        yield Problem(place, key, str(nproc), "at least 1 process a node")


def _need_problems(table: PhaseTable, tables: list[PhaseTable], index: int, place: str) -> Iterator[Problem]:
    """Names of phases that are not there, or not yet."""
    before = {other.name: other for other in tables[:index]}
    references = {
        "initial_checkpoint": table.initial_checkpoint,
        **{f"branches.{name}": value for name, value in table.branches.items()},
        **{f"overrides.{key}": value for key, value in flatten(table.overrides).items() if _refers(value)},
    }
    for key, value in references.items():
        if not _refers(value) and (value or key != "initial_checkpoint"):
            yield Problem(place, key, describe_value(value), f'"{PREFIX}NAME", NAME that of a phase before this one')
    named = [("needs", name) for name in table.needs]
    named += [(key, value.removeprefix(PREFIX)) for key, value in references.items() if _refers(value)]
    for key, name in named:
        if name not in before:
            later = name in [other.name for other in tables[index:]]
            expected = "a phase that stands before this one" if later else f"one of {', '.join(before) or '(none)'}"
            yield Problem(place, key, f'"{name}"', expected, "" if later else nearest_name(name, before))
        elif key != "needs" and before[name].kind == "prepare":
            yield Problem(place, key, f'"{PREFIX}{name}"', "a phase that makes one thing; corpora go by their folders")


def _kind_problems(table: PhaseTable, path: Path, place: str) -> Iterator[Problem]:
    """Keys that the kind wants or has no use for."""
    kind = table.kind
    if kind == "convert" and table.config:
        yield Problem(place, "config", f'"{table.config}"', "no such key: `convert` has no file")
    elif kind != "convert" and not table.config:
        yield Problem(place, "config", "nothing", f"the TOML file of `{kind}`, relative to {path.parent}")
    elif kind != "convert" and not (path.parent / table.config).is_file():
        yield Problem(place, "config", f'"{table.config}"', f"a file; there is no {path.parent / table.config}")
    if kind in ("merge", "convert", "evaluate", "export") and not table.initial_checkpoint:
        yield Problem(place, "initial_checkpoint", "nothing", f'"{PREFIX}NAME": what `{kind}` is about')
    if kind in ("prepare", "data_mix") and table.initial_checkpoint:
        yield Problem(place, "initial_checkpoint", f'"{table.initial_checkpoint}"', f"no such key: `{kind}` reads text")
    if (kind == "merge") != bool(table.branches):
        found, expected = ("nothing", "at least two") if kind == "merge" else ("branches", "none: this is no merge")
        yield Problem(place, "branches", found, expected)
    if kind != "train":
        for key in ("overrides", "nproc"):
            if getattr(table, key):
                yield Problem(place, key, str(getattr(table, key)), "no such key: this is no training")
        return
    yield from override_problems(table.overrides, place, _KEPT)


def _refers(value: Any) -> bool:
    return isinstance(value, str) and value.startswith(PREFIX)


def _phase(
    table: PhaseTable, before: dict[str, Phase], file: PipelineTable, path: Path, output: Path, words: Sequence[str]
) -> Phase:
    assert table.kind is not None
    overrides = flatten(table.overrides)
    initial = table.initial_checkpoint.removeprefix(PREFIX) or None
    branches = {name: value.removeprefix(PREFIX) for name, value in table.branches.items()}
    direct = {*table.needs, *branches.values(), *filter(None, [initial])}
    direct |= {value.removeprefix(PREFIX) for value in overrides.values() if _refers(value)}
    needed = direct.union(*(before[name].needs for name in direct))
    return Phase(
        name=table.name,
        kind=table.kind,
        config=Path(os.path.normpath(path.parent / table.config)) if table.config else None,
        needs=tuple(name for name in before if name in needed),
        corpora=tuple(name for name in before if name in needed and before[name].kind == "prepare"),
        initial=initial,
        branches=branches,
        overrides=overrides,
        words=tuple(words) if table.kind == "train" else (),
        nproc=table.nproc or file.nproc if table.kind == "train" else None,
        folder=output / table.name,
    )

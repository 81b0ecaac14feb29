"""`3_merge.toml`: the branches, where they came from, and how their weights are found, read strictly.

    output = "outputs/debug/3_merge"
    job = "2_context.toml"
    parent = "outputs/debug/2_context"
    seed = 1
    [[branch]]                          merged
    name = "code"
    checkpoint = "outputs/debug/3_specialist_code"
    [[domain]]                          what scores are the mean over; default: the job's corpora
    name = "code"
    path = "outputs/debug/tokens/code"
    [search]  [warnings]

Paths of checkpoints and corpora are relative to the working directory, as in a job; that of the job to the file's own
folder. Nothing here needs the checkpoints to be there: a pipeline reads the file before its first phase runs.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mobilellm_pro.config import ConfigError, JobConfig, Problem
from mobilellm_pro.config.config_error import nearest_name
from mobilellm_pro.config.overrides import SOURCE as COMMAND_LINE
from mobilellm_pro.config.table_arrays import missing_or_repeated
from mobilellm_pro.config.toml import read_toml
from mobilellm_pro.config.typed_values import check_table
from mobilellm_pro.evaluation.suite import load_suite
from mobilellm_pro.merging.weight_search import SearchSettings, fewest_scores
from mobilellm_pro.merging.weighted_average import LayerGroups
from mobilellm_pro.pipeline.merge_tables import (
    BranchTable,
    MergeTable,
    ReportDomainTable,
    SearchTable,
    WarningTable,
)
from mobilellm_pro.pipeline.varied_job import load_varied

TOLERANCE = 1e-6
"""That a sum of given weights may differ from 1."""


@dataclass(frozen=True)
class MergePlan:
    """What can be merged, once its checkpoints are there."""

    path: Path
    folder: Path
    job: JobConfig
    parent: str
    """As configured; empty: that of the branches."""

    branches: tuple[BranchTable, ...]
    domains: tuple[ReportDomainTable, ...]
    search: SearchTable
    warnings: WarningTable
    dtype: str
    hugging_face_dtype: str
    seed: int
    dev_tokens: int
    """Of each domain."""

    valid_tokens: int

    @property
    def given(self) -> list[float] | None:
        """Weights of the file."""
        weights = [branch.weight for branch in self.branches]
        return None if None in weights else [float(weight) for weight in weights if weight is not None]

    @property
    def groups(self) -> LayerGroups:
        """Parameters that share weights."""
        return LayerGroups(tuple(self.search.layer_groups))

    @property
    def settings(self) -> SearchSettings:
        """Of the search."""
        table = self.search
        return SearchSettings(
            table.method, table.budget, table.draws, table.concentration, self.warnings.barrier_points,
            table.allow_negative, self.seed,
        )  # fmt: skip


def load_merge_plan(
    path: str | Path, output: str | None = None, parent: str | None = None, branches: Sequence[str] | None = None
) -> MergePlan:
    """Reads the file and the job that it names.

    Args:
        path: of the file.
        output, parent: replace the file's.
        branches: words "name=checkpoint" that replace the checkpoints of all branches of the file, or, where it has
            none, are the branches.

    Raises:
        ConfigError: with all problems of both files and the words.
    """
    path = Path(path)
    values, problems = check_table(MergeTable, read_toml(path, "branches and settings of `merge`"), str(path))
    values["search"] = SearchTable(**values.get("search", {}))
    values["warnings"] = WarningTable(**values.get("warnings", {}))
    file = MergeTable(**values)
    file = replace(file, output=output or file.output, parent=parent or file.parent)
    if branches is not None:
        file = replace(file, branch=_with_words(file.branch, branches, problems))
    problems += _problems(file, str(path))
    job = None
    if file.job:
        job = load_varied(Path(os.path.normpath(path.parent / file.job)), [], f"{path}: job", problems)
    if job is not None:
        problems += _job_problems(job, file, path)
    if problems or job is None:
        raise ConfigError(str(path), list(dict.fromkeys(problems)))
    domains = file.domain or [ReportDomainTable(item.name, item.path, item.clusters) for item in job.data.datasets]
    validation = job.validation
    share = validation.steps * validation.local_batch_size * validation.seq_len // len(domains)
    return MergePlan(
        path, Path(file.output), job, file.parent, tuple(file.branch), tuple(domains), file.search, file.warnings,
        file.dtype, file.hugging_face_dtype, file.seed, file.search.dev_tokens or share, file.valid_tokens or share,
    )  # fmt: skip


def _with_words(tables: list[BranchTable], words: Sequence[str], problems: list[Problem]) -> list[BranchTable]:
    """The branches with the checkpoints that the command line names."""
    named: dict[str, str] = {}
    known = [table.name for table in tables]
    for word in words:
        name, equals, checkpoint = word.partition("=")
        if not (name and equals and checkpoint):
            problems.append(Problem(COMMAND_LINE, "branches", f'"{word}"', "name=checkpoint"))
        elif name in named:
            problems.append(Problem(COMMAND_LINE, "branches", f'"{name}" a second time', "each branch once"))
        elif known and name not in known:
            expected, nearest = f"one of {', '.join(known)}", nearest_name(name, known)
            problems.append(Problem(COMMAND_LINE, "branches", f'"{name}"', expected, nearest))
        named.setdefault(name, checkpoint)
    if not tables:
        return [BranchTable(name, checkpoint) for name, checkpoint in named.items()]
    if missing := [name for name in known if name not in named]:
        problems.append(Problem(COMMAND_LINE, "branches", f"no {', '.join(missing)}", "all branches of the file"))
    return [replace(table, checkpoint=named.get(table.name, table.checkpoint)) for table in tables]


def _problems(file: MergeTable, source: str) -> Iterator[Problem]:
    if not file.output:
        yield Problem(source, "output", "nothing", "a folder for everything")
    if not file.job:
        yield Problem(source, "job", "nothing", "the TOML file of a job, relative to this file's folder")
    if len(file.branch) < 2:
        yield Problem(source, "branch", f"{len(file.branch)} tables", "at least two [[branch]] tables to merge")
    both = ("name", "checkpoint")
    yield from missing_or_repeated(file.branch, "branch", source, given=both, unique=both)
    yield from missing_or_repeated(file.domain, "domain", source, given=("name",), unique=("name",))
    for number, domain in enumerate(file.domain):
        if not domain.path:
            yield Problem(source, f"domain[{number}].path", "nothing", "the folder of a prepared corpus")
    yield from _weight_problems(file, source)
    yield from _range_problems(file, source)


def _weight_problems(file: MergeTable, source: str) -> Iterator[Problem]:
    weights = {number: branch.weight for number, branch in enumerate(file.branch) if branch.weight is not None}
    if file.search.method == "given" and not weights:
        yield Problem(
            source, "branch.weight", "none", 'a weight of every branch, or another search.method than "given"'
        )
    if not weights:
        return
    for number, branch in enumerate(file.branch):
        if branch.weight is None:
            yield Problem(source, f"branch[{number}].weight", "nothing", "a weight of every branch, or of none")
    for number, weight in weights.items():
        if abs(weight) == float("inf") or (weight < 0 and not file.search.allow_negative):
            expected = "a number of at least 0, or search.allow_negative = true"
            yield Problem(source, f"branch[{number}].weight", str(weight), expected)
    total = sum(weights.values())
    if len(weights) == len(file.branch) and not abs(total - 1) <= TOLERANCE:
        yield Problem(source, "branch.weight", f"weights that sum to {total:g}", "a sum of 1")


def _range_problems(file: MergeTable, source: str) -> Iterator[Problem]:
    search, warnings, finite = file.search, file.warnings, float("inf")
    num_given = any(branch.weight is not None for branch in file.branch)
    least = fewest_scores(len(file.branch), max(warnings.barrier_points, 0), num_given)
    ranges: list[tuple[str, Any, bool, str]] = [
        ("seed", file.seed, file.seed >= 0, "at least 0"),
        ("valid_tokens", file.valid_tokens, file.valid_tokens is None or file.valid_tokens >= 2, "at least 2"),
        ("search.budget", search.budget, search.budget >= least,
         f"at least {least}: uniform, each branch, given weights and warnings.barrier_points for each branch"),
        ("search.draws", search.draws, search.draws >= 0, "at least 0"),
        ("search.concentration", search.concentration, 0 < search.concentration < finite, "a number above 0"),
        ("search.dev_tokens", search.dev_tokens, search.dev_tokens is None or search.dev_tokens >= 2, "at least 2"),
        ("search.memory_gib", search.memory_gib, search.memory_gib >= 0, "at least 0"),
        ("warnings.distance", warnings.distance, warnings.distance >= 0, "a number of at least 0"),
        ("warnings.barrier", warnings.barrier, warnings.barrier >= 0, "a number of at least 0"),
        ("warnings.barrier_points", warnings.barrier_points, warnings.barrier_points >= 0, "at least 0"),
    ]  # fmt: skip
    for key, value, fits, expected in ranges:
        if not fits:
            yield Problem(source, key, str(value), expected)
    if (search.objective == "suite") != bool(search.suite):
        yield Problem(source, "search.suite", f'"{search.suite}"', 'a TOML file with objective "suite", else nothing')
    if search.suite:
        try:
            load_suite(search.suite)
        except ConfigError as error:
            yield from error.problems
    if search.method == "nelder_mead" and find_spec("scipy") is None:
        yield Problem(source, "search.method", '"nelder_mead"', "scipy (the extra `merge` of this package), or another")
    try:
        LayerGroups(tuple(search.layer_groups))
    except ValueError as error:
        yield Problem(source, "search.layer_groups", str(search.layer_groups), str(error).partition("expected ")[2])


def _job_problems(job: JobConfig, file: MergeTable, path: Path) -> Iterator[Problem]:
    place = f"{path}: job: {file.job}"
    if not job.validation.enable:
        yield Problem(place, "validation.enable", "false", "true: it says how much text the models are tested on")
    if not job.data.datasets and not file.domain:
        yield Problem(place, "data.datasets", "no corpora", "some, or [[domain]] tables")
    if file.search.objective == "kl" and not job.teacher.path:
        yield Problem(place, "teacher.path", "nothing", 'the teacher\'s folder, or search.objective = "bits_per_byte"')
    if job.model.name != "mobilellm_pro":
        yield Problem(place, "model.name", f'"{job.model.name}"', '"mobilellm_pro": students are merged')

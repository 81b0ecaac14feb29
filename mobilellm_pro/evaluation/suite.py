"""A suite of evaluations as TOML: which tasks, with how many shots, which of their metrics counts.

base = "../suites/base.toml"              a file that this one changes: its keys stay where this one says nothing
name = "base"
data = "evaluation_data"                  local folder of datasets; without it they come from the Hugging Face Hub
limit = 100                               documents of each task; without it, or 0, all
only = ["boolq", "piqa"]                  of the columns; without it all
[[column]]
task = "boolq"                            as lm-eval calls it; "needle" is this project's own test
name = "BoolQ"
metric = "acc"
shots = 0
[[average]]
name = "average"
columns = ["boolq", "piqa"]
[needle]  [ruler]                         settings of those tests
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from mobilellm_pro.config import ConfigError, Problem
from mobilellm_pro.config.config_error import nearest_name
from mobilellm_pro.config.needle_cells import NeedleCells
from mobilellm_pro.config.table_arrays import missing_or_repeated
from mobilellm_pro.config.toml import read_toml
from mobilellm_pro.config.typed_values import check_table
from mobilellm_pro.evaluation.needle_grid import Grid

NEEDLE = "needle"
"""Task of a column that the harness does not know."""

DEFAULT_NEW_TOKENS = 256
"""Of a continuation whose task does not say how long it may be; the harness' own."""


@dataclass
class Column:
    """A number of the table."""

    task: str = ""
    """A task or a group of tasks, as lm-eval calls it."""

    name: str = ""
    """In tables."""

    metric: str = ""
    """One of the task's: "acc", or "exact_match,remove_whitespace" where it has several filters."""

    shots: int | None = None
    """Examples before each question; None: what the task says."""


@dataclass
class Average:
    """The mean of columns."""

    name: str = ""
    columns: list[str] = field(default_factory=list)
    """Tasks."""


@dataclass
class NeedleTable(NeedleCells):
    """The grid of this project's needle test; see `mobilellm-pro needle --help`."""

    lengths: list[int] = field(default_factory=lambda: list(Grid().lengths))
    depths: int = Grid().num_depths
    needles: int = Grid().num_needles


@dataclass
class RulerTable:
    """RULER's own tests."""

    lengths: list[int] = field(default_factory=lambda: [4096])
    """Tokens of their prompts."""


@dataclass
class Suite:
    """A file."""

    name: str = ""
    base: str = ""
    """Another file, relative to this one's folder, whose keys hold where this one has none."""

    column: list[Column] = field(default_factory=list)
    average: list[Average] = field(default_factory=list)
    only: list[str] = field(default_factory=list)
    """Tasks; empty: all columns."""

    data: str = ""
    """Local folder of datasets; empty: from the Hub."""

    limit: int = 0
    """Documents of a task, the first ones; 0: all."""

    chat: bool = False
    """Questions are put as a user's turn, in the format that Llama 4's tokenizer has names for."""

    max_length: int | None = None
    """Tokens of the longest sequence; None: what the model was trained on."""

    seed: int = 1234
    """Of the choice of examples and of sampling."""

    needle: NeedleTable = field(default_factory=NeedleTable)
    ruler: RulerTable = field(default_factory=RulerTable)

    @property
    def columns(self) -> list[Column]:
        """Those that are evaluated."""
        return [column for column in self.column if not self.only or column.task in self.only]

    @property
    def averages(self) -> list[Average]:
        """Those all of whose columns are evaluated; if there is none, that of all that are."""
        tasks = [column.task for column in self.columns]
        whole = [average for average in self.average if set(tasks).issuperset(average.columns)]
        return whole or [Average("columns above", tasks)]


def load_suite(path: str | Path) -> Suite:
    """Reads a file and the one that it is based on.

    Raises:
        ConfigError: with all problems of both.
    """
    path = Path(path)
    values, problems = _read(path)
    if base := values.pop("base", ""):
        below, more = _read(path.parent / base)
        if "base" in below:
            more.append(Problem(str(path.parent / base), "base", "a base of a base", "one level"))
        tables = {key: below.get(key, {}) | values.get(key, {}) for key in ("needle", "ruler")}
        values, problems = below | values | tables, problems + more
    values["needle"] = NeedleTable(**values.get("needle", {}))
    values["ruler"] = RulerTable(**values.get("ruler", {}))
    suite = Suite(**values)
    problems += _problems(suite, str(path))
    if problems:
        raise ConfigError(str(path), problems)
    return suite


def check_suite(suite: Suite, source: str) -> None:
    """A suite whose keys were changed after it was read; raises ConfigError with all its problems."""
    if problems := list(_problems(suite, source)):
        raise ConfigError(source, problems)


def _read(path: Path) -> tuple[dict, list[Problem]]:
    return check_table(Suite, read_toml(path, "a suite of evaluations"), str(path))


def _problems(suite: Suite, source: str) -> Iterator[Problem]:
    tasks = [column.task for column in suite.column]
    if not suite.name:
        yield Problem(source, "name", "nothing", "the suite's name")
    if not tasks:
        yield Problem(source, "column", "nothing", "[[column]] tables with task, name and metric")
    given = ("task", "name", "metric")
    yield from missing_or_repeated(suite.column, "column", source, given=given, unique=("task", "name"))
    yield from missing_or_repeated(suite.average, "average", source, given=("name", "columns"), unique=("name",))
    wanted = [("only", task) for task in suite.only]
    wanted += [(f"average[{n}].columns", task) for n, average in enumerate(suite.average) for task in average.columns]
    for key, task in wanted:
        if task not in tasks:
            yield Problem(source, key, f'"{task}"', "the task of a [[column]]", nearest_name(task, tasks))
    if len(suite.ruler.lengths) != 1:
        yield Problem(source, "ruler.lengths", str(suite.ruler.lengths), "one length, which is also the metric's name")
    if suite.limit < 0:
        yield Problem(source, "limit", str(suite.limit), "a number of documents, or 0 for all")
    if suite.max_length is not None and suite.max_length < 1:
        yield Problem(source, "max_length", str(suite.max_length), "at least 1, or no such key")
    for wrong in suite.needle.mismatches():
        yield Problem(source, f"needle.{wrong.place}", wrong.found, wrong.expected)
    for place, column in enumerate(suite.column):
        if column.shots is not None and column.shots < 0:
            yield Problem(source, f"column[{place}].shots", str(column.shots), "0 or more")

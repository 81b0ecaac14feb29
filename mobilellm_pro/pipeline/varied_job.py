"""A job some of whose keys another TOML changes: `[overrides]` there, words of a command line here.

    job = "../2_context.toml"
    [overrides]
    training.steps = 20

A run that is started by such words can be started by hand in the same way, which is what its log shows.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mobilellm_pro.config import ConfigError, JobConfig, Problem, load
from mobilellm_pro.config.overrides import SOURCE as COMMAND_LINE
from mobilellm_pro.config.typed_values import check_table


def override_problems(overrides: dict[str, Any], place: str, kept: Mapping[str, str]) -> Iterator[Problem]:
    """Unknown keys, wrong types, and what must not be changed.

    Args:
        overrides: tables of keys of a job.
        place: the file and table, for messages.
        kept: key that must not be changed -> what is expected instead.
    """
    yield from check_table(JobConfig, overrides, place)[1]
    for key, value in flatten(overrides).items():
        if key in kept:
            yield Problem(place, key, f'"{value}"', kept[key])
        if isinstance(value, list) and any(isinstance(item, dict) for item in value):
            yield Problem(place, key, "tables", "a job file of its own: overrides change plain keys")


def load_varied(job: Path, words: Sequence[str], place: str, problems: list[Problem]) -> JobConfig | None:
    """The job with the overrides `words`, or None and its problems, of which `place` says who asked for it."""
    try:
        return load(job, words)
    except ConfigError as error:
        for problem in error.problems:
            source = place if problem.source == COMMAND_LINE else f"{place}: {problem.source}"
            problems.append(Problem(source, problem.key, problem.found, problem.expected, problem.nearest))
        return None


def flatten(overrides: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value."""
    flat: dict[str, Any] = {}
    for name, value in overrides.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def words_of(overrides: Mapping[str, Any]) -> list[str]:
    """As on the command line; one word a key, so that no value is taken for a key."""
    return [f"--{key}={word_of(value)}" for key, value in flatten(overrides).items()]


def word_of(value: Any) -> str:
    """A TOML value as a word of the command line."""
    if isinstance(value, (bool, list)):
        return json.dumps(value)  # JSON's booleans and plain arrays are TOML's
    return str(value)

"""Strict loading: a TOML file, the file it is based on, and keys from the command line become one JobConfig.

A file may begin with `base = "common.toml"`, relative to its own folder; the base has no base itself. Tables merge key
by key, arrays replace. The command line comes last. Every layer is checked against the dataclasses for unknown keys and
wrong types, then the whole is checked by `checks.py`; all problems are reported together.

`data.mix = "outputs/debug/0_data_mix/weights.toml"` in any layer stands for the `[[data.datasets]]` tables of that
file. They are read now and the key is gone afterwards, so what a run keeps as its configuration does not change with
the file.
"""

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import Any

from mobilellm_pro.config.checks import check_keys
from mobilellm_pro.config.config_error import ConfigError, Problem
from mobilellm_pro.config.job_config import JobConfig
from mobilellm_pro.config.overrides import SOURCE as COMMAND_LINE
from mobilellm_pro.config.overrides import parse_overrides
from mobilellm_pro.config.typed_values import check_table, describe_value, field_types


@dataclass
class Layer:
    """Raw values from one source."""

    source: str
    values: dict[str, Any]


def read_toml(path: Path, expected: str) -> dict[str, Any]:
    """The raw values of a file; raises ConfigError where it cannot be read, `expected` says what it should be."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(str(path), [Problem(str(path), "", f"no readable TOML ({error})", expected)]) from None


def load(path: str | Path, overrides: Sequence[str] = ()) -> JobConfig:
    """The configuration in a TOML file, with overrides from the command line.

    Args:
        path: the file.
        overrides: words such as `["--training.steps", "100", "--compile.no_enable"]`.

    Raises:
        ConfigError: with all problems of the file, its base and the overrides.
    """
    layers, problems = _read_layers(Path(path))
    values, more = parse_overrides(JobConfig, overrides)
    layers.append(Layer(COMMAND_LINE, values))
    problems += more
    merged: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for layer in layers:
        values, more = check_table(JobConfig, layer.values, layer.source)
        problems += more
        for part in _with_mix(Layer(layer.source, values), problems):
            _merge(merged, part.values, sources, part.source)
    config = _build(JobConfig, merged, sources, problems)
    unreadable = [problem.key for problem in problems]
    problems += [
        Problem(sources.get(issue.key, "default"), issue.key, issue.found, issue.expected)
        for issue in check_keys(config)
        # A key that could not be read holds its default now: what that clashes with is not the user's doing.
        if not any(_overlap(key, bad) for key in issue.keys for bad in unreadable)
    ]
    if problems:
        raise ConfigError(str(path), problems)
    return config


def _read_layers(path: Path) -> tuple[list[Layer], list[Problem]]:
    values, problems = _read(path)
    base = values.pop("base", None)
    if base is None:
        return [Layer(str(path), values)], problems
    if not isinstance(base, str):
        problems.append(
            Problem(str(path), "base", describe_value(base), "the name of a TOML file, relative to this one's folder")
        )
        return [Layer(str(path), values)], problems
    base_path = path.parent / base
    base_values, more = _read(base_path)
    if "base" in base_values:
        found = f'base = "{base_values.pop("base")}" in a file that is a base itself'
        more.append(Problem(str(base_path), "base", found, "one level: move those keys into this file"))
    return [Layer(str(base_path), base_values), Layer(str(path), values)], problems + more


def _read(path: Path) -> tuple[dict[str, Any], list[Problem]]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8")), []
    except FileNotFoundError:
        return {}, [Problem(str(path), "", "no such file", "a TOML file")]
    except IsADirectoryError:
        return {}, [Problem(str(path), "", "a folder", "a TOML file")]
    except UnicodeDecodeError as error:
        return {}, [Problem(str(path), "", f"bytes that are not UTF-8 ({error.reason})", "a TOML file in UTF-8")]
    except tomllib.TOMLDecodeError as error:
        return {}, [Problem(str(path), "", f"text that is not TOML: {error}", "a TOML file")]


def _with_mix(layer: Layer, problems: list[Problem]) -> list[Layer]:
    """The layer without `data.mix`, and the tables of the file that it names as a layer of their own."""
    data = layer.values.get("data", {})
    mix = data.pop("mix", "")
    if not mix:
        return [layer]
    if "datasets" in data:
        found = f'"{mix}" beside [[data.datasets]]'
        problems.append(Problem(layer.source, "data.mix", found, "one of the two: the file holds such tables"))
        return [layer]
    raw, more = _read(Path(mix))
    if not more and (list(raw) != ["data"] or not isinstance(raw["data"], dict) or list(raw["data"]) != ["datasets"]):
        more = [Problem(mix, "", "something else than [[data.datasets]]", "these tables only, as `mix` writes them")]
    values: dict[str, Any] = {}
    if not more:
        values, more = check_table(JobConfig, raw, mix)
    problems += [Problem(f"{layer.source}: data.mix: {p.source}", p.key, p.found, p.expected, p.nearest) for p in more]
    return [layer, Layer(mix, values)]


def _merge(
    into: dict[str, Any], values: dict[str, Any], sources: dict[str, str], source: str, prefix: str = ""
) -> None:
    """Tables key by key, everything else replaced; notes in `sources` who set each key last."""
    for name, value in values.items():
        key = f"{prefix}{name}"
        sources[key] = source
        if isinstance(value, dict):
            _merge(into.setdefault(name, {}), value, sources, source, f"{key}.")
        else:
            into[name] = value


def _build(table: Any, values: dict[str, Any], sources: dict[str, str], problems: list[Problem], key: str = "") -> Any:
    """The dataclass from merged values; its defaults, and a problem more, where it refuses them itself."""
    prefix = f"{key}." if key else ""
    arguments = dict(values)
    for name, hint in field_types(table).items():
        if is_dataclass(hint) and name in values:
            arguments[name] = _build(hint, values[name], sources, problems, f"{prefix}{name}")
    try:
        return table(**arguments)
    except (ValueError, AssertionError) as error:  # torchtitan's __post_init__ uses both
        found = ", ".join(f"{name} = {value!r}" for name, value in values.items() if not isinstance(value, dict))
        problems.append(Problem(sources.get(key, "default"), key, found, str(error)))
        return table()


def _overlap(key: str, other: str) -> bool:
    """Whether one of two dotted keys is the other or contains it."""
    short, long = sorted((key, other), key=len)
    return bool(short) and (long == short or long.startswith((f"{short}.", f"{short}[")))

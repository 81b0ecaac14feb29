"""Keys set on the command line: `--section.key value`, `--section.key=value`, `--section.flag`, `--section.no_flag`.

Words become values by the type of the key they are for. Lists are written `a,b,c` or as a TOML array; `none` unsets a
key that may be unset. Hyphens in names count as underscores.
"""

import tomllib
import types
import typing
from collections.abc import Sequence
from typing import Any

from mobilellm_pro.config.config_error import Problem, nearest_name
from mobilellm_pro.config.typed_values import all_keys, describe_type

SOURCE = "command line"


def parse_overrides(table: type, words: Sequence[str]) -> tuple[dict[str, Any], list[Problem]]:
    """Nested raw values, as a TOML file would give them, and problems with the words themselves.

    A later word for the same key wins. Whether the values fit their types is left to `check_table`.
    """
    hints = dict(all_keys(table))
    values: dict[str, Any] = {}
    problems: list[Problem] = []
    remaining = list(words)
    while remaining:
        word = remaining.pop(0)
        if not word.startswith("--"):
            problems.append(Problem(SOURCE, "", f'"{word}"', "--section.key value"))
            continue
        name, given, text = word[2:].partition("=")
        name = name.replace("-", "_")
        if not given and remaining and not remaining[0].startswith("--"):
            text, given = remaining.pop(0), "="
        key, value = _named_value(hints, name, text if given else None)
        if key not in hints:
            problems.append(_unknown(hints, name))
        elif value is None and not given:
            problems.append(Problem(SOURCE, key, "no value", describe_type(hints[key])))
        else:
            _set(values, key, value)
    return values, problems


def _named_value(hints: dict[str, Any], name: str, text: str | None) -> tuple[str, Any]:
    """Key and value of an option; the value is None when the option needs a text and has none."""
    section, _, last = name.rpartition(".")
    negated = f"{section}.{last.removeprefix('no_')}"
    if name not in hints and last.startswith("no_") and hints.get(negated) is bool and text is None:
        return negated, False
    if text is None:
        return name, True if hints.get(name) is bool else None
    return name, raw_value(hints.get(name, str), text)


def raw_value(hint: Any, text: str) -> Any:
    """The value that a word means for a key of type `hint`; the word itself when it cannot mean one."""
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    if types.NoneType in options and text.lower() == "none":
        return None
    readers = (_read_list, _read_bool, _read_number)
    for option in options:
        for reader in readers:
            value = reader(option, text)
            if value is not None:
                return value
    return text


def _read_bool(hint: Any, text: str) -> bool | None:
    return {"true": True, "false": False}.get(text.lower()) if hint is bool else None


def _read_number(hint: Any, text: str) -> int | float | None:
    if hint not in (int, float):
        return None
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            continue
    return None


def _read_list(hint: Any, text: str) -> list[Any] | None:
    if typing.get_origin(hint) is not list:
        return None
    if text.startswith("["):
        try:
            return list(tomllib.loads(f"value = {text}")["value"])
        except tomllib.TOMLDecodeError:
            return None
    element = typing.get_args(hint)[0]
    return [raw_value(element, item.strip()) for item in text.split(",")] if text else []


def _set(values: dict[str, Any], key: str, value: Any) -> None:
    *sections, name = key.split(".")
    for section in sections:
        values = values.setdefault(section, {})
    values[name] = value


def _unknown(hints: dict[str, Any], name: str) -> Problem:
    same_name = [key for key in hints if key.rpartition(".")[2] == name.rpartition(".")[2]]
    nearest = nearest_name(name, hints) or " or ".join(same_name)
    return Problem(SOURCE, name, "an unknown key", "a key of the configuration (`show` prints them)", nearest)

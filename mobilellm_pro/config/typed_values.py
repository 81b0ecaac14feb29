"""Raw values (from TOML or from words of the command line) against the types of a configuration dataclass.

The dataclass is the schema: there is no second list of keys. `check_table` reports every mismatch instead of stopping
at the first, and keeps the values that fit.
"""

import math
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from typing import Any, Literal

from mobilellm_pro.config.config_error import Problem, nearest_name

_TOML_NAMES = {
    bool: "a boolean",
    int: "an integer",
    float: "a number",
    str: "a string",
    dict: "a table",
    list: "an array",
}


@dataclass(frozen=True)
class Mismatch:
    """A value that does not fit its type: where in the value ("" or "[1].weight"), what is there, what should be."""

    place: str
    found: str
    expected: str
    nearest: str = ""


@cache
def field_types(table: type) -> dict[str, Any]:
    """Names and types of a dataclass' fields, in order."""
    hints = typing.get_type_hints(table)
    return {item.name: hints[item.name] for item in fields(table)}


def all_keys(table: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every dotted key below a dataclass with its type, tables inside tables included."""
    for name, hint in field_types(table).items():
        if is_dataclass(hint):
            yield from all_keys(hint, f"{prefix}{name}.")  # type: ignore[arg-type]
        else:
            yield f"{prefix}{name}", hint


def check_table(
    table: type, raw: dict[str, Any], source: str, prefix: str = "", root: type | None = None
) -> tuple[dict[str, Any], list[Problem]]:
    """Values of a TOML table that fit the dataclass `table`, and problems for those that do not.

    Integers are taken for floats. Tables stay dictionaries: the caller merges them before building the dataclass.
    `prefix` and `root` are the dotted name of a table inside a table and the outermost dataclass.
    """
    hints, values, problems = field_types(table), {}, []
    root = root or table
    for name, value in raw.items():
        key = f"{prefix}{name}"
        if name not in hints:
            problems.append(_unknown_key(source, prefix, name, hints, root))
        elif is_dataclass(hints[name]) and isinstance(value, dict):
            values[name], more = check_table(hints[name], value, source, f"{key}.", root)
            problems += more
        else:
            values[name], mismatches = check_value(hints[name], value)
            problems += [Problem(source, f"{key}{m.place}", m.found, m.expected, m.nearest) for m in mismatches]
            if mismatches:
                del values[name]
    return values, problems


def _unknown_key(source: str, prefix: str, name: str, hints: dict[str, Any], root: type) -> Problem:
    section = prefix.rstrip(".")
    same_name_elsewhere = [key for key, _ in all_keys(root) if key.rpartition(".")[2] == name]
    nearest = nearest_name(name, hints) or " or ".join(same_name_elsewhere)
    if section:
        return Problem(source, f"{prefix}{name}", "an unknown key", f"a key of [{section}]", nearest)
    kind = "section" if all(map(is_dataclass, hints.values())) else "key"
    return Problem(source, name, f"an unknown {kind}", f"one of {', '.join(hints)}", nearest)


def check_value(hint: Any, value: Any) -> tuple[Any, list[Mismatch]]:
    """The value as the type `hint` wants it, or the ways in which it does not fit."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return _check_union(hint, value)
    if is_dataclass(hint) and isinstance(value, dict):
        return _check_table_in_array(hint, value)  # type: ignore[arg-type]
    if typing.get_origin(hint) is list and isinstance(value, list):
        return _check_list(typing.get_args(hint)[0], value)
    if hint is float and type(value) in (int, float) and not math.isnan(value):
        return float(value), []
    if _fits_plainly(hint, value):
        return value, []
    nearest = nearest_name(value, typing.get_args(hint)) if _is_choice(hint) and isinstance(value, str) else ""
    return None, [Mismatch("", describe_value(value), describe_type(hint), nearest)]


def _fits_plainly(hint: Any, value: Any) -> bool:
    if hint is Any:
        return True
    # `type(...) is`, because to Python a boolean is an integer too.
    return value in typing.get_args(hint) if _is_choice(hint) else hint is not float and type(value) is hint


def _check_union(hint: Any, value: Any) -> tuple[Any, list[Mismatch]]:
    if value is None and types.NoneType in typing.get_args(hint):
        return None, []
    options = [option for option in typing.get_args(hint) if option is not types.NoneType]
    # The plain type first: 3 stays an integer in `float | int`.
    for option in sorted(options, key=lambda option: type(value) is not option):
        fitting, mismatches = check_value(option, value)
        if not mismatches:
            return fitting, []
    if len(options) == 1:
        return None, mismatches
    return None, [Mismatch("", describe_value(value), describe_type(hint))]


def _check_list(element: Any, value: list[Any]) -> tuple[list[Any], list[Mismatch]]:
    checked = [check_value(element, item) for item in value]
    mismatches = [
        Mismatch(f"[{index}]{m.place}", m.found, m.expected, m.nearest)
        for index, (_, item_mismatches) in enumerate(checked)
        for m in item_mismatches
    ]
    return [item for item, _ in checked], mismatches


def _check_table_in_array(table: type, value: dict[str, Any]) -> tuple[Any, list[Mismatch]]:
    values, problems = check_table(table, value, source="")
    mismatches = [Mismatch(f".{p.key}", p.found, p.expected, p.nearest) for p in problems]
    return (None if mismatches else table(**values)), mismatches


def _is_choice(hint: Any) -> bool:
    return typing.get_origin(hint) is Literal


def describe_value(value: Any) -> str:
    """A value with the name of its TOML type, cut to a line."""
    text = repr(value).replace("'", '"') if isinstance(value, (str, list)) else str(value)
    text = text.lower() if isinstance(value, bool) else text
    text = text if len(text) <= 60 else f"{text[:57]}..."
    return f"{text} ({_TOML_NAMES.get(type(value), type(value).__name__)})"


def describe_type(hint: Any) -> str:
    """A type in words."""
    if _is_choice(hint):
        return "one of " + ", ".join(f'"{choice}"' for choice in typing.get_args(hint))
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        options = [option for option in typing.get_args(hint) if option is not types.NoneType]
        # Every number is a float to TOML's reader, so "a number" says it all.
        options = [option for option in options if not (option is int and float in options)]
        return " or ".join(describe_type(option) for option in options)
    if typing.get_origin(hint) is list:
        element = typing.get_args(hint)[0]
        return "an array of tables" if is_dataclass(element) else f"an array ({describe_type(element)} each)"
    return "a table" if is_dataclass(hint) else _TOML_NAMES.get(hint, str(hint))

"""Arrays of tables that stand in a file of their own kind, as [[variant]] or [[corpus]]: types, and what must be given.

Arrays inside a job are values like others: `typed_values` reads those.
"""

from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

from mobilellm_pro.config.config_error import Problem
from mobilellm_pro.config.typed_values import check_table, describe_value

Table = TypeVar("Table")


def check_tables(
    table: type[Table], raw: Any, source: str, key: str, expected: str
) -> tuple[list[Table], list[Problem]]:
    """The tables of an array with what fits of each, and problems for the rest.

    Args:
        table: dataclass of a table; all its fields have defaults.
        raw: what stands under the key; None: nothing.
        source: the file.
        key: of the array.
        expected: what should stand there, if no tables do.
    """
    if not isinstance(raw, list) or not raw or not all(isinstance(item, dict) for item in raw):
        return [], [Problem(source, key, "nothing" if raw is None else describe_value(raw), expected)]
    tables, problems = [], []
    for index, item in enumerate(raw):
        values, more = check_table(table, item, source, f"{key}[{index}].")
        tables.append(table(**values))
        problems += more
    return tables, problems


def missing_or_repeated(
    tables: Sequence[Any], kind: str, source: str, *, given: Sequence[str], unique: Sequence[str]
) -> Iterator[Problem]:
    """Problems of keys that every table must have, and of values that two of them share.

    Args:
        tables: dataclasses in the order of the file.
        kind: name of the array, and in words of what a table is.
        source: the file.
        given: keys that must not be empty.
        unique: those of them whose values occur once.
    """
    for number, table in enumerate(tables):
        for key in given:
            value = getattr(table, key)
            if not value:
                yield Problem(source, f"{kind}[{number}].{key}", "nothing", f"the {kind}'s {key}")
            elif key in unique and value in [getattr(other, key) for other in tables[:number]]:
                found = f'"{value}" a second time'
                yield Problem(source, f"{kind}[{number}].{key}", found, f"one {key} for one {kind}")

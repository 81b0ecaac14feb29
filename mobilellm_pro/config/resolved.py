"""A configuration written out in full, as TOML that loads to an equal configuration.

Keys that have no effect here are left out, and so are keys that are unset: TOML has no word for None.
"""

import math
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

from mobilellm_pro.config.job_config import JobConfig
from mobilellm_pro.config.no_effect import has_no_effect
from mobilellm_pro.toml_text import quoted


def resolved_toml(config: JobConfig) -> str:
    """Every key in force with its value, as the text of a TOML file."""
    return "\n".join(_table_lines(config, "")).strip() + "\n"


def _table_lines(table: Any, name: str) -> Iterator[str]:
    """Plain keys first, then tables: in TOML a key after a table's header would belong to that table."""
    values = {item.name: getattr(table, item.name) for item in fields(table)}
    values = {key: value for key, value in values.items() if not has_no_effect(f"{name}.{key}".lstrip("."))}
    plain = {key: value for key, value in values.items() if value is not None and not _is_tables(value)}
    if plain:
        yield f"\n[{name}]"
        yield from (f"{key} = {_value_text(value)}" for key, value in plain.items())
    for key, value in values.items():
        path = f"{name}.{key}".lstrip(".")
        if is_dataclass(value):
            yield from _table_lines(value, path)
        elif _is_tables(value):
            for element in value:
                header, *lines = _table_lines(element, path)
                yield from (header.replace("[", "[[").replace("]", "]]"), *lines)


def _is_tables(value: Any) -> bool:
    return is_dataclass(value) or (isinstance(value, list) and bool(value) and is_dataclass(value[0]))


def _value_text(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return quoted(value)
    if isinstance(value, list):
        return f"[{', '.join(map(_value_text, value))}]"
    if isinstance(value, float):
        return repr(value) if math.isfinite(value) else str(value)
    return str(value)

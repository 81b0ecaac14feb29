"""The file that `data.mix` of a job names: `[[data.datasets]]` tables."""

from collections.abc import Iterable

from mobilellm_pro.toml_text import quoted


def datasets_text(tables: Iterable[tuple[str, str, float]]) -> str:
    """The tables of corpora.

    Args:
        tables: name, path and weight of each.
    """
    return "\n".join(dataset_table(name, path, repr(weight)) for name, path, weight in tables)


def dataset_table(name: str, path: str, weight: str) -> str:
    """One table; the weight is a number in TOML, and may be followed by a comment."""
    return f"[[data.datasets]]\nname = {quoted(name)}\npath = {quoted(path)}\nweight = {weight}\n"

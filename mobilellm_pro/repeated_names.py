"""Names that stand for more than one thing, for whoever refuses them."""

from collections.abc import Iterable


def repeated(names: Iterable[str]) -> list[str]:
    """Those that occur more than once, each once, in their order."""
    seen: dict[str, int] = {}
    for name in names:
        seen[name] = seen.get(name, 0) + 1
    return [name for name, count in seen.items() if count > 1]

"""What is wrong with a configuration, said so that the user can mend all of it at once."""

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """One thing wrong with one key."""

    source: str
    """The file, or "command line", that set the key; "default" where nobody did."""

    key: str
    """`section.key`; empty when the file as a whole is meant."""

    found: str
    """What stands there."""

    expected: str
    """What should stand there, or what to do about it."""

    nearest: str = ""
    """The valid name that looks most like the one found, if there is one."""

    def __str__(self) -> str:
        place = f"{self.source}: {self.key}" if self.key else self.source
        guess = f"; did you mean {self.nearest}?" if self.nearest else ""
        return f"{place}: found {self.found}; expected {self.expected}{guess}"


@dataclass(frozen=True)
class Issue:
    """A disagreement between keys of a configuration that could be read; who set them is known to the caller."""

    keys: tuple[str, ...]
    """The keys that disagree; the problem is reported under the first."""

    found: str
    expected: str

    @property
    def key(self) -> str:
        """The key to report."""
        return self.keys[0]


class ConfigError(ValueError):
    """A configuration that cannot be used; `problems` holds every reason, and the text lists them a line each."""

    same_on_every_rank = True
    """All processes of a job read the same file: one of them says so."""

    def __init__(self, path: str, problems: Sequence[Problem]) -> None:
        self.path = path
        self.problems = list(problems)
        count = f"{len(self.problems)} problem{'s' if len(self.problems) != 1 else ''}"
        super().__init__("\n  ".join([f"{count} in the configuration {path}:", *map(str, self.problems)]))


class JobError(ValueError):
    """A configuration that loads but cannot run: its data, teacher, checkpoint or mesh do not fit."""

    same_on_every_rank = True

    def __init__(self, path: str, problems: Sequence[str]) -> None:
        count = f"{len(problems)} problem{'s' if len(problems) != 1 else ''}"
        super().__init__("\n  ".join([f"{count} in the job {path}:", *problems]))


def nearest_name(name: str, names: Iterable[str]) -> str:
    """The name among `names` that looks most like `name`; empty when none looks like it."""
    return next(iter(difflib.get_close_matches(name, list(names), n=1)), "")

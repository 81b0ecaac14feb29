"""What has been done of a pipeline: a record for each phase, in ledger/ of its output.

ledger/NAME.json   state, settings, wall time, product and metrics of the phase
ledger/NAME.lock   held (flock) by whoever runs the phase and inherited by the process that does the work, so that it is
                   free again when the last of them is gone, however they ended

A record has a file of its own because phases may run side by side, on several nodes of a cluster.
"""

import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from mobilellm_pro.atomic_file import write_atomically
from mobilellm_pro.file_lock import try_lock

FOLDER = "ledger"
LOCK_SECONDS = 60.0
"""How long a start waits for a phase that is held: what a kill has left may take a moment to die."""

State = Literal["running", "stopped", "failed", "done"]


@dataclass
class Record:
    """What is known of a phase that has been started."""

    name: str
    kind: str
    state: State = "running"
    """`running` with a free lock means that it was killed."""

    settings: dict[str, Any] = field(default_factory=dict)
    """Flat key -> value of everything that decides what the phase makes, but for keys at their default."""

    inputs: dict[str, str] = field(default_factory=dict)
    """Phase -> its identity when this one began."""

    product: str | None = None
    """What `phase:NAME` stands for."""

    metrics: dict[str, Any] = field(default_factory=dict)
    wall_seconds: float = 0.0
    """Of all starts together."""

    starts: int = 0
    begun: str = ""
    """Of the first start, in UTC."""

    ended: str = ""
    command: list[str] = field(default_factory=list)
    log: str = ""
    error: str = ""
    environment: dict[str, Any] = field(default_factory=dict)
    """Versions, commit and hardware of the last start."""

    @property
    def identity(self) -> str:
        """Sixteen hex digits of what decides the product: its settings and its inputs' identities."""
        text = json.dumps([self.kind, self.settings, self.inputs], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


class Ledger:
    """The records of a pipeline's output folder."""

    def __init__(self, output: Path) -> None:
        self.folder = output / FOLDER

    def read(self, name: str) -> Record | None:
        """The record of a phase; None where it was never started.

        Raises:
            ValueError: the file is no record.
        """
        path = self.folder / f"{name}.json"
        if not path.is_file():
            return None
        known = {item.name for item in fields(Record)}
        try:
            values = json.loads(path.read_text())
            return Record(**{key: value for key, value in values.items() if key in known})
        except (json.JSONDecodeError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: no record of a phase ({error}); remove it, and the phase runs again") from None

    def write(self, record: Record) -> None:
        """Replaces the record of a phase."""
        self.folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps({**asdict(record), "identity": record.identity}, indent=2) + "\n"
        write_atomically(self.folder / f"{record.name}.json", text)

    @contextmanager
    def lock(self, name: str) -> Iterator[int]:
        """Holds a phase; the file descriptor is for the process that does the work.

        Raises:
            ValueError: another process holds it, still after a minute.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{name}.lock"
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            deadline = time.monotonic() + LOCK_SECONDS
            while not try_lock(descriptor, path):
                if time.monotonic() > deadline:
                    raise ValueError(f"{path}: another process runs this phase; wait for it, or stop it")
                time.sleep(0.2)
            yield descriptor
        finally:
            os.close(descriptor)

    def is_held(self, name: str) -> bool:
        """Whether somebody runs the phase now."""
        path = self.folder / f"{name}.lock"
        if not path.is_file():
            return False
        descriptor = os.open(path, os.O_RDWR)
        try:
            return not try_lock(descriptor, path)
        finally:
            os.close(descriptor)


def changed_keys(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Keys whose values differ, each with both values; a key that one of the two lacks is at its default there."""

    def text(values: Mapping[str, Any], key: str) -> str:
        found = json.dumps(values[key]) if key in values else "the default"
        return found if len(found) <= 80 else f"{found[:77]}..."

    return [f"{key} ({text(before, key)} then, {text(now, key)} now)" for key in sorted({**before, **now})
            if (key in before, before.get(key)) != (key in now, now.get(key))]  # fmt: skip

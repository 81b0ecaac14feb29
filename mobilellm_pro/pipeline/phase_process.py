"""A phase while it runs: its process, its lock, its log and its record in the ledger."""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from datetime import UTC, datetime
from itertools import count
from pathlib import Path
from typing import IO

from mobilellm_pro.pipeline.ledger import Ledger, Record
from mobilellm_pro.pipeline.phase_kinds import KINDS, Products, corpora_folder
from mobilellm_pro.pipeline.phases import Phase
from mobilellm_pro.pipeline.run_command import CommandFailed, log_end, start
from mobilellm_pro.training.run_folder import describe_environment
from mobilellm_pro.training.stop_request import STOP

LOGS = "logs"
REPLACED = "replaced"


class PhaseProcess:
    """Runs the command of a phase: begun with the object, over when `finish` has returned.

    Attributes:
        phase: what is run.
        record: its record; "running" until `finish`.
    """

    def __init__(self, phase: Phase, products: Products, ledger: Ledger, logs: Path, *, quiet: bool = False) -> None:
        """Starts it.

        Args:
            phase: what is run; all that it needs is done.
            products: of these phases.
            ledger: where it is recorded.
            logs: folder of the log, to which a later start adds.
            quiet: whether what it prints goes to the log only.

        Raises:
            ValueError: another process runs it, or its command could not be started.
        """
        self.phase, self._ledger = phase, ledger
        kind = KINDS[phase.kind]
        self.log = logs / f"{phase.name}.log"
        logs.mkdir(parents=True, exist_ok=True)
        self._held = ExitStack()
        with self._held:
            lock = self._held.enter_context(ledger.lock(phase.name))
            (phase.folder / STOP).unlink(missing_ok=True)
            command = kind.command(phase, products)
            self.record = self._begin(command, kind.settings(phase, products))
            environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
            environment |= {} if phase.nproc is None else {"NPROC": str(phase.nproc)}
            with self.log.open("ab") as log:
                log.write(f"$ {shlex.join(command)}\n".encode())
            self._process = start(command, stdout=subprocess.PIPE, env=environment, pass_fds=[lock], own_session=True)
            self._held = self._held.pop_all()
        self._begun = time.monotonic()
        self._copier = threading.Thread(target=self._copy_output, args=(quiet,), daemon=True)
        self._copier.start()

    def _begin(self, command: list[str], settings: dict[str, object]) -> Record:
        now = datetime.now(UTC).isoformat(timespec="seconds")
        before = self._ledger.read(self.phase.name)
        inputs = {name: found.identity for name in self.phase.needs if (found := self._ledger.read(name))}
        record = Record(self.phase.name, self.phase.kind, settings=settings, inputs=inputs, command=command)
        record.log, record.begun, record.starts = str(self.log), now, 1
        if before is not None and before.identity == record.identity:  # else what it made so far is another thing
            record.begun, record.starts, record.wall_seconds = before.begun, before.starts + 1, before.wall_seconds
        record.environment = describe_environment(1)
        self._ledger.write(record)
        return record

    def _copy_output(self, quiet: bool) -> None:
        """Whatever becomes of log and terminal, the pipe is read: a full one would let the phase wait for ever."""
        assert self._process.stdout is not None
        with self.log.open("ab") as log:
            sinks: list[IO[bytes]] = [log] if quiet else [log, sys.stdout.buffer]
            while chunk := os.read(self._process.stdout.fileno(), 1 << 16):
                for sink in list(sinks):
                    try:
                        sink.write(chunk)
                        sink.flush()
                    except OSError as error:  # a full disk, a terminal that is gone
                        sinks.remove(sink)
                        print(f"{self.phase.name}: its output is not copied any more: {error}", file=sys.stderr)

    def is_over(self) -> bool:
        """Whether the process has ended, and with it all that write where it wrote."""
        return self._process.poll() is not None and not self._copier.is_alive()

    def request_stop(self, *, again: bool = False) -> None:
        """Lets a training save a checkpoint and end; everything else is resumed anyway and ends at once.

        Args:
            again: it was asked before: a training that was just starting has taken the file for an old one.
        """
        if self.phase.kind == "train" and self.phase.folder.is_dir():
            (self.phase.folder / STOP).touch()
        elif not again:
            self.kill(signal.SIGTERM)

    def kill(self, number: signal.Signals) -> None:
        """Sends a signal to the process and its children, but for those with a session of their own."""
        try:
            os.killpg(self._process.pid, number)
        except ProcessLookupError:
            pass  # all have ended

    def finish(self, *, stopping: bool = False) -> Record:
        """Waits for the end and records it.

        Args:
            stopping: whether an end before the phase is done was asked for.

        Raises:
            CommandFailed: it ended with an error, or without what it should have made.
        """
        status = self._process.wait()
        self._copier.join()
        (self.phase.folder / STOP).unlink(missing_ok=True)
        record, kind = self.record, KINDS[self.phase.kind]
        product = kind.product(self.phase) if status == 0 else None
        record.wall_seconds = round(record.wall_seconds + time.monotonic() - self._begun, 1)
        record.ended = datetime.now(UTC).isoformat(timespec="seconds")
        if product is not None:
            record.state, record.product, record.metrics = "done", str(product), kind.metrics(self.phase)
        elif stopping or (self.phase.kind == "train" and status == 0):
            record.state = "stopped"  # a training that ends well before it is done was asked to, by whomever
        else:
            made = f"ended with status {status}" if status else "ended without what it should have made"
            record.state, record.error = "failed", f'phase "{self.phase.name}": {made}; {log_end(self.log)}'
        self._ledger.write(record)
        self._held.close()
        if record.state == "failed":
            raise CommandFailed(record.error)
        return record


def set_aside(phase: Phase, ledger: Ledger, replaced: Path) -> Path | None:
    """Moves what a phase has made out of the way and forgets its record; nothing is deleted.

    Corpora stay beside where they were, as NAME.replaced.1.

    Args:
        phase: that is to run again.
        ledger: with its record.
        replaced: folder to move to.

    Returns:
        where it is now; None where nothing was there.
    """
    with ledger.lock(phase.name):
        record = ledger.folder / f"{phase.name}.json"
        if not phase.folder.exists() and not record.exists():
            return None
        target = _unused(replaced / phase.name)
        target.mkdir(parents=True)
        # The record first: without it the phase counts as not begun, and a folder without record is gone on with.
        for path, name in ((record, "record.json"), (phase.folder, phase.name)):
            if path.exists():
                shutil.move(path, target / name)
        corpora = corpora_folder(phase)
        if corpora is not None and corpora.exists():  # perhaps on a disk of their own: they stay there
            corpora.rename(_unused(corpora.with_name(f"{corpora.name}.{REPLACED}")))
        return target


def _unused(path: Path) -> Path:
    """The path with the first number that is free."""
    return next(found for number in count(1) if not (found := path.with_name(f"{path.name}.{number}")).exists())

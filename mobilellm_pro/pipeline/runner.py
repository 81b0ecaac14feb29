"""The `run` verb: a whole pipeline by one command, and the same command again after any failure.

    mobilellm-pro run train_configs/debug/pipeline.toml
    mobilellm-pro status train_configs/debug/pipeline.toml

Every phase is a process of its own; the runner holds no state but the ledger's. Killed at any moment, it takes the
phase with it, and the next start goes on from the phase's last checkpoint.
"""

import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType

from mobilellm_pro.config import ConfigError, JobError
from mobilellm_pro.pipeline.ledger import Ledger, Record, changed_keys
from mobilellm_pro.pipeline.phase_kinds import KINDS
from mobilellm_pro.pipeline.phase_process import LOGS, REPLACED, PhaseProcess, set_aside
from mobilellm_pro.pipeline.phases import Phase, Pipeline, load_pipeline
from mobilellm_pro.pipeline.pipeline_status import Progress, progress_table
from mobilellm_pro.pipeline.run_command import CommandFailed

STOPPED_STATUS = 75
"""Exit status of a run that was asked to stop and can be started again (EX_TEMPFAIL of sysexits.h)."""

_POLL_SECONDS = 0.1
_SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)


def run(
    pipeline: str,
    *,
    output: str | None = None,
    only: list[str] | None = None,
    from_: str | None = None,
    parallel: int = 1,
    dry_run: bool = False,
    hardware: str | None = None,
    overrides: Sequence[str] = (),
) -> None:
    """Run the phases of a pipeline.toml that are not done yet, in their order, each as a process of its own.

    Started again, it goes on where it was; what is done is not done again. SIGUSR1, SIGTERM or Ctrl-C let the phase
    save a checkpoint and end, and the exit status is 75; a second one kills it. What a phase prints is shown and kept
    in logs/ of the output. Words --section.key value override keys of all trainings. $TRAIN_COMMAND starts trainings
    (default: bash launch/train.sh, which takes NPROC and its other variables).

    Args:
        pipeline: TOML file with the phases.
        output: folder for everything; default: the file's.
        only: these phases; those that they need must be done.
        from_: do this phase again and all that need it; what they have made is moved to replaced/, corpora to a
            folder beside theirs.
        parallel: phases that may run side by side, as specialists.
        dry_run: print the phases with their commands, tokens and estimated times, and start nothing.
        hardware: h100 or h200, for the estimates of trainings that have not run; default: as fast as those that have.
        overrides: of all trainings.

    Raises:
        ConfigError: everything that is wrong with the file.
        JobError: everything that is wrong with its phases, before any is started; a finished one whose settings have
            changed since, with the keys.
        CommandFailed: a phase ended with an error.
        SystemExit: with status 75, stopped by a signal.
    """
    if parallel < 1:
        raise ValueError(f"--parallel {parallel}: expected at least 1")
    loaded = load_pipeline(pipeline, output, overrides)
    chosen, ledger = loaded.choose(only, "--only"), Ledger(loaded.output)
    again = [] if from_ is None else [loaded.choose([from_], "--from")[0].name, *loaded.dependents(from_)]
    progress = Progress.read(loaded, ledger, forget=again)
    to_run = [phase for phase in chosen if phase.name not in progress.done]
    # What is done again is checked as if it had no folder yet: the old one is still there, and must not matter.
    _check(loaded, progress, [_afresh(phase) if phase.name in again else phase for phase in to_run])
    print(progress_table(loaded, progress, chosen, hardware=hardware, commands=dry_run))
    if dry_run:
        return
    for name in again:
        moved = set_aside(loaded[name], ledger, loaded.output / REPLACED)
        if moved is not None:
            print(f"{name}: moved to {moved}")
    _Run(loaded, progress, ledger, to_run, parallel).run()


def _afresh(phase: Phase) -> Phase:
    return replace(phase, folder=phase.folder.with_name(f"{phase.name}.new"))


def _check(pipeline: Pipeline, progress: Progress, to_run: list[Phase]) -> None:
    """All that can be known to be wrong beforehand, of all phases."""
    found = [problem for phase in to_run for problem in _phase_problems(phase, progress)]
    names = {phase.name for phase in to_run} | progress.done.keys()
    for phase in to_run:
        missing = [name for name in phase.needs if name not in names]
        if missing:
            said = f"{', '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not done"
            found.append(f"{phase.name}: needs {said}; run without --only, or name what it needs too")
    for name, record in progress.records.items():
        if record.state == "done" or (record.kind == "train" and (pipeline[name].folder / "checkpoint").exists()):
            found += _changes(pipeline[name], progress, record)
    if found:
        raise JobError(str(pipeline.path), list(dict.fromkeys(found)))


def _phase_problems(phase: Phase, progress: Progress) -> Iterator[str]:
    try:
        for problem in KINDS[phase.kind].problems(phase, progress.products):
            yield f"{phase.name}: {problem}"
    except ConfigError as error:
        yield from (f"{phase.name}: {problem}" for problem in error.problems)
    except (ValueError, OSError) as error:
        yield f"{phase.name}: {error}"


def _changes(phase: Phase, progress: Progress, record: Record) -> Iterator[str]:
    """What of a phase that is done, or of a training that is begun, is not as it is configured now."""
    cure = f"set it back, choose another --output, or say --from {phase.name} to do it and what needs it again"
    if record.state == "done" and KINDS[phase.kind].product(phase) is None:
        yield f"{phase.name}: done, but what it made is gone from {phase.folder}; {cure}"
    if any(name not in progress.done for name in phase.needs):
        return  # compared when these are done again
    try:
        keys = changed_keys(record.settings, KINDS[phase.kind].settings(phase, progress.products))
    except ValueError as error:
        yield f"{phase.name}: {error}"
        return
    inputs = {name: progress.done[name].identity for name in phase.needs}
    keys += [f"{name} (another one now)" for name in inputs if record.inputs.get(name) != inputs[name]]
    if keys:
        state = "done" if record.state == "done" else "begun"
        yield f"{phase.name}: {state} with other settings: {', '.join(keys)}; {cure}"


class _Run:
    """Phases that are run, some of them side by side."""

    def __init__(
        self, pipeline: Pipeline, progress: Progress, ledger: Ledger, waiting: list[Phase], parallel: int
    ) -> None:
        self._pipeline, self._ledger, self._parallel = pipeline, ledger, parallel
        self._products = dict(progress.products)
        self._waiting = list(waiting)
        self._running: list[PhaseProcess] = []
        self._errors: list[str] = []
        self._stopped = False
        self._signals = self._acted_on = 0

    def run(self) -> None:
        with _handled(self._on_signal):
            while (self._waiting and not self._stopping) or self._running:
                self._start_ready()
                self._act_on_signals()
                for process in [process for process in self._running if process.is_over()]:
                    self._running.remove(process)
                    self._finish(process)
                time.sleep(_POLL_SECONDS)
        if self._errors:
            raise CommandFailed("\n".join(self._errors))
        if self._waiting:
            print("stopped as asked; the same command without --from goes on", flush=True)
            sys.exit(STOPPED_STATUS)
        print(f"{self._pipeline.output}: done", flush=True)

    @property
    def _stopping(self) -> bool:
        return bool(self._signals or self._errors or self._stopped)

    def _start_ready(self) -> None:
        for phase in list(self._waiting):
            if self._stopping or len(self._running) >= self._parallel:
                return
            if all(name in self._products for name in phase.needs):
                self._waiting.remove(phase)
                print(f"\n== {phase.name}: {phase.kind}", flush=True)
                logs = self._pipeline.output / LOGS
                try:
                    process = PhaseProcess(phase, self._products, self._ledger, logs, quiet=self._parallel > 1)
                except ValueError as error:
                    self._errors.append(f"{phase.name}: {error}")  # phases beside it may end
                else:
                    self._running.append(process)

    def _finish(self, process: PhaseProcess) -> None:
        try:
            record = process.finish(stopping=self._signals > 0)
        except CommandFailed as error:
            self._errors.append(str(error))  # phases beside it may end
            return
        print(f"== {record.name}: {record.state} after {record.wall_seconds:.0f} s", flush=True)
        if record.state == "done":
            assert record.product is not None
            self._products[record.name] = Path(record.product)
        else:
            self._waiting.insert(0, process.phase)
            self._stopped = True

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._signals += 1

    def _act_on_signals(self) -> None:
        """Not in the handler, which may come while a phase is being started and is not among the running ones."""
        for process in self._running:
            if self._signals == 1:
                process.request_stop(again=self._acted_on == 1)
            elif self._signals > self._acted_on:
                process.kill(signal.SIGKILL)
        self._acted_on = self._signals


@contextmanager
def _handled(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    before = {number: signal.signal(number, handler) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)

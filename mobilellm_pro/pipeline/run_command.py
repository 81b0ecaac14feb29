"""Trainings and tests as commands of the user's: which program starts them, and where what they print goes.

$TRAIN_COMMAND starts a training and gets the job's file and its overrides as words (default: bash launch/train.sh);
$EVALUATE_COMMAND is what stands before `evaluate ...`, `needle ...` and `held-out ...`, as `torchrun -m mobilellm_pro`.

A command must not outlive who started it: a second start would meet it in the same folder. So on Linux it is told to
end (SIGTERM, which torchrun passes on to its ranks) as soon as this process is gone, even by SIGKILL.
"""

import os
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import torch

from mobilellm_pro.parent_death import parent_death_signal

TRAIN, EVALUATE = "TRAIN_COMMAND", "EVALUATE_COMMAND"


class CommandFailed(ValueError):
    """A command ended with an error; the text names its log."""


def num_processes(per_node: int | None = None) -> int | None:
    """Of a training by `launch/train.sh`, given $NPROC; None where the user's own command decides."""
    if TRAIN in os.environ:
        return None
    per_node = per_node or int(os.environ.get("NPROC") or max(1, torch.cuda.device_count()))
    nodes = os.environ.get("NNODES") or os.environ.get("SLURM_JOB_NUM_NODES") or 1  # as launch/train.sh chooses
    return per_node * int(nodes)


def train_command(job: Path, words: Sequence[str]) -> list[str]:
    """The words of a command that trains `job` with the overrides `words`."""
    return [*shlex.split(os.environ.get(TRAIN) or "bash launch/train.sh"), str(job), *words]


def evaluation_program() -> list[str]:
    """The words that stand before the verb of a test."""
    return shlex.split(os.environ.get(EVALUATE) or "mobilellm-pro")


def evaluate_command(verb: str, checkpoint: Path, words: Sequence[str], options: Mapping[str, Any]) -> list[str]:
    """The words of a command that tests a checkpoint.

    Args:
        verb: "needle" or "held-out".
        checkpoint: what is tested.
        words: that follow it.
        options: of the verb; True is a switch, a list several words.
    """
    command = [*evaluation_program(), verb, str(checkpoint), *words]
    for name, value in options.items():
        values = [] if value is True else value if isinstance(value, list) else [value]
        command += [f"--{name.replace('_', '-')}", *map(str, values)]
    return command


def start(
    command: Sequence[str],
    *,
    stdout: int | IO[Any] | None,
    env: Mapping[str, str] | None = None,
    pass_fds: Sequence[int] = (),
    own_session: bool = False,
) -> subprocess.Popen[bytes]:
    """Starts a command and does not wait for it; on Linux it gets SIGTERM when the thread that called this has ended.

    That is a thread's end and not only the process': call this from one that lives until the command has ended.

    Args:
        command: its words.
        stdout: where all that it prints goes, errors too; None: where this process prints.
        env: its whole environment; None: this process'.
        pass_fds: open files of this process that it keeps.
        own_session: whether a terminal's Ctrl-C shall not reach it.

    Raises:
        CommandFailed: no such program, or none that may be executed.
    """
    try:
        return subprocess.Popen(
            command,
            stdout=stdout,
            stderr=subprocess.STDOUT,
            env=env,
            pass_fds=pass_fds,
            start_new_session=own_session,
            preexec_fn=_ends_with_starter(),
        )
    except (FileNotFoundError, PermissionError) as error:
        problem = "no such program" if isinstance(error, FileNotFoundError) else "may not be executed"
        raise CommandFailed(f"{command[0]}: {problem}; correct {TRAIN} or {EVALUATE}") from None


def _ends_with_starter() -> Callable[[], None] | None:
    """What the child does between fork and exec; all that it needs is made ready before the fork."""
    ask_for_signal, starter = parent_death_signal(signal.SIGTERM), os.getpid()
    if ask_for_signal is None:
        return None

    def prepare() -> None:
        ask_for_signal()
        if os.getppid() != starter:
            os._exit(1)  # the starter is gone already: nobody would send the signal

    return prepare


def run_logged(what: str, name: str, kind: str, command: Sequence[str], log: Path) -> None:
    """Runs a command to its end; what it prints is added to a log.

    Args:
        what, name: whose command it is, for messages: "variant", "plain".
        kind: what it does: "train".
        command: its words.
        log: its file.

    Raises:
        CommandFailed: no such program, or a status other than 0.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    print(f"\n{name}: {kind}, log {log}", flush=True)
    begin = time.monotonic()
    with log.open("a") as stream:
        stream.write(f"$ {shlex.join(command)}\n")
        stream.flush()
        status = _wait(start(command, stdout=stream))
    if status:
        raise CommandFailed(f'{what} "{name}": {kind} ended with status {status}; {log_end(log)}')
    print(f"{name}: {kind} took {time.monotonic() - begin:.0f} s", flush=True)


def _wait(process: subprocess.Popen[bytes]) -> int:
    """Its status; an interrupted wait, as by Ctrl-C, ends the command first: it may have files half written."""
    try:
        return process.wait()
    except BaseException:
        process.terminate()
        process.wait()
        raise


def log_end(log: Path) -> str:
    """Where the log is and how it ends, for the message of an error."""
    last = "\n".join(f"  {line}" for line in log.read_text(errors="replace").splitlines()[-5:])
    return f"its log is {log}, which ends\n{last}\nmend the cause and start again: what is done stays done"

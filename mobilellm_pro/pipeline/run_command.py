"""Trainings and tests as commands of the user's: which program starts them, and where what they print goes.

$TRAIN_COMMAND starts a training and gets the job's file and its overrides as words (default: bash launch/train.sh);
$EVALUATE_COMMAND is what stands before `needle ...` and `held-out ...`, as `torchrun -m mobilellm_pro`.
"""

import os
import shlex
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

TRAIN, EVALUATE = "TRAIN_COMMAND", "EVALUATE_COMMAND"


class CommandFailed(ValueError):
    """A command ended with an error; the text names its log."""


def num_processes() -> int | None:
    """Of a training by `launch/train.sh`; None where the user's own command decides."""
    if TRAIN in os.environ:
        return None
    per_node = int(os.environ.get("NPROC") or max(1, torch.cuda.device_count()))
    return per_node * int(os.environ.get("NNODES") or 1)


def train_command(job: Path, words: Sequence[str]) -> list[str]:
    """The words of a command that trains `job` with the overrides `words`."""
    return [*shlex.split(os.environ.get(TRAIN) or "bash launch/train.sh"), str(job), *words]


def evaluate_command(verb: str, checkpoint: Path, words: Sequence[str], options: Mapping[str, Any]) -> list[str]:
    """The words of a command that tests a checkpoint.

    Args:
        verb: "needle" or "held-out".
        checkpoint: what is tested.
        words: that follow it.
        options: of the verb; True is a switch, a list several words.
    """
    prefix = shlex.split(os.environ.get(EVALUATE) or "mobilellm-pro")
    command = [*prefix, verb, str(checkpoint), *words]
    for name, value in options.items():
        values = [] if value is True else value if isinstance(value, list) else [value]
        command += [f"--{name.replace('_', '-')}", *map(str, values)]
    return command


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
    start = time.monotonic()
    with log.open("a") as stream:
        stream.write(f"$ {shlex.join(command)}\n")
        stream.flush()
        try:
            status = subprocess.run(command, stdout=stream, stderr=subprocess.STDOUT).returncode
        except FileNotFoundError:
            raise CommandFailed(f"{command[0]}: no such program; correct {TRAIN} or {EVALUATE}") from None
    if status:
        raise CommandFailed(f'{what} "{name}": {kind} ended with status {status}; {log_end(log)}')
    print(f"{name}: {kind} took {time.monotonic() - start:.0f} s", flush=True)


def log_end(log: Path) -> str:
    """Where the log is and how it ends, for the message of an error."""
    last = "\n".join(f"  {line}" for line in log.read_text(errors="replace").splitlines()[-5:])
    return f"its log is {log}, which ends\n{last}\nmend the cause and start again: what is done stays done"

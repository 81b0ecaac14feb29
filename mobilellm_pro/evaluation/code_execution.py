"""Runs one Python program that a model wrote, within limits, and says whether it came to its end.

It is a limit, not a jail. What holds everywhere: a time limit after which the whole process group is killed, limits of
memory, CPU time, file size and number of processes for each process, an empty environment, an empty working directory,
no standard input. Where Linux gives namespaces (to root, or to users where unprivileged user namespaces are on), also:
no network, and no process outlives the program, whatever it starts; without them, one that leaves its process group
does. Not contained are files: the program reads what its user may read and writes where its user may write, so run
evaluations as a user with nothing to lose. Started by root it runs as nobody (uid 65534), with root's right to read,
where there is such a user. Memory and file size are limits of one process or file, not of their sum.

The file runs itself as a script, with the standard library alone, to set the limits in a fresh process: after a fork of
a process that uses torch, hardly anything is safe.
"""

import ctypes
import functools
import math
import os
import resource
import secrets
import select
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

MEBIBYTE = 2**20
FILE_BYTES = 16 * MEBIBYTE
MORE_PROCESSES = 64
NOBODY = 65534

_CLONE_NEWUSER, _CLONE_NEWIPC, _CLONE_NEWPID, _CLONE_NEWNET = 0x10000000, 0x08000000, 0x20000000, 0x40000000
_PR_SET_PDEATHSIG, _PR_SET_KEEPCAPS, _PR_SET_NO_NEW_PRIVS, _PR_CAP_AMBIENT, _PR_CAP_AMBIENT_RAISE = 1, 8, 38, 47, 2
_CAP_DAC_READ_SEARCH, _CAPABILITY_VERSION_3 = 2, 0x20080522


class Outcome(NamedTuple):
    """Whether the program ended well, and why not."""

    passed: bool
    reason: str
    """ "passed", the last line of its standard error, or what stopped it."""


def run_program(source: str, *, seconds: float = 5.0, memory_bytes: int = 512 * MEBIBYTE) -> Outcome:
    """Runs a program with this Python, its standard library and no other packages.

    It passes when it exits with 0 after its last line: a random token is written there, so leaving early, as with
    `sys.exit(0)` or `os._exit(0)`, does not pass. Hashes of strings have a fixed seed, so that the order of sets does
    not change between runs. Its output is discarded.

    Args:
        source: the program.
        seconds: wall time, its start included (about 0.1 seconds).
        memory_bytes: of the address space of each of its processes.

    Raises:
        RuntimeError: not even an empty program runs here, so that no result would mean anything.
    """
    _check_once()
    return _run(source, seconds, memory_bytes)


@functools.cache
def _check_once() -> None:
    outcome = _run("import math, json, re\n", 60.0, 512 * MEBIBYTE)
    if not outcome.passed:
        raise RuntimeError(
            f"programs cannot be run here: {outcome.reason}; {sys.executable} and its standard library must be readable"
            f" by uid {NOBODY if _can_become_nobody() else os.getuid()}, and {tempfile.gettempdir()} writable"
        )


def _run(source: str, seconds: float, memory_bytes: int) -> Outcome:
    folder = Path(tempfile.mkdtemp(prefix="program-"))
    try:
        return _run_in(folder, source, seconds, memory_bytes)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _run_in(folder: Path, source: str, seconds: float, memory_bytes: int) -> Outcome:
    work, program, token = folder / "work", folder / "program.py", secrets.token_hex(16)
    work.mkdir()
    folder.chmod(0o755)
    if _can_become_nobody():
        os.chown(work, NOBODY, NOBODY)
    reader, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        # Surrogates, which no file can hold, become question marks: a syntax error or other text, as they should be.
        last_line = f"\n__import__('os').write({writer}, b'{token}')\n"
        program.write_bytes((source + last_line).encode("utf-8", errors="replace"))
        limits = [str(memory_bytes), str(math.ceil(seconds) + 1), str(program)]
        command = [sys.executable, "-P", "-s", "-S", __file__, *limits]
        with (folder / "stderr").open("w+b") as stderr:
            status = _wait_and_kill(command, seconds, cwd=work, stderr=stderr.fileno(), kept_open=writer)
            last_words = _last_line(stderr.fileno())
        written = _read(reader)
    finally:
        os.close(reader)
        os.close(writer)
    return _outcome(status, written == token, last_words, seconds)


def _outcome(status: int | None, ended: bool, last_words: str, seconds: float) -> Outcome:
    """From the exit status (None: killed at the time limit) and whether the last line was reached."""
    if status is None:
        return Outcome(False, f"stopped at the time limit of {seconds:g} seconds")
    if status == 0 and ended:
        return Outcome(True, "passed")
    if status == 0:
        return Outcome(False, "it exited before its last line")
    by_signal = f"killed by signal {status - 128}" if status > 128 else f"exit status {status}"
    return Outcome(False, last_words or by_signal)


def _wait_and_kill(command: Sequence[str], seconds: float, *, cwd: Path, stderr: int, kept_open: int) -> int | None:
    """Exit status (128 + n for signal n), None at the time limit; in both cases nothing of its group is left."""
    process = subprocess.Popen(
        command,
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=stderr,
        env={"PATH": "/usr/local/bin:/usr/bin:/bin", "PYTHONHASHSEED": "0"},
        pass_fds=(kept_open,),
        start_new_session=True,
    )
    # The group is killed before its leader is reaped: until then nobody else can have got its number.
    handle, ending = os.pidfd_open(process.pid), select.poll()
    ending.register(handle, select.POLLIN)
    try:
        ended = bool(ending.poll(seconds * 1000))
    finally:
        os.close(handle)
        os.killpg(process.pid, signal.SIGKILL)
        status = process.wait()
    if not ended:
        return None
    return status if status >= 0 else 128 - status


def _last_line(file: int) -> str:
    """The last line with any text among the last 4 KiB."""
    start = max(0, os.fstat(file).st_size - 4096)
    lines = os.pread(file, 4096, start).decode("utf-8", errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def _read(pipe: int) -> str:
    try:
        return os.read(pipe, 4096).decode("ascii", errors="replace")
    except BlockingIOError:  # nothing was written
        return ""


# From here on: what happens in the new process.


def _main(memory_bytes: int, cpu_seconds: int, program: str) -> None:
    """Leaves the network and other processes behind if it can, sets the limits and becomes the program."""
    call = ctypes.CDLL(None, use_errno=True)
    was_root = os.getuid() == 0
    isolated = call.unshare(_CLONE_NEWIPC | _CLONE_NEWPID | _CLONE_NEWNET) == 0
    if _can_become_nobody():
        _become_nobody(call)
    processes = _num_threads(os.getuid()) + MORE_PROCESSES  # counted here: in a namespace of users all look the same
    if not isolated and not was_root:
        isolated = call.unshare(_CLONE_NEWUSER | _CLONE_NEWIPC | _CLONE_NEWPID | _CLONE_NEWNET) == 0
    if isolated:
        _go_on_in_child(call.prctl)  # the first process of the namespace: with it end all others
    _go_on_in_child(call.prctl)
    call.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    for limit, value in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NPROC, processes),
        (resource.RLIMIT_FSIZE, FILE_BYTES),
        (resource.RLIMIT_CPU, cpu_seconds),
        (resource.RLIMIT_AS, memory_bytes),
    ):
        hard = resource.getrlimit(limit)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(limit, (value, value))
    os.execv(sys.executable, [sys.executable, "-P", "-s", "-S", program])


def _go_on_in_child(prctl: Callable[..., int]) -> None:
    """Forks; the parent waits and takes over the exit status, the child returns and dies with its parent."""
    child = os.fork()
    if child:
        while True:
            pid, status = os.wait()  # as the first process of a namespace it also gets orphans
            if pid == child:
                code = os.waitstatus_to_exitcode(status)
                os._exit(code if code >= 0 else 128 - code)
    prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def _can_become_nobody() -> bool:
    """Whether this is root where that uid exists: as root of a container there may be no other user at all."""
    return os.getuid() == 0 and all(
        any(int(first) <= NOBODY < int(first) + int(count) for first, _, count in map(str.split, ranges.splitlines()))
        for ranges in (Path(f"/proc/self/{kind}_map").read_text() for kind in ("uid", "gid"))
    )


def _become_nobody(call: ctypes.CDLL) -> None:
    """From root to nobody, who is bound by the limit of processes and owns no files.

    Python itself may lie where only root reads, so the right to read goes along where root has it.
    """
    keeps = _has_capability(_CAP_DAC_READ_SEARCH)
    call.prctl(_PR_SET_KEEPCAPS, 1, 0, 0, 0)
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)
    mask = (1 << _CAP_DAC_READ_SEARCH) if keeps else 0
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    sets = (ctypes.c_uint32 * 6)(mask, mask, mask, 0, 0, 0)  # effective, permitted, inheritable; then the upper bits
    if call.capset(header, sets) != 0:
        raise OSError(ctypes.get_errno(), "capset")
    if keeps:
        call.prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_RAISE, _CAP_DAC_READ_SEARCH, 0, 0)


def _has_capability(number: int) -> bool:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("CapEff:"):
            return bool(int(line.split()[1], 16) >> number & 1)
    return False


def _num_threads(uid: int) -> int:
    """All threads of a user, which the limit of processes counts."""
    total = 0
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if folder.stat().st_uid == uid:
                total += sum(1 for _ in (folder / "task").iterdir())
        except OSError:  # it has ended
            continue
    return total


if __name__ == "__main__":
    _main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])

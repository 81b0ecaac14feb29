"""Programs that pass, fail, cheat, or attack the limits; the last are small enough to be harmless if a limit fails."""

import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from pathlib import Path

import pytest

from mobilellm_pro.evaluation import code_execution
from mobilellm_pro.evaluation.code_execution import Outcome, run_program

SLEEPER = (
    "import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)', '{0}'], {1})\n"
)


def processes_with(mark: str) -> int:
    """How many processes have a word on their command line."""
    count = 0
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            count += mark.encode() in path.read_bytes()
        except OSError:
            continue
    return count


def gone(mark: str) -> bool:
    """The end of a killed process takes a moment."""
    for _ in range(100):
        if not processes_with(mark):
            return True
        time.sleep(0.02)
    return False


def has_namespaces() -> bool:
    """In a namespace of processes, numbers begin with 1."""
    return run_program("import os\nassert os.getpid() < 10").passed


@pytest.mark.parametrize(
    "source",
    [
        "x = 1",
        "",
        "# only a comment",
        "from __future__ import annotations\nimport math, re, heapq\nassert math.gcd(4, 6) == 2",
        "print('a' * 100_000)\nimport sys\nsys.stdout.close()",
        "def f():\n    return 'ä'\n\nassert f() == 'ä'",
        "open('notes.txt', 'w').write('x' * 1000)\nassert open('notes.txt').read() == 'x' * 1000",
        "import threading\nthread = threading.Thread(target=print)\nthread.start()\nthread.join()",
    ],
)
def test_good_programs_pass(source: str) -> None:
    assert run_program(source) == Outcome(True, "passed")


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("assert 1 == 2, 'not equal'", "AssertionError: not equal"),
        ("def f(:", "SyntaxError"),
        ("x = (1,", "SyntaxError"),
        ("x = '''", "SyntaxError"),
        ("\ud800", "SyntaxError"),
        ("x = 1\0", "SyntaxError"),
        ("def f(n):\n    return f(n)\nf(1)", "RecursionError"),
        ("import sys\nsys.exit(0)", "it exited before its last line"),
        ("raise SystemExit", "it exited before its last line"),
        ("import os\nos._exit(0)", "it exited before its last line"),
        ("import sys\nsys.exit(3)", "exit status 3"),
        ("import os\nos.abort()", "killed by signal 6"),
        ("import atexit, os\natexit.register(os._exit, 4)", "exit status 4"),
        ("input()", "EOFError"),
        ("import sys\nassert sys.stdin.read() == '', 1\nraise ValueError('empty')", "ValueError: empty"),
        ("import torch", "ModuleNotFoundError"),
        ("import numpy", "ModuleNotFoundError"),
        ("import mobilellm_pro", "ModuleNotFoundError"),
    ],
)
def test_bad_programs_fail_with_the_reason(source: str, reason: str) -> None:
    outcome = run_program(source)
    assert not outcome.passed and reason in outcome.reason


@pytest.mark.parametrize("source", ["while True: pass", "import time\ntime.sleep(60)", "while True: print('a' * 1000)"])
def test_the_time_limit(source: str) -> None:
    start = time.monotonic()
    assert run_program(source, seconds=1.0) == Outcome(False, "stopped at the time limit of 1 seconds")
    assert time.monotonic() - start < 20


def test_memory_and_files_are_limited() -> None:
    assert run_program("x = bytearray(200 * 2**20)").passed
    assert run_program("x = bytearray(600 * 2**20)").reason == "MemoryError"
    assert run_program("x = bytearray(200 * 2**20)", memory_bytes=128 * 2**20).reason == "MemoryError"
    assert "File too large" in run_program("open('big', 'wb').write(bytes(17 * 2**20))").reason
    # Raising a limit again is not allowed either.
    again = "import resource\nresource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)"
    assert "ValueError" in run_program(again).reason


def test_the_number_of_processes_is_limited() -> None:
    before = code_execution._num_threads(code_execution.NOBODY if code_execution._can_become_nobody() else os.getuid())
    program = f"""
import os, time
count = 0
try:
    while count < {before} + 300:
        if os.fork() == 0:
            time.sleep(60)
        count += 1
except BlockingIOError:
    raise SystemExit(f"stopped after {{count}}")
"""
    outcome = run_program(program, seconds=20.0)
    assert outcome.reason.startswith("stopped after ")
    assert int(outcome.reason.split()[-1]) <= before + code_execution.MORE_PROCESSES + 100


def test_environment_and_folder_are_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "1")
    program = """
import os, sys
assert set(os.environ) <= {"PATH", "PYTHONHASHSEED", "LC_CTYPE"}, sorted(os.environ)
assert os.listdir(".") == [], os.listdir(".")
assert not any("site-packages" in path for path in sys.path), sys.path
"""
    assert run_program(program) == Outcome(True, "passed")


def test_root_becomes_nobody() -> None:
    if not code_execution._can_become_nobody():
        pytest.skip("not root, or there is no other user")
    write = f"import os\nassert os.getuid() == {code_execution.NOBODY}\nopen({str(Path(__file__).parent / 'x')!r}, 'w')"
    assert "PermissionError" in run_program(write).reason


def test_nothing_stays_in_the_temporary_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory() as folder:  # pytest's own folders are closed to other users
        Path(folder).chmod(0o755)
        monkeypatch.setattr(tempfile, "tempdir", folder)
        assert run_program("open('a', 'w').write('b')").passed
        assert not run_program("open('a', 'w').write('b')\nwhile True: pass", seconds=1.0).passed
        assert os.listdir(folder) == []


def test_the_order_of_sets_does_not_change() -> None:
    program = "import sys\nsys.exit(str({chr(97 + i) for i in range(20)}))"
    assert run_program(program).reason == run_program(program).reason


@pytest.mark.parametrize("ending", ["", "while True: pass", "import os\nos._exit(0)", "1 / 0"])
def test_what_a_program_started_is_dead(ending: str) -> None:
    mark = uuid.uuid4().hex
    run_program(SLEEPER.format(mark, "") + ending, seconds=1.5)
    assert gone(mark)


def test_also_in_a_session_of_its_own() -> None:
    if not has_namespaces():
        pytest.skip("no namespaces of processes here")
    mark = uuid.uuid4().hex
    assert run_program(SLEEPER.format(mark, "start_new_session=True")).passed
    assert gone(mark)
    run_program(SLEEPER.format(mark, "start_new_session=True") + "while True: pass", seconds=1.5)
    assert gone(mark)


def test_the_search_for_processes_finds_one() -> None:
    mark = uuid.uuid4().hex
    command = [sys.executable, "-c", "print(flush=True); input()", mark]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline()
        assert processes_with(mark) == 1
        process.kill()
    assert gone(mark)


def test_no_network() -> None:
    if not has_namespaces():
        pytest.skip("no namespaces of networks here")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        outcome = run_program(f"import socket\nsocket.create_connection(('127.0.0.1', {port}), timeout=1)")
    assert "OSError" in outcome.reason or "refused" in outcome.reason or "unreachable" in outcome.reason


def test_several_at_once() -> None:
    outcomes: list[Outcome] = []
    threads = [threading.Thread(target=lambda: outcomes.append(run_program("x = 1", seconds=30.0))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes == [Outcome(True, "passed")] * 4


def test_no_file_descriptors_leak() -> None:
    run_program("x = 1")
    before = len(os.listdir("/proc/self/fd"))
    for source in ("x = 1", "1 / 0", "import os\nos._exit(1)"):
        run_program(source)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_machine_that_runs_no_program_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    code_execution._check_once.cache_clear()
    monkeypatch.setattr(code_execution.sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="programs cannot be run here: exit status 1; /bin/false and its standard"):
        run_program("x = 1")
    monkeypatch.undo()
    assert run_program("x = 1").passed

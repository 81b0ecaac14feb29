"""Commands of `run_command`: where what they print goes, and that none outlives who started it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mobilellm_pro.pipeline.run_command import CommandFailed, run_logged, start

STARTER = r"""
import sys, time
from pathlib import Path
from mobilellm_pro.pipeline.run_command import start
with open(sys.argv[1], "w") as log:
    process = start(["bash", "-c", sys.argv[2]], stdout=log)
Path(sys.argv[1] + ".pid").write_text(f"{process.pid}\n")
time.sleep(60)
"""


def wait_for(path: Path, text: str, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while text not in (path.read_text() if path.exists() else ""):
        assert time.monotonic() < deadline, f"{path} has no {text!r}"
        time.sleep(0.02)


def is_alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent is gone")
def test_a_command_ends_with_a_killed_starter(tmp_path: Path) -> None:
    """SIGTERM, which it may still act upon, and not SIGKILL: torchrun ends its ranks then."""
    log = tmp_path / "log.txt"
    words = "trap 'echo ends in order; exit 0' TERM; echo begins; while true; do sleep 0.05; done"
    starter = subprocess.Popen([sys.executable, "-c", STARTER, str(log), words])
    try:
        wait_for(log, "begins")
        wait_for(Path(f"{log}.pid"), "\n")
        process = int(Path(f"{log}.pid").read_text())
        assert is_alive(process)
    finally:
        starter.send_signal(signal.SIGKILL)
        starter.wait()
    wait_for(log, "ends in order", seconds=10)
    deadline = time.monotonic() + 10
    while is_alive(process):
        assert time.monotonic() < deadline, "the command outlives its starter"
        time.sleep(0.02)


def test_a_command_gets_environment_and_open_files(tmp_path: Path) -> None:
    read, write = os.pipe()
    with os.fdopen(read) as reader:
        with open(tmp_path / "log.txt", "w") as log:
            words = ["bash", "-c", f"echo $NAME >&{write}; echo said; echo wrong >&2"]
            process = start(words, stdout=log, env={**os.environ, "NAME": "given"}, pass_fds=[write])
            os.close(write)
            assert process.wait() == 0
        assert reader.read() == "given\n" and (tmp_path / "log.txt").read_text() == "said\nwrong\n"


def test_a_program_that_cannot_be_started_is_named(tmp_path: Path) -> None:
    with pytest.raises(CommandFailed, match="no-such-program: no such program; correct TRAIN_COMMAND"):
        start(["no-such-program"], stdout=subprocess.DEVNULL)
    (tmp_path / "train").write_text("echo")
    with pytest.raises(CommandFailed, match="train: may not be executed"):
        start([str(tmp_path / "train")], stdout=subprocess.DEVNULL)


def test_a_command_that_fails_names_its_log(tmp_path: Path) -> None:
    log = tmp_path / "deep/log.txt"
    run_logged("phase", "first", "train", ["echo", "a b"], log)
    assert log.read_text() == "$ echo 'a b'\na b\n"
    with pytest.raises(CommandFailed, match=r'(?s)phase "first": train ended with status 3; its log is .*out of luck'):
        run_logged("phase", "first", "train", ["bash", "-c", "echo out of luck; exit 3"], log)

"""A rank ends with its torchrun, and a folder has one run at a time."""

import os
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist

from mobilellm_pro.config import JobError
from mobilellm_pro.training import launcher
from mobilellm_pro.training.run_lock import run_lock
from tests.ranks import Ranks


def has_ended(pid: int) -> bool:
    """Whether a process is gone, or a zombie that nobody has asked about yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def ended_within(pid: int, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not has_ended(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    return has_ended(pid)


def launch(file: str, environment: dict[str, str]) -> None:
    """Takes torchrun's part: has a rank, and waits."""
    os.environ.update(environment)
    if os.fork() == 0:
        launcher.end_with_launcher()
        Path(file).write_text(str(os.getpid()))
    time.sleep(60)


@pytest.mark.parametrize("under_torchrun", [True, False])
def test_a_rank_is_killed_with_torchrun_and_only_with_it(tmp_path: Path, under_torchrun: bool) -> None:
    file = tmp_path / "pid"
    environment = {"TORCHELASTIC_RUN_ID": "test"} if under_torchrun else {}
    ranks = Ranks(launch, 1, str(file), environment)
    while not file.is_file() or not file.read_text():
        time.sleep(0.05)
    pid = int(file.read_text())
    os.kill(ranks.processes[0].pid, signal.SIGKILL)
    assert ended_within(pid, 5 if under_torchrun else 0.5) == under_torchrun
    if not under_torchrun:
        os.kill(pid, signal.SIGKILL)
    ranks.stop()


def test_torchrun_ends_as_its_ranks_do_however_often_it_is_told_to(tmp_path: Path) -> None:
    rank = f"trap 'sleep 1; touch {tmp_path}/$LOCAL_RANK; exit 0' TERM; echo up; sleep 60 & wait"
    command = [sys.executable, "launch/torchrun.py", "--nproc-per-node=2", "--rdzv-backend=c10d", "--tee=3"]
    command += ["--rdzv-endpoint=localhost:0", "--no-python", "bash", "-c", rank]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        up = 0
        while up < 2:
            up += "up" in process.stdout.readline()
        process.stdout.close()  # as that of a runner that was killed
        for _ in range(5):
            process.send_signal(signal.SIGTERM)
            time.sleep(0.1)
        assert process.wait(30) == 1, "torchrun's own status, not that of a signal"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1"], "the ranks had the time that they needed"


def test_torchrun_that_was_gone_before_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "_ANSWER_SECONDS", 1)
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=5))
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    assert launcher._launcher_answers()
    del store
    assert not launcher._launcher_answers()
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "False")
    assert launcher._launcher_answers()


def hold(folder: str) -> None:
    """Holds a run's lock and has a child that would hold it on, were it the file's and not the process'."""
    with run_lock(Path(folder), 0):
        if os.fork() == 0:
            time.sleep(3)
            os._exit(0)
        Path(folder, "held").touch()
        time.sleep(60)


def test_a_folder_has_one_run_at_a_time(tmp_path: Path) -> None:
    ranks = Ranks(hold, 1, str(tmp_path))
    while not (tmp_path / "held").exists():
        time.sleep(0.05)
    with (
        pytest.raises(JobError, match=rf"another run, process {ranks.processes[0].pid} on .*, is at work"),
        run_lock(tmp_path, 0.3),
    ):
        pass
    os.kill(ranks.processes[0].pid, signal.SIGKILL)
    with run_lock(tmp_path, 2):
        assert (tmp_path / "run.lock").read_text().startswith(f"process {os.getpid()} on ")
    ranks.stop()

"""Locks of files: one holder, and file systems that have none."""

import errno
from pathlib import Path

import pytest

from mobilellm_pro.file_lock import try_lock


def test_one_holder_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with path.open("w") as first, path.open("w") as second:
        assert try_lock(first.fileno(), path) and not try_lock(second.fileno(), path)
        first.close()
        assert try_lock(second.fileno(), path)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_without_locks_it_says_so(number: int, capsys: pytest.CaptureFixture[str]) -> None:
    def lock(descriptor: int, operation: int) -> None:
        raise OSError(number, "no locks")

    assert try_lock(0, "shared/disk/x.lock", lock)
    assert "shared/disk/x.lock: this file system has no locks" in capsys.readouterr().err


def test_other_errors_are_errors() -> None:
    with pytest.raises(OSError, match="Bad file descriptor"):
        try_lock(10_000, "x")

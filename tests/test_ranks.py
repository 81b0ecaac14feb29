"""Ranks of the tests: whatever ends one of them is said, with what the others have to say."""

import os
import signal
import time

import pytest

from tests.ranks import run_ranks


def square() -> int:
    return int(os.environ["RANK"]) ** 2


def die(alone: bool) -> None:
    """Rank 1 without a word, rank 0 later by an error, unless rank 1 dies alone."""
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    if not alone:
        time.sleep(0.5)
        raise RuntimeError("connection closed by peer")


def hang() -> None:
    time.sleep(4)


def test_results_in_order() -> None:
    assert run_ranks(square, 3) == [0, 1, 4]


@pytest.mark.parametrize("alone", [True, False])
def test_a_rank_that_dies_is_named_at_once(alone: bool) -> None:
    begin = time.monotonic()
    with pytest.raises(AssertionError, match="rank 1: died, exit code -9") as found:
        run_ranks(die, 2, alone)
    assert ("connection closed by peer" in str(found.value)) is not alone
    assert time.monotonic() - begin < 30


def test_ranks_that_hang() -> None:
    with pytest.raises(AssertionError, match=r"ranks hung: only \[\] of 2 finished"):
        run_ranks(hang, 2, timeout_seconds=1)

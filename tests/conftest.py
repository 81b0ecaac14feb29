"""One small world for all tests that train (two corpora, a tiny teacher, a job file), and the option `--write`."""

import logging
from pathlib import Path

import pytest

from tests.training.small_world import SmallWorld, make_small_world

# pytest keeps every log record, and an export to ExecuTorch writes so many that it takes twice as long.
logging.getLogger("torch.__trace").propagate = False


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> SmallWorld:
    folder: Path = tmp_path_factory.mktemp("world")
    return make_small_world(folder)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write", action="store_true", help="record golden losses anew instead of comparing with them")

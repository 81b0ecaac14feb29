"""One small world for all tests of training: two corpora, a tiny teacher in a Hugging Face folder, a job file."""

from pathlib import Path

import pytest
from tests.training.small_world import SmallWorld, make_small_world


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> SmallWorld:
    folder: Path = tmp_path_factory.mktemp("world")
    return make_small_world(folder)

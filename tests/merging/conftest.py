"""One parent with its specialists for all tests that merge."""

from pathlib import Path

import pytest

from tests.merging.specialists import Specialists, make_specialists


@pytest.fixture(scope="session")
def specialists(tmp_path_factory: pytest.TempPathFactory) -> Specialists:
    folder: Path = tmp_path_factory.mktemp("specialists")
    return make_specialists(folder)

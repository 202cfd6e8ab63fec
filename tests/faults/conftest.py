"""The one model that all servers here serve."""

from pathlib import Path

import pytest

from tests.faults.harness import write_model


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("faults") / "tiny")

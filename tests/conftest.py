"""Fixtures that more than one room's tests share."""

import os
from pathlib import Path

import pytest

from loader.hub import pull


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The real small model, where `make run` keeps it; fetched once."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return pull("smollm2-135m", cache / "tandem")

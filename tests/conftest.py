"""Fixtures that more than one room's tests share."""

import os
import signal
from pathlib import Path

import pytest

from loader.hub import pull

# A shell starts what it puts in the background with Ctrl-C ignored, and children inherit that: tests that
# press it would wait for ever.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The real small model, where `make run` keeps it; fetched once."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return pull("smollm2-135m", cache / "tandem")

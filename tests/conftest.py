"""Fixtures that more than one room's tests share."""

import os
import signal
import subprocess
from pathlib import Path

import pytest

from loader.hub import pull

# A shell starts what it puts in the background with Ctrl-C ignored, and children inherit that: tests that
# press it would wait for ever.
signal.signal(signal.SIGINT, signal.default_int_handler)


def commit() -> str:
    """Return the commit that is tested; a copy without a history always draws the same."""
    command = ["git", "rev-parse", "--short=12", "HEAD"]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "no commit"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--matrix",
        metavar="DRAW",
        help="which third of the layouts is tested (tests/golden/matrix.py), or 'all' [the commit's]",
    )


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    terminalreporter.write_line(f"layouts drawn by: {config.getoption('matrix') or commit()}")


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The real small model, where `make run` keeps it; fetched once."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return pull("smollm2-135m", cache / "tandem")

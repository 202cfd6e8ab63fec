"""``tandem serve`` with bad workers: ``python -m tests.faults.bad_server WRONG serve …``.

``WRONG`` is for ``bad_worker``. All else is the command's own.
"""

import sys
from collections.abc import Callable

import cli
import orchestrator.serve
from orchestrator.config import ServeConfig
from orchestrator.display import Display
from orchestrator.launcher import LocalLauncher


def with_launcher(
    run: Callable[[ServeConfig, Display, LocalLauncher], int], wrong: str
) -> Callable[[ServeConfig, Display], int]:
    command = (sys.executable, "-P", "-m", "tests.faults.bad_worker", wrong)
    return lambda config, display: run(config, display, LocalLauncher(command))


if __name__ == "__main__":
    orchestrator.serve.run = with_launcher(orchestrator.serve.run, sys.argv.pop(1))  # type: ignore[assignment]
    cli.main()

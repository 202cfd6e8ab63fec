"""``python -P -m worker --connect ADDRESS --rank R --epoch E --parent PID``: one rank of an instance."""

import argparse
import os
import signal
import sys

from worker.control import Link, run
from worker.parent import Parent, ParentDiedError


def main() -> int:
    """Run one rank; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m worker", description="One rank of a tandem instance.")
    parser.add_argument("--connect", required=True, help="ZeroMQ address of the orchestrator")
    parser.add_argument("--rank", required=True, type=int)
    parser.add_argument("--epoch", required=True, type=int)
    parser.add_argument("--parent", required=True, type=int, help="process id of the orchestrator")
    arguments = parser.parse_args()
    # A terminal's Ctrl-C goes to the whole foreground group; what it means is the orchestrator's business.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        link = Link(arguments.connect, arguments.rank, Parent(arguments.parent))
    except ParentDiedError:
        return 1
    return run(link, arguments.rank, arguments.epoch, os.getpid())


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    if code:
        # Peers and their sockets may be in any state: tearing them down politely could wait for ever.
        os._exit(code)
    sys.exit(0)

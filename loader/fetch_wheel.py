"""``python -P -m loader.fetch_wheel PARENT SCRATCH …``: pip as a child that cannot outlive its parent.

A killed pull must leave nobody writing into the cache, and pip's temporary files belong into the pull's
scratch directory, which the next pull removes.
"""

import ctypes
import os
import runpy
import signal
import sys
import tempfile

_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Run pip in this process."""
    parent, scratch, *arguments = sys.argv[1:]
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(parent):
        sys.exit("the pull that wanted this download is gone")
    tempfile.tempdir = scratch
    sys.argv = ["pip", *arguments]
    runpy.run_module("pip", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()

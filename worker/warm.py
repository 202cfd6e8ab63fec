"""``python -P -m worker.warm --cache DIR``: build what a boot on this machine's GPUs would have to compile.

Prints a line of JSON for each kernel file: its name, and whether it had to be built.
"""

import argparse
import json
import sys
from pathlib import Path


def main() -> int:
    """Fill the kernel cache for every kind of GPU here; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m worker.warm", description="Build GPU kernels.")
    parser.add_argument("--cache", required=True, type=Path, help="where they are kept")
    cache = parser.parse_args().cache
    import torch

    if not torch.cuda.is_available():
        sys.stderr.write("no GPU answers: there is nothing to build kernels for\n")
        return 1
    from worker.backends.cuda.compiler import KernelCache
    from worker.backends.cuda.device import architecture

    for kind in sorted({architecture(ordinal) for ordinal in range(torch.cuda.device_count())}):
        for name, was_built in KernelCache(cache, kind).warm():
            sys.stdout.write(json.dumps({"architecture": kind, "name": name, "built": was_built}) + "\n")
            sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""How near do the elementwise kernels come to the copy ceiling, and what do they cost at one row?

Run on an idle GPU: ``python -m benchmarks.gpu_elementwise [--json PATH]``. Llama-3-8B's shapes in bf16,
in replays of a CUDA graph, over enough copies of the data that no cache holds it at many rows. The ceiling
is a copy's rate for the bytes read and written; at few rows a launch alone costs more than that.
"""

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from benchmarks.graph_time import launch_us
from kv.tensors import LayerCache
from worker.backends.cuda.compiler import KernelCache
from worker.backends.cuda.elementwise import Elementwise
from worker.backends.cuda.launch import Kernels

COPY_BYTES_S = 4.15e12
ROWS = (1, 8, 64, 256, 2048, 8192)
HIDDEN, INNER, HEADS, KV_HEADS, DIM = 4096, 14336, 32, 8, 128
COPIES = 4
LAUNCHES = 32


def randn(*shape: int) -> torch.Tensor:
    """Return random bf16 on the device."""
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def cases(kernels: Elementwise, rows: int) -> Iterator[tuple[str, int, Callable[[int], object]]]:
    """Give name, bytes moved and a launch over one of the copies."""
    x, update = ([randn(rows, HIDDEN) for _ in range(COPIES)] for _ in range(2))
    weight = torch.ones(HIDDEN, device="cuda", dtype=torch.bfloat16)
    whole = rows * HIDDEN * 2
    yield "rms_norm", 2 * whole, lambda i: kernels.rms_norm(x[i % COPIES], weight, 1e-5)
    # Updates of zero: residuals stay finite however often they are added to.
    for u in update:
        u.zero_()
    yield (
        "add_norm",
        4 * whole,
        lambda i: kernels.add_norm(x[i % COPIES], update[i % COPIES], weight, 1e-5),
    )
    yield "add", 3 * whole, lambda i: kernels.add(x[i % COPIES], update[i % COPIES])
    gate_up = [randn(rows, 2 * INNER) for _ in range(COPIES)]
    yield "swiglu", 3 * rows * INNER * 2, lambda i: kernels.swiglu(gate_up[i % COPIES])
    width = (HEADS + 2 * KV_HEADS) * DIM
    qkv, rotation = [randn(rows, width) for _ in range(COPIES)], randn(rows, 3, DIM // 2)
    lines = torch.randperm(rows, device="cuda")
    cache = LayerCache(0, randn(rows, 2 * KV_HEADS * DIM), KV_HEADS, DIM, DIM)
    yield (
        "rope_and_store",
        2 * rows * width * 2,
        lambda i: kernels.rope_and_store(qkv[i % COPIES], rotation, cache, lines),
    )


def main() -> None:
    """Measure, print, and write what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    torch.zeros(1, device="cuda")
    major, minor = torch.cuda.get_device_capability()
    found = []
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}; ceiling {COPY_BYTES_S / 1e9:,.0f} GB/s"
    )
    print("kernel           rows        us    GB/s  of copying")
    with tempfile.TemporaryDirectory() as directory:
        cache = KernelCache(Path(directory), f"sm_{major}{minor}{'a' if major >= 9 else ''}")
        kernels = Elementwise(Kernels(cache))
        for rows in ROWS:
            for name, num_bytes, launch in cases(kernels, rows):
                us = launch_us(launch, LAUNCHES)
                rate = num_bytes / us * 1e6
                ratio = rate / COPY_BYTES_S
                print(f"{name:15} {rows:5} {us:9.2f} {rate / 1e9:7,.0f} {ratio:11.2f}")
                found.append({"kernel": name, "rows": rows, "us": us, "gb_s": rate / 1e9, "ratio": ratio})
    if asked.json is not None:
        asked.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Make a model directory with a known model's names, shapes and dtypes, and random weights.

    python -m benchmarks.make_checkpoint llama-3-8b DIR [--seed N] [--layers N] [--tokenizer]

The same seed gives the same tensors, however many threads write them and wherever shards end. A matrix is
normal with variance 1 / columns, so that what goes in comes out as large; norms are 1. Nothing of it is a
language: speed and memory are measured with it, and tokens compared between layouts.
"""

import argparse
import json
import math
import os
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np

from benchmarks.byte_tokenizer import write_byte_tokenizer
from benchmarks.known_models import KNOWN
from loader.index import INDEX_NAME
from models.parameter import DTYPE_BYTES
from models.registry import load_spec

CHUNK_ELEMENTS = 1 << 20
"""Drawn and written at a time, from a generator of its own."""
HEADER_DTYPES = {"bfloat16": "BF16", "float32": "F32"}
PIECE_ELEMENTS = 1 << 17
"""What is looked up at a time: its indices stay in a core's cache."""
LEVELS = 1 << 16
"""Values that a weight can take: a 16-bit number is looked up in a table of normal quantiles, which is
several times faster than drawing normals and as fine as bfloat16."""

Array = np.ndarray[Any, Any]
Shapes = dict[str, tuple[int, ...]]


def write_checkpoint(
    name: str,
    directory: Path,
    *,
    seed: int = 0,
    dtype: str = "bfloat16",
    layers: int | None = None,
    shard_bytes: int = 4 << 30,
    tokenizer: bool = False,
    threads: int | None = None,
    report: Callable[[str], None] = lambda _: None,
) -> int:
    """Write a model directory and return the bytes of its tensors.

    The index file comes last: a directory that has one is complete. Without ``tokenizer`` the model serves
    token ids only. ``report`` gets a line for each shard.

    Errors: ``KeyError`` for an unknown name, ``FileExistsError`` for a directory that is not empty.
    """
    config = dict(KNOWN[name]) | {"torch_dtype": dtype}
    if layers is not None:
        config["num_hidden_layers"] = layers
    directory.mkdir(parents=True, exist_ok=True)
    if any(directory.iterdir()):
        raise FileExistsError(f"{directory} is not empty: give a new directory")
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    if tokenizer:
        specials = (config["bos_token_id"], config["eos_token_id"])
        write_byte_tokenizer(directory / "tokenizer.json", config["vocab_size"], specials)
    parameters = load_spec(directory, dtype).parameters
    shapes = {s.source: s.shape for parameter in parameters for s in parameter.segments}
    shards = list(_shards(shapes, DTYPE_BYTES[dtype], shard_bytes))
    began, written = time.monotonic(), 0
    total = sum(_nbytes(shape, dtype) for shape in shapes.values())
    places: dict[str, str] = {}
    with ThreadPoolExecutor(threads or os.cpu_count()) as pool:
        for number, shard in enumerate(shards, 1):
            path = directory / f"model-{number:05}-of-{len(shards):05}.safetensors"
            written += _write_shard(path, shard, dtype, seed, pool)
            places |= dict.fromkeys(shard, path.name)
            spent = time.monotonic() - began
            report(f"shard {number} of {len(shards)}: {_gib(written)} of {_gib(total)}, {spent:.1f} s")
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (directory / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")
    return total


def _shards(shapes: Shapes, element_bytes: int, shard_bytes: int) -> Iterator[Shapes]:
    """Cut the tensors, in their order, into files of at most ``shard_bytes`` (or of one tensor)."""
    shard: Shapes = {}
    room = shard_bytes
    for name, shape in shapes.items():
        size = math.prod(shape) * element_bytes
        if shard and size > room:
            yield shard
            shard, room = {}, shard_bytes
        shard[name] = shape
        room -= size
    yield shard


def _write_shard(path: Path, shapes: Shapes, dtype: str, seed: int, pool: ThreadPoolExecutor) -> int:
    """Write one safetensors file; return the bytes of its tensors."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    starts: dict[str, int] = {}
    end = 0
    for name, shape in shapes.items():
        starts[name], end = end, end + _nbytes(shape, dtype)
        header[name] = {
            "dtype": HEADER_DTYPES[dtype],
            "shape": list(shape),
            "data_offsets": [starts[name], end],
        }
    head = json.dumps(header).encode()
    # Padded with spaces, so that the tensors begin at a multiple of 64 bytes.
    head += b" " * (-(8 + len(head)) % 64)
    base = 8 + len(head)
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    try:
        os.ftruncate(fd, base + end)
        _write_all(fd, len(head).to_bytes(8, "little") + head, 0)

        def write(job: tuple[str, int, int]) -> None:
            name, first, count = job
            content = _draw(name, shapes[name], dtype, seed, first, count)
            _write_all(fd, content.data.cast("B"), base + starts[name] + first * DTYPE_BYTES[dtype])

        jobs = [
            (name, first, min(CHUNK_ELEMENTS, math.prod(shape) - first))
            for name, shape in shapes.items()
            for first in range(0, math.prod(shape), CHUNK_ELEMENTS)
        ]
        for _ in pool.map(write, jobs):
            pass
    finally:
        os.close(fd)
    return end


def _draw(name: str, shape: tuple[int, ...], dtype: str, seed: int, first: int, count: int) -> Array:
    """Return ``count`` elements of a tensor from its element ``first`` on."""
    if len(shape) == 1 and "norm" in name:
        return _encode(np.ones(count, np.float32), dtype)
    levels = _levels(1 / math.sqrt(shape[-1]), dtype)
    random = np.random.Generator(np.random.SFC64([seed, zlib.crc32(name.encode()), first]))
    found = np.empty(count, levels.dtype)
    for start in range(0, count, PIECE_ELEMENTS):
        piece = found[start : start + PIECE_ELEMENTS]
        draws = random.integers(0, (1 << 64) - 1, -(-len(piece) // 4), np.uint64, endpoint=True)
        # A 16-bit number is always in range; any mode but "raise" writes without a copy.
        np.take(levels, draws.view(np.uint16)[: len(piece)], out=piece, mode="clip")
    return found


@cache
def _levels(deviation: float, dtype: str) -> Array:
    normal = NormalDist(0, deviation)
    values = [normal.inv_cdf((level + 0.5) / LEVELS) for level in range(LEVELS)]
    return _encode(np.array(values, np.float32), dtype)


def _encode(values: Array, dtype: str) -> Array:
    """Return float32 values as the dtype's bits; bfloat16's are rounded to the nearest, ties to even."""
    if dtype == "float32":
        return values
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def _write_all(fd: int, content: bytes | memoryview, offset: int) -> None:
    view = memoryview(content)
    while view:
        count = os.pwrite(fd, view, offset)
        view, offset = view[count:], offset + count


def _nbytes(shape: tuple[int, ...], dtype: str) -> int:
    return math.prod(shape) * DTYPE_BYTES[dtype]


def _gib(size: int) -> str:
    return f"{size / (1 << 30):.2f} GiB"


def main() -> None:
    """Write what the command line asks for; progress goes to standard error."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("name", choices=sorted(KNOWN))
    parser.add_argument("directory", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=sorted(HEADER_DTYPES), default="bfloat16")
    parser.add_argument("--layers", type=int, help="instead of the model's own number")
    parser.add_argument("--shard-gib", type=float, default=4.0)
    parser.add_argument("--threads", type=int, help="[one for each core]")
    parser.add_argument("--tokenizer", action="store_true", help="also a byte-level tokenizer.json")
    options = parser.parse_args()
    try:
        write_checkpoint(
            options.name,
            options.directory,
            seed=options.seed,
            dtype=options.dtype,
            layers=options.layers,
            shard_bytes=int(options.shard_gib * (1 << 30)),
            tokenizer=options.tokenizer,
            threads=options.threads,
            report=lambda line: print(line, file=sys.stderr, flush=True),
        )
    except OSError as error:
        # No room, above all: what was written so far is for the user to remove.
        sys.exit(f"{options.directory} cannot be made: {error}")


if __name__ == "__main__":
    main()

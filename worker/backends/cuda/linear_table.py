"""Which product kernel serves which shape: measured by ``python -m benchmarks.gpu_linear`` on one H200.

A kernel is named as in kernels/gemv.cu. ``ring_4_1_1_1_12``: 4 warps share the k's, 1 such group of warps
is in a block, a warp has 1 tile of 16 weight rows and 1 tile of 8 rows of x, and 12 pieces are under way.
``cublas`` is what torch does.
"""

from dataclasses import dataclass

CUBLAS = "cublas"
GEMV_ROWS = 32
"""More rows of x than this are cuBLAS's."""
COLUMN_ROWS = 8
ROW_BUCKETS = (1, 2, 4, 8, 16, 24, 32)
"""A number of rows is served as the next of these."""
MULTIPROCESSORS = 132


@dataclass(frozen=True, slots=True)
class Choice:
    """A kernel, and how much of the weights it asks into L2 while it waits for the kernel before."""

    kernel: str
    ahead_mib: int = 0


PLAIN = {
    1: (
        "gemv_1_8_1_1_8",
        "gemv_4_1_1_1_8",
        "gemv_8_1_1_1_4",
        "gemv_8_1_1_1_8",
        "gemv_16_1_1_1_4",
        "ring_1_4_1_1_12",
        "ring_1_8_1_1_8",
        "ring_2_4_1_1_8",
        "ring_4_1_1_1_12",
        "ring_8_1_1_1_8",
        "ring_8_1_1_1_12",
    ),
    2: ("gemv_8_1_1_2_4", "ring_1_4_1_2_12", "ring_1_8_1_2_8", "ring_4_1_1_2_12", "ring_8_1_1_2_12"),
    4: ("ring_1_8_1_4_8", "ring_1_8_2_4_4", "ring_4_1_1_4_12", "ring_4_1_2_4_6", "ring_8_1_1_4_12"),
}
"""By tiles of 8 rows of x: the kernels there are."""

GATED = {
    1: ("gated_2_4_2_1_4", "gated_ring_1_4_2_1_6", "gated_ring_2_4_2_1_6", "gated_ring_4_1_2_1_6"),
    2: ("gated_ring_1_4_2_2_6", "gated_ring_2_4_2_2_6"),
    4: ("gated_ring_1_8_2_4_4", "gated_ring_2_4_2_4_4"),
}
"""The same for products with [gate | up] that end in SwiGLU."""

MEASURED: dict[tuple[bool, int, int, int], Choice] = {
    (False, 1, 6144, 4096): Choice("ring_8_1_1_1_8"),
    (False, 2, 6144, 4096): Choice("ring_8_1_1_1_8", 4),
    (False, 4, 6144, 4096): Choice("ring_8_1_1_1_8"),
    (False, 8, 6144, 4096): Choice("ring_8_1_1_1_8", 4),
    (False, 16, 6144, 4096): Choice("cublas"),
    (False, 24, 6144, 4096): Choice("cublas"),
    (False, 32, 6144, 4096): Choice("cublas"),
    (False, 1, 4096, 4096): Choice("ring_8_1_1_1_8", 4),
    (False, 2, 4096, 4096): Choice("gemv_8_1_1_1_8", 4),
    (False, 4, 4096, 4096): Choice("gemv_8_1_1_1_8", 4),
    (False, 8, 4096, 4096): Choice("gemv_8_1_1_1_8", 4),
    (False, 16, 4096, 4096): Choice("gemv_8_1_1_2_4", 4),
    (False, 24, 4096, 4096): Choice("cublas"),
    (False, 32, 4096, 4096): Choice("cublas"),
    (False, 1, 28672, 4096): Choice("ring_8_1_1_1_8", 4),
    (False, 2, 28672, 4096): Choice("ring_8_1_1_1_8"),
    (False, 4, 28672, 4096): Choice("cublas"),
    (False, 8, 28672, 4096): Choice("cublas"),
    (False, 16, 28672, 4096): Choice("cublas"),
    (False, 24, 28672, 4096): Choice("cublas"),
    (False, 32, 28672, 4096): Choice("cublas"),
    (True, 1, 14336, 4096): Choice("gated_ring_4_1_2_1_6"),
    (True, 2, 14336, 4096): Choice("gated_ring_4_1_2_1_6"),
    (True, 4, 14336, 4096): Choice("gated_ring_4_1_2_1_6", 4),
    (True, 8, 14336, 4096): Choice("gated_ring_4_1_2_1_6", 4),
    (True, 16, 14336, 4096): Choice("cublas"),
    (True, 24, 14336, 4096): Choice("cublas"),
    (True, 32, 14336, 4096): Choice("cublas"),
    (False, 1, 4096, 14336): Choice("ring_8_1_1_1_12"),
    (False, 2, 4096, 14336): Choice("ring_8_1_1_1_12"),
    (False, 4, 4096, 14336): Choice("ring_8_1_1_1_12"),
    (False, 8, 4096, 14336): Choice("ring_8_1_1_1_12"),
    (False, 16, 4096, 14336): Choice("cublas"),
    (False, 24, 4096, 14336): Choice("cublas"),
    (False, 32, 4096, 14336): Choice("cublas"),
    (False, 1, 128256, 4096): Choice("ring_8_1_1_1_12"),
    (False, 2, 128256, 4096): Choice("ring_8_1_1_1_12"),
    (False, 4, 128256, 4096): Choice("ring_2_4_1_1_8"),
    (False, 8, 128256, 4096): Choice("ring_2_4_1_1_8"),
    (False, 16, 128256, 4096): Choice("cublas"),
    (False, 24, 128256, 4096): Choice("cublas"),
    (False, 32, 128256, 4096): Choice("cublas"),
}
"""(gated, rows, outputs, k) to the fastest. Gated: outputs are half of the weight's rows."""


def column_tiles(rows: int) -> int:
    """Return how many tiles of 8 rows of x a kernel for ``rows`` (at most 32) works on."""
    return 1 if rows <= COLUMN_ROWS else 2 if rows <= 2 * COLUMN_ROWS else 4


def choose(rows: int, outputs: int, k: int, *, gated: bool = False) -> Choice:
    """Return what serves a shape: the measured best, or a rule where it was not measured."""
    if rows > GEMV_ROWS:
        return Choice(CUBLAS)
    bucket = next(bucket for bucket in ROW_BUCKETS if rows <= bucket)
    measured = MEASURED.get((gated, bucket, outputs, k))
    return measured or _rule(column_tiles(bucket), outputs, gated=gated)


def _rule(tiles: int, outputs: int, *, gated: bool) -> Choice:
    """Share the k's among so many warps that about 12 of them read on each multiprocessor."""
    alone = outputs / 16 / MULTIPROCESSORS
    if gated:
        few = {1: "gated_ring_4_1_2_1_6", 2: "gated_ring_2_4_2_2_6", 4: "gated_ring_2_4_2_4_4"}
        many = few | {1: "gated_ring_2_4_2_1_6"}
        return Choice((many if alone >= 5 else few)[tiles])
    if alone >= 10:
        return Choice({1: "ring_1_8_1_1_8", 2: "ring_1_8_1_2_8", 4: "ring_1_8_2_4_4"}[tiles])
    if alone >= 2.5:
        return Choice({1: "ring_4_1_1_1_12", 2: "ring_4_1_1_2_12", 4: "ring_4_1_1_4_12"}[tiles])
    return Choice({1: "ring_8_1_1_1_12", 2: "ring_8_1_1_2_12", 4: "ring_8_1_1_4_12"}[tiles])

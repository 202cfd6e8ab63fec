"""Which of grouped.cu's kernels serves which product of experts: rules by sizes that the host knows.

How many slots an expert really has is on the device alone. A tile too narrow for an expert makes it have
several, which read its weights again, from L2; one too wide multiplies padding.
"""

import math
from dataclasses import dataclass
from typing import Literal

Kind = Literal["bf16", "int4", "turned"]
"""How weights lie: rows of bf16, rows of words of int4, or bf16 in columns, k by k."""
PLAIN_COLUMNS = 2
"""The float32 kernel's tiles are of 16 slots."""
_MOST_SLOTS_EACH = ((5.0, 1), (11.0, 2), (24.0, 4))
"""Slots an expert has on average, and the tiles of 8 that then hold nearly every expert's."""
_WIDEST = 8


@dataclass(frozen=True, slots=True)
class Variant:
    """One kernel; the fields are those of its name, in order."""

    kind: Kind
    k_warps: int
    n_warps: int
    tiles: int
    """Of 16 weight rows, a warp."""
    columns: int
    """Tiles of 8 slots."""
    depth: int
    """Pieces under way."""

    def name(self, *, gated: bool) -> str:
        """Return the entry point."""
        kind = f"{self.kind}_gated" if gated else self.kind
        return f"{kind}_{self.k_warps}_{self.n_warps}_{self.tiles}_{self.columns}_{self.depth}"

    @property
    def threads(self) -> int:
        """Of a block."""
        return 32 * self.k_warps * self.n_warps

    def outputs(self, *, gated: bool) -> int:
        """Return what a block makes of each slot."""
        return 16 * self.tiles * self.n_warps // (2 if gated else 1)

    @property
    def shared_bytes(self) -> int:
        """Of a block: the warps' rings, and in their place the sums that its warps have to add up."""
        rows = 16 * self.tiles
        # A piece: 64 bytes a weight row with 8 bytes of scales and 256 a slot, or 128 and 128.
        piece = (rows + self.columns * 8) * 128
        if self.kind == "int4":
            piece = rows * (64 + 8) + self.columns * 8 * 256
        sums = self.k_warps * self.columns * 8 * (rows * self.n_warps + 1) * 4
        return max(piece * self.depth * self.k_warps * self.n_warps, sums)


INT4 = tuple(
    Variant("int4", *numbers)
    for numbers in (
        (8, 1, 2, 1, 3),
        (8, 1, 4, 1, 2),
        (4, 1, 4, 1, 4),
        (1, 8, 2, 1, 2),
        (4, 1, 4, 2, 3),
        (1, 4, 4, 2, 2),
        (4, 1, 4, 4, 2),
        (1, 4, 4, 4, 2),
        (4, 1, 4, 8, 2),
        (1, 4, 4, 8, 2),
    )
)
BF16 = tuple(
    Variant("bf16", *numbers)
    for numbers in (
        (8, 1, 2, 1, 2),
        (4, 1, 4, 1, 3),
        (1, 8, 2, 1, 2),
        (4, 1, 4, 2, 2),
        (1, 4, 4, 2, 2),
        (4, 1, 4, 4, 2),
        (1, 4, 4, 4, 2),
        (4, 1, 4, 8, 3),
        (1, 4, 4, 8, 3),
    )
)
TURNED = tuple(
    Variant("turned", *numbers)
    for numbers in (
        (8, 1, 2, 1, 2),
        (4, 1, 4, 1, 3),
        (4, 1, 4, 2, 2),
        (1, 4, 4, 2, 2),
        (4, 1, 4, 4, 2),
        (1, 4, 4, 4, 2),
        (4, 1, 4, 8, 3),
        (1, 4, 4, 8, 3),
    )
)
VARIANTS: dict[Kind, tuple[Variant, ...]] = {"bf16": BF16, "int4": INT4, "turned": TURNED}


def columns_for(choices: int, experts: int) -> int:
    """Return the tiles of 8 slots of an expert that go together, for so many choices of so many experts."""
    each = choices / experts
    return next((columns for most, columns in _MOST_SLOTS_EACH if each <= most), _WIDEST)


def most_tiles(choices: int, experts: int, columns: int) -> int:
    """Return the tiles that choices can fall into at most."""
    return min(choices, choices // (8 * columns) + experts)


def likely_tiles(choices: int, experts: int, local: int, columns: int) -> int:
    """Return the tiles of ``local`` of the experts if choices are spread evenly, and some more.

    A grid of as many as there could be is mostly blocks that find nothing to do; they take time too.
    """
    hit = local * (1 - (1 - 1 / experts) ** choices)
    full = choices * local / experts / (8 * columns)
    likely = math.ceil(1.1 * max(hit, full + hit / 2)) + 1
    return min(likely, most_tiles(choices, local, columns))


def choose(k: int, columns: int, *, few: bool, kind: Kind) -> Variant:
    """Return the kernel for a product over k with tiles of 8 · ``columns`` slots.

    Warps share the k's as long as each has pieces enough to keep its ring busy. ``few``: slots are so few
    that only small blocks are enough of them for all multiprocessors. Of weights that lie k by k a block
    must read at least 64 neighbouring bytes, which four tiles are.
    """
    pieces = -(-k // (128 if kind == "int4" else 64))
    fitting = [v for v in VARIANTS[kind] if v.columns == columns]
    if kind == "turned":
        return next(v for v in fitting if v.k_warps == 4)
    if few and pieces >= 32:
        return next((v for v in fitting if v.k_warps == 8), fitting[0])
    return next(v for v in fitting if v.k_warps == (1 if pieces < 8 else 4))

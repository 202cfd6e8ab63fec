"""What a forward pass knows of its step: which tokens of which rows run, and where their KV lies."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch


class BlockTable:
    """The blocks of one row in one KV group, in order of position. Owned by the row in ``Batch``."""

    __slots__ = ("ids", "is_run")

    def __init__(self, ids: Sequence[int]) -> None:
        self.ids: list[int] = []
        self.is_run = True
        """Whether the blocks are neighbours in ascending order: one view of the cache."""
        self.extend(ids)

    @property
    def first_of_run(self) -> int | None:
        """The first block where all are such neighbours."""
        return self.ids[0] if self.is_run and self.ids else None

    def extend(self, ids: Sequence[int]) -> None:
        """Append blocks."""
        for block in ids:
            if self.is_run and self.ids and block != self.ids[-1] + 1:
                self.is_run = False
            self.ids.append(block)


@dataclass(frozen=True, slots=True)
class RowSpan:
    """The part of a step that belongs to one row: tokens [start, start + count) of that row."""

    offset: int
    """Its first token among the step's."""
    start: int
    """Tokens whose KV is in the cache already."""
    count: int
    tables: tuple[BlockTable, ...]
    """Per KV group; they hold at least start + count tokens."""

    @property
    def end(self) -> int:
        """Known position after the step."""
        return self.start + self.count


class AttentionPlan:
    """What a backend prepared for the attention of one step in one KV group; only it looks inside."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class Wanted:
    """The tokens that a step is for, each the last of its row: nothing more comes of the others' states."""

    tokens: torch.Tensor
    """int64 [wanted], places among the step's tokens."""
    attention: tuple[AttentionPlan, ...]
    """Of these tokens alone, per KV group."""


@dataclass(frozen=True, slots=True)
class StepContext:
    """One step as the layers see it. Tokens of all rows lie one after another, in law order."""

    positions: torch.Tensor
    """[tokens], int64."""
    attention: tuple[AttentionPlan, ...]
    """Per KV group."""
    wanted: Wanted | None = None
    """The last stage's last layer finishes these alone, and gives no others; None: all."""

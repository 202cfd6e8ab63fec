"""Topology: rank <-> (stage, tp rank), and views of a group: the one place where that arithmetic stands."""

import msgspec


class Topology(msgspec.Struct, frozen=True):
    """How one instance's ranks are arranged: ``rank = stage * tp + tp_rank``."""

    tp: int = 1
    pp: int = 1
    ep: int = 1
    """Above 1 it is tp: routed experts are placed over the group, each whole on one rank, not cut by it."""
    dcp: int = 1
    """Ranks, neighbours in a group, that keep the KV of the same heads by position, each a part of it: the
    one with ``dcp_rank`` r keeps the positions p with p % dcp = r."""

    def __post_init__(self) -> None:
        if min(self.tp, self.pp, self.ep, self.dcp) < 1:
            raise ValueError(f"degrees are at least 1, not {self}")
        if self.ep not in (1, self.tp) or self.tp % self.dcp:
            raise ValueError(f"ep is 1 or tp, dcp divides tp: not {self}")

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.tp * self.pp

    def stage(self, rank: int) -> int:
        """Pipeline stage of a rank."""
        return rank // self.tp

    def tp_rank(self, rank: int) -> int:
        """Place of a rank in its tensor-parallel group."""
        return rank % self.tp

    def rank(self, stage: int, tp_rank: int) -> int:
        """Rank at a stage and a place in its group."""
        return stage * self.tp + tp_rank

    def tp_group(self, stage: int) -> range:
        """Ranks of one stage's tensor-parallel group."""
        return range(stage * self.tp, (stage + 1) * self.tp)

    def dcp_rank(self, tp_rank: int) -> int:
        """Which part of the positions the rank at a place in its group keeps."""
        return tp_rank % self.dcp

    def dcp_group(self, rank: int) -> range:
        """Ranks that keep the positions of the same heads' KV, ``rank`` among them."""
        first = rank - self.dcp_rank(self.tp_rank(rank))
        return range(first, first + self.dcp)

    def page_tokens(self, block_tokens: int) -> int:
        """Tokens of one rank's page of a block of ``block_tokens``: it is a page on each of dcp ranks."""
        assert block_tokens % self.dcp == 0, (block_tokens, self)
        return block_tokens // self.dcp

    def whole_block(self, block_tokens: int) -> int:
        """Tokens of the least block of at least so many that dcp pages of one size make."""
        return -(-block_tokens // self.dcp) * self.dcp

    def is_first(self, rank: int) -> bool:
        """Whether the rank's stage embeds tokens."""
        return self.stage(rank) == 0

    def is_last(self, rank: int) -> bool:
        """Whether the rank's stage makes logits and samples."""
        return self.stage(rank) == self.pp - 1

    @property
    def sampling_rank(self) -> int:
        """The rank that answers for a step."""
        return (self.pp - 1) * self.tp

    def __str__(self) -> str:
        views = [f"{name} {degree}" for name, degree in (("ep", self.ep), ("dcp", self.dcp)) if degree > 1]
        return " ".join([f"tp {self.tp} pp {self.pp}", *views])

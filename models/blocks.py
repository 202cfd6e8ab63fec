"""How many blocks requests hold: layer groups take theirs from one pool of equally sized blocks.

A block belongs to one group at a time and holds the KV of that group's layers for ``block_tokens``
tokens. A group whose queries see all positions needs blocks for the whole request; a local one for its
window, for what steps in flight may write, and for a page that both ends share with what is not needed.
"""

from typing import Self

import msgspec

from models.spec import KVGroup, ModelSpec
from protocol.errors import UnsupportedModelError
from protocol.topology import Topology


class BlockNeeds(msgspec.Struct, frozen=True):
    """The one statement of what requests take of the pool."""

    groups: tuple[KVGroup, ...]
    block_tokens: int
    step_tokens: int
    """The most tokens of a request that may be planned and not yet committed."""

    @classmethod
    def of(cls, model: ModelSpec, topology: Topology, block_tokens: int, step_tokens: int) -> Self:
        """Return the needs where steps have at most ``step_tokens``: pp + 1 of them are in flight."""
        return cls(model.kv_groups, block_tokens, step_tokens * (topology.pp + 1))

    def of_request(self, num_tokens: int) -> int:
        """Return the most blocks that a request of ``num_tokens`` ever holds at once."""
        return sum(self.of_group(group, num_tokens) for group in self.groups)

    def of_group(self, group: KVGroup, num_tokens: int) -> int:
        """Return those of one layer group."""
        whole = -(-num_tokens // self.block_tokens)
        if not group.is_local:
            return whole
        return min(whole, -(-(group.window + self.step_tokens) // self.block_tokens) + 1)

    def longest(self, num_blocks: int) -> int:
        """Return the tokens of the longest request that so many blocks hold."""
        low, high = 0, num_blocks
        while low < high:
            middle = (low + high + 1) // 2
            if self.of_request(middle * self.block_tokens) <= num_blocks:
                low = middle
            else:
                high = middle - 1
        return low * self.block_tokens

    def held(self, num_blocks: int, context: int) -> int:
        """Return the tokens that the pool holds in requests of ``context`` each, in all layers."""
        whole = max(-(-context // self.block_tokens), 1)
        return num_blocks * whole // self.of_request(whole * self.block_tokens) * self.block_tokens

    def held_globally(self, num_blocks: int) -> int:
        """Return those that it would hold if local layers needed nothing."""
        num_global = sum(not group.is_local for group in self.groups)
        return num_blocks // max(num_global, 1) * self.block_tokens


def block_bytes(model: ModelSpec, topology: Topology, layers: range, block_tokens: int) -> int:
    """Return what a block takes on one rank of the stage that runs ``layers``.

    Those of the group with the most layers here: any group may hold the block, the others pad it.
    Errors: ``UnsupportedModelError`` where layers of two groups keep different things of a token.
    """
    check_groups(model, topology)
    tokens = topology.page_tokens(block_tokens)
    return tokens * max(group.bytes_per_token(topology, layers) for group in model.kv_groups)


def check_groups(model: ModelSpec, topology: Topology) -> None:
    """Refuse groups whose layers' pages could not take each other's place (``UnsupportedModelError``)."""
    sizes = {
        group.name: group.bytes_per_token(topology, range(group.layers[0], group.layers[0] + 1))
        for group in model.kv_groups
    }
    if len(set(sizes.values())) > 1:
        listed = ", ".join(f"{name} {size}" for name, size in sizes.items())
        raise UnsupportedModelError(
            f"KV groups keep different bytes of a token in a layer ({listed}): one pool of equal pages "
            "serves layers that keep the same"
        )

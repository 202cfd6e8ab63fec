"""What each request holds of the pool: block tables per layer group, prefix hits, what a window lets go.

The one place where blocks are allocated and freed. A block belongs to one layer group at a time, whichever
asks, and comes from the one pool. A local group, which sees a window or a chunk, gives back blocks that no
later query can see; their ids stay in the table as placeholders, which no step reads or writes.
"""

from collections.abc import Iterable, Sequence

from kv.pool import BlockPool, PoolError
from kv.prefix import Link, PrefixIndex
from models.blocks import BlockNeeds
from models.spec import KVGroup


class Hit:
    """What a prefix match found: nothing is held until ``open`` takes it."""

    __slots__ = ("links", "num_tokens")

    def __init__(self, links: list[Link], num_tokens: int) -> None:
        self.links = links
        self.num_tokens = num_tokens


class Holding:
    """The blocks of one running request. ``KVManager`` is its one writer."""

    __slots__ = ("capacity", "next_event", "num_let_go", "num_linked", "parent", "salt", "tables")

    def __init__(self, salt: str, num_groups: int) -> None:
        self.salt = salt
        self.tables: tuple[list[int], ...] = tuple([] for _ in range(num_groups))
        self.capacity = 0
        """Tokens that the tables have room for."""
        self.num_let_go = [0] * num_groups
        """Leading table entries that are placeholders, per group."""
        self.num_linked = 0
        """Leading blocks that are links of the prefix index."""
        self.parent: Link | None = None
        """The last of them."""
        self.next_event = 0
        """Computed tokens from which ``note_computed`` has something to do."""


class KVManager:
    """Owner of the pool, the prefix index and all holdings."""

    def __init__(self, num_blocks: int, block_tokens: int, groups: tuple[KVGroup, ...]) -> None:
        self.block_tokens = block_tokens
        self.groups = groups
        self._locals = [at for at, group in enumerate(groups) if group.is_local]
        self._index = PrefixIndex(block_tokens, len(groups))
        self._pool = BlockPool(num_blocks, self._index.forget)
        self.num_blocks = num_blocks

    @property
    def num_free(self) -> int:
        """Free blocks."""
        return self._pool.num_free

    @property
    def num_cached(self) -> int:
        """Blocks that nobody holds and a prefix hit may bring back."""
        return self._pool.num_cached

    @property
    def num_available(self) -> int:
        """Blocks that can be allocated now."""
        return self._pool.num_available

    def blocks_needed(self, num_tokens: int, step_tokens: int) -> int:
        """Return the most blocks that a request of ``num_tokens`` ever holds at once.

        ``step_tokens`` are the most tokens that may be planned and not yet committed.
        """
        return BlockNeeds(self.groups, self.block_tokens, step_tokens).of_request(num_tokens)

    def match_prefix(self, token_ids: Sequence[int], salt: str) -> Hit:
        """Return the longest usable run of whole cached blocks; at least one token stays to be computed."""
        links = self._index.find(salt, token_ids, (len(token_ids) - 1) // self.block_tokens)
        count = self._usable(links)
        return Hit(links[:count], count * self.block_tokens)

    def _usable(self, links: list[Link]) -> int:
        """Return the most leading links that have every block which a query after them sees."""
        usable = 0
        ends = [0] * len(self.groups)  # After the last link without a block, per group.
        for at, link in enumerate(links, 1):
            for group, block in enumerate(link.blocks):
                if block is None:
                    ends[group] = at
            position = at * self.block_tokens
            if all(end <= self._first_seen(group, position) for group, end in enumerate(ends)):
                usable = at
        return usable

    def _first_seen(self, group: int, num_computed: int) -> int:
        """Return the first block that a query at position ``num_computed`` or later can see."""
        return self.groups[group].first_seen(num_computed) // self.block_tokens

    def _next_event(self, num_linked: int, num_computed: int) -> int:
        """Return the computed tokens at which a block is whole, or a local group lets one go."""
        size = self.block_tokens
        events = [(num_linked + 1) * size]
        for at in self._locals:
            group = self.groups[at]
            if group.kind == "chunked":
                events.append(group.first_seen(num_computed) + group.window)
            else:
                events.append((self._first_seen(at, num_computed) + 1) * size + group.window - 1)
        return min(events)

    def open_empty(self, salt: str) -> Holding:
        """Return a holding without blocks."""
        return self.open(Hit([], 0), salt)

    def open(self, hit: Hit, salt: str) -> Holding:
        """Return a holding that begins with a hit's blocks."""
        holding = Holding(salt, len(self.groups))
        for group, table in enumerate(holding.tables):
            first = self._first_seen(group, hit.num_tokens)
            for at, link in enumerate(hit.links):
                block = link.blocks[group]
                if at < first:
                    # Never read; any id will do, and a real one keeps tables free of special values.
                    table.append(block if block is not None else 0)
                    continue
                assert block is not None, "a hit is taken before anything else changes the pool"
                self._pool.hold(block)
                table.append(block)
            holding.num_let_go[group] = first
        holding.num_linked = len(hit.links)
        holding.parent = hit.links[-1] if hit.links else None
        holding.capacity = hit.num_tokens
        holding.next_event = self._next_event(holding.num_linked, hit.num_tokens)
        return holding

    def num_held(self, holding: Holding) -> int:
        """Return the blocks of a holding that are not placeholders."""
        return sum(len(table) for table in holding.tables) - sum(holding.num_let_go)

    def allocate(self, holding: Holding, num_tokens: int) -> tuple[list[int], ...] | None:
        """Make room for ``num_tokens`` in all; return the new ids per group, or None and change nothing."""
        wanted = -(-num_tokens // self.block_tokens)
        missing = [wanted - len(table) for table in holding.tables]
        taken = self._pool.take(sum(missing))
        if taken is None:
            return None
        new: list[list[int]] = []
        at = 0
        for table, count in zip(holding.tables, missing, strict=True):
            ids = taken[at : at + count]
            table += ids
            new.append(ids)
            at += count
        holding.capacity = wanted * self.block_tokens
        return tuple(new)

    def note_computed(self, holding: Holding, token_ids: Sequence[int], num_computed: int) -> None:
        """Offer whole blocks for reuse and give back what no later query sees.

        ``num_computed`` tokens are computed by committed steps; ``token_ids`` are at least those.
        """
        size = self.block_tokens
        while (holding.num_linked + 1) * size <= num_computed:
            at = holding.num_linked
            link = self._index.link(holding.salt, holding.parent, token_ids[at * size : (at + 1) * size])
            for group, table in enumerate(holding.tables):
                if at >= holding.num_let_go[group] and self._index.offer(link, group, table[at]):
                    self._pool.mark_findable(table[at])
            holding.num_linked += 1
            holding.parent = link
        holding.next_event = self._next_event(holding.num_linked, num_computed)
        for group in self._locals:
            first = min(self._first_seen(group, num_computed), len(holding.tables[group]))
            self._pool.give_back(holding.tables[group][holding.num_let_go[group] : first])
            holding.num_let_go[group] = max(first, holding.num_let_go[group])

    def release(self, holding: Holding) -> None:
        """Give everything back. The end of a chain is forgotten before its beginning."""
        for group, table in enumerate(holding.tables):
            self._pool.give_back(reversed(table[holding.num_let_go[group] :]))
            table.clear()
            holding.num_let_go[group] = 0
        holding.capacity = 0

    def clear(self) -> None:
        """Start over with an empty pool: nothing that was held or cached is there any more."""
        self._index = PrefixIndex(self.block_tokens, len(self.groups))
        self._pool = BlockPool(self.num_blocks, self._index.forget)

    def check(self, holdings: Iterable[Holding]) -> None:
        """Walk pool and holdings; ``PoolError`` where a block's holders are not those who hold it.

        And where one block is held for two layer groups: its page would be both groups' at once.
        """
        self._pool.check()
        holders = [0] * self.num_blocks
        held_for: dict[int, int] = {}
        for holding in holdings:
            for group, table in enumerate(holding.tables):
                for block in table[holding.num_let_go[group] :]:
                    holders[block] += 1
                    if held_for.setdefault(block, group) != group:
                        raise PoolError(
                            f"block {block} is held for {self.groups[group].name} and for "
                            f"{self.groups[held_for[block]].name}"
                        )
        for block, count in enumerate(holders):
            if self._pool.holders(block) != count:
                raise PoolError(f"block {block} has {self._pool.holders(block)} holders, {count} hold it")

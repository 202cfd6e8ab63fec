"""The pool: equally sized blocks, each free, used or cached. Who asks for them is not its business.

A used block has holders. A block that is given back by its last holder becomes free, or cached where it
was marked as findable: its content may be wanted again, and it is taken only when nothing is free,
least recently given back first. Free + used + cached are always all blocks.

Many blocks taken at once are neighbours where that can be, in ascending order: a device reads a run of the
cache faster than scattered pages. So they come from what nobody has had yet, and few from what came back.
"""

from collections.abc import Callable, Iterable

from protocol.errors import TandemError

_MANY = 8
"""Blocks of one call from which on it matters that they are neighbours."""


class PoolError(TandemError):
    """A block was given back that is not held, or the pool does not add up: a bug, not an input."""

    code = "kv_pool"


class BlockPool:
    """Owner of the state of every block."""

    def __init__(self, num_blocks: int, on_evict: Callable[[int], None]) -> None:
        """``on_evict`` is told of a cached block whose content is about to be lost."""
        self.num_blocks = num_blocks
        self._on_evict = on_evict
        self._holders = [0] * num_blocks
        self._is_findable = bytearray(num_blocks)
        self._fresh = 0
        """The first block that nobody has had; those after it are fresh too."""
        self._returned: list[int] = []
        """Free blocks that somebody has had."""
        self._cached: dict[int, None] = {}

    @property
    def num_free(self) -> int:
        """Blocks without content that anybody could want."""
        return self.num_blocks - self._fresh + len(self._returned)

    @property
    def num_cached(self) -> int:
        """Blocks that nobody holds and whose content can be found."""
        return len(self._cached)

    @property
    def num_available(self) -> int:
        """Blocks that ``take`` can give."""
        return self.num_free + len(self._cached)

    def take(self, count: int) -> list[int] | None:
        """Return ``count`` blocks, one holder each; None, and nothing changed, where there are fewer."""
        if count > self.num_available:
            return None
        fresh, rest = self.num_blocks - self._fresh, max(count - len(self._returned), 0)
        fresh = count if _MANY <= count <= fresh else min(fresh, rest)
        taken = [self._returned.pop() for _ in range(min(count - fresh, len(self._returned)))]
        taken += [self._evict() for _ in range(count - fresh - len(taken))]
        taken.sort()
        taken += range(self._fresh, self._fresh + fresh)
        self._fresh += fresh
        for block in taken:
            self._holders[block] = 1
        return taken

    def _evict(self) -> int:
        """Return the cached block that was given back longest ago."""
        block = next(iter(self._cached))
        del self._cached[block]
        self._is_findable[block] = False
        self._on_evict(block)
        return block

    def hold(self, block: int) -> None:
        """Add a holder to a used or cached block."""
        if self._holders[block] == 0:
            if block not in self._cached:
                raise PoolError(f"block {block} is free: there is nothing in it to hold")
            del self._cached[block]
        self._holders[block] += 1

    def mark_findable(self, block: int) -> None:
        """Keep a used block's content when its last holder has gone."""
        if self._holders[block] == 0:
            raise PoolError(f"block {block} is not held: its content belongs to nobody")
        self._is_findable[block] = True

    def give_back(self, blocks: Iterable[int]) -> None:
        """Take one holder from each; of several cached, the last given back is evicted last.

        Errors: ``PoolError`` for a block that is not held, before anything else of it changes.
        """
        for block in blocks:
            if not 0 <= block < self.num_blocks or self._holders[block] == 0:
                raise PoolError(f"block {block} is given back and not held")
            self._holders[block] -= 1
            if self._holders[block] == 0:
                if self._is_findable[block]:
                    self._cached[block] = None
                else:
                    self._returned.append(block)

    def holders(self, block: int) -> int:
        """Return how many hold a block."""
        return self._holders[block]

    def check(self) -> None:
        """Walk the pool; ``PoolError`` where it does not add up."""
        used = sum(1 for holders in self._holders if holders)
        free, cached = {*self._returned, *range(self._fresh, self.num_blocks)}, set(self._cached)
        if len(free) != self.num_free or len(free) + used + len(cached) != self.num_blocks or free & cached:
            raise PoolError(
                f"{self.num_free} free + {used} used + {len(cached)} cached blocks are not "
                f"{self.num_blocks}"
            )
        for block in range(self.num_blocks):
            held = self._holders[block] > 0
            if held == (block in free or block in cached) or self._holders[block] < 0:
                raise PoolError(f"block {block} has {self._holders[block]} holders and is listed as unused")
            if block in free and self._is_findable[block]:
                raise PoolError(f"block {block} is free and findable")

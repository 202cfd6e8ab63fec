"""The prefix index: which blocks hold the KV of which tokens, found again by content.

Blocks form chains. A link is found by its parent and its own tokens, which are compared in full: a
hash can only make the search slow, never wrong. Parents are numbered once and never again, so a chain
that lost a link cannot be continued by accident. A chain starts at its tenant's salt.
"""

from collections.abc import Sequence


class Link:
    """One block's worth of tokens in a chain, and the block of each layer group that holds their KV."""

    __slots__ = ("blocks", "key", "number")

    def __init__(self, key: tuple[int | str, tuple[int, ...]], number: int, num_groups: int) -> None:
        self.key = key
        self.number = number
        self.blocks: list[int | None] = [None] * num_groups


class PrefixIndex:
    """Owner of all links. A link lives as long as any group has a block for it."""

    def __init__(self, block_tokens: int, num_groups: int) -> None:
        self._block_tokens = block_tokens
        self._num_groups = num_groups
        self._links: dict[tuple[int | str, tuple[int, ...]], Link] = {}
        self._of_block: dict[int, tuple[Link, int]] = {}
        self._num_made = 0

    def __len__(self) -> int:
        """Blocks that can be found."""
        return len(self._of_block)

    def find(self, salt: str, token_ids: Sequence[int], most: int) -> list[Link]:
        """Return the longest chain, at most ``most`` links, that starts as ``token_ids`` do."""
        size = self._block_tokens
        parent: int | str = salt
        found: list[Link] = []
        for first in range(0, most * size, size):
            link = self._links.get((parent, tuple(token_ids[first : first + size])))
            if link is None:
                break
            found.append(link)
            parent = link.number
        return found

    def link(self, salt: str, parent: Link | None, tokens: Sequence[int]) -> Link:
        """Return the link of ``tokens`` after ``parent``; a new one is found once it has a block."""
        key = (salt if parent is None else parent.number, tuple(tokens))
        link = self._links.get(key)
        if link is None:
            self._num_made += 1
            link = Link(key, self._num_made, self._num_groups)
        return link

    def offer(self, link: Link, group: int, block: int) -> bool:
        """Make ``block`` the one that is found for a link; False where another is already."""
        if link.blocks[group] is not None:
            return False
        link.blocks[group] = block
        self._links[link.key] = link
        self._of_block[block] = (link, group)
        return True

    def forget(self, block: int) -> None:
        """Drop a block whose content is lost."""
        link, group = self._of_block.pop(block)
        link.blocks[group] = None
        if all(held is None for held in link.blocks):
            self._links.pop(link.key, None)

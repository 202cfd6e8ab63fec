"""Requests of models with global and local layers: what their layer groups hold of one pool."""

import random

import pytest

from kv.manager import Holding, KVManager
from kv.pool import PoolError
from models.blocks import BlockNeeds
from models.spec import KVGroup

CHUNK = 8192


def groups_of(*kinds: tuple[str, int]) -> tuple[KVGroup, ...]:
    return tuple(
        KVGroup(f"{kind} {at}", (at,), 1, 64, 64, "bfloat16", kind=kind, window=window)  # type: ignore[arg-type]
        for at, (kind, window) in enumerate(kinds)
    )


SCOUT = groups_of(*[("chunked", CHUNK)] * 3, ("full", 0))
"""Llama 4 Scout's: each of 12 layers."""


def held_in(holding: Holding, group: int) -> int:
    return len(holding.tables[group]) - holding.num_let_go[group]


SIZES = [pytest.param(16, marks=pytest.mark.long), 128]


@pytest.mark.parametrize("step", [2048, 3000])
@pytest.mark.parametrize("size", SIZES)
def test_a_request_of_a_million_tokens_holds_a_chunk_in_its_local_layers(step: int, size: int) -> None:
    length, in_flight = 1 << 20, 2
    needs = BlockNeeds(SCOUT, size, step * in_flight)
    most_local = -(-(CHUNK + step * in_flight) // size) + 1
    assert needs.of_request(length) == length // size + 3 * most_local
    kv = KVManager(needs.of_request(length), size, SCOUT)
    tokens = [at * 7919 % 32003 for at in range(length)]
    holding = kv.open(kv.match_prefix(tokens, ""), "")
    planned, peak = 0, [0] * len(SCOUT)
    while planned < length:
        planned = min(planned + step, length)
        assert kv.allocate(holding, planned) is not None
        peak = [max(most, held_in(holding, at)) for at, most in enumerate(peak)]
        committed = planned - step * (in_flight - 1)
        if committed >= max(holding.next_event, 1):
            kv.note_computed(holding, tokens, committed)
    assert peak[3] == length // size
    assert CHUNK // size < max(peak[:3]) <= most_local
    kv.note_computed(holding, tokens, length)
    # A chunk begins at the request's end: the next token sees nothing before itself there.
    assert [held_in(holding, at) for at in range(4)] == [0, 0, 0, length // size]
    kv.check([holding])
    # The global layers keep a prefix of any length findable; the local ones, its last chunk.
    kv.release(holding)
    again = kv.match_prefix(tokens, "")
    assert again.num_tokens == length - size
    kv.check([])


def test_a_hit_needs_the_current_chunk_of_local_layers_alone() -> None:
    groups = groups_of(("chunked", 64), ("full", 0))
    kv = KVManager(100, 16, groups)
    tokens = list(range(200))
    first = kv.open(kv.match_prefix(tokens, ""), "")
    assert kv.allocate(first, 200) is not None
    kv.note_computed(first, tokens, 200)
    kv.release(first)
    # Somebody takes all but the blocks that were given back last.
    other = kv.open_empty("other")
    num_cached = kv.num_cached
    assert kv.allocate(other, (kv.num_available - 13) // 2 * 16) is not None
    assert 0 < kv.num_cached < num_cached
    hit = kv.match_prefix(tokens, "")
    holding = kv.open(hit, "")
    assert hit.num_tokens == 192
    # 192 is a border: of the local layers nothing is needed, all of the global ones is held.
    assert (held_in(holding, 0), held_in(holding, 1)) == (0, 12)
    kv.check([other, holding])
    kv.release(holding)
    kv.release(other)
    inside = kv.match_prefix(tokens[:180], "")
    assert inside.num_tokens in (128, 176)
    kv.check([])


def test_links_that_any_query_after_them_can_use_are_those_of_a_search_by_hand() -> None:
    for seed in range(200):
        draw = random.Random(seed)
        kinds = [
            draw.choice(
                [("full", 0), ("chunked", draw.randrange(1, 20)), ("sliding", draw.randrange(1, 20))]
            )
        ]
        groups = groups_of(*kinds, ("chunked", 10))
        kv = KVManager(60, 4, groups)
        tokens = [draw.randrange(3) for _ in range(60)]
        first = kv.open_empty("")
        for end in range(7, 61, draw.randrange(3, 9)):
            assert kv.allocate(first, end) is not None
            kv.note_computed(first, tokens, end)
        kv.release(first)
        other = kv.open_empty("other")
        kv.allocate(other, draw.randrange(kv.num_available // 2) * 4)
        links = kv._index.find("", tokens, 14)
        usable = [
            count
            for count in range(len(links) + 1)
            if all(
                link.blocks[at] is not None
                for at, group in enumerate(groups)
                for link in links[group.first_seen(count * 4) // 4 : count]
            )
        ]
        assert kv.match_prefix(tokens, "").num_tokens == usable[-1] * 4


def test_a_block_that_two_groups_hold_is_found() -> None:
    groups = groups_of(("full", 0), ("full", 0))
    kv = KVManager(8, 4, groups)
    holding = kv.open_empty("")
    assert kv.allocate(holding, 8) is not None
    kv.check([holding])
    kv._pool.give_back([holding.tables[1][0]])
    holding.tables[1][0] = holding.tables[0][0]
    kv._pool.hold(holding.tables[0][0])
    with pytest.raises(PoolError, match="is held for full 1 and for full 0"):
        kv.check([holding])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("groups", [SCOUT, groups_of(("full", 0))])
def test_pages_are_full_of_tokens(
    size: int, groups: tuple[KVGroup, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    """Log-normal lengths (median 4,096, sigma 1, 64 to 131,072), at any moment of their later half."""
    draw = random.Random(1)
    lengths = [min(max(int(draw.lognormvariate(8.318, 1)), 64), 1 << 17) for _ in range(400)]
    assert sum(lengths) / len(lengths) >= 4096
    kv = KVManager(1 << 22, size, groups)
    held = slots = 0
    holdings = []
    for number, length in enumerate(lengths):
        holding = kv.open_empty(str(number))
        holdings.append(holding)
        now = draw.randrange(length // 2, length) + 1
        assert kv.allocate(holding, now) is not None
        kv.note_computed(holding, range(now), now)
        # What the next token, at position ``now``, can see.
        held += sum(now - group.first_seen(now) for group in groups)
        slots += kv.num_held(holding) * size
    kv.check(holdings)
    with capsys.disabled():
        print(f"\npages of {size} tokens, {len(groups)} groups: {held / slots:.2%} of slots hold tokens")
    assert held / slots >= 0.97

"""The pool: what it gives, in which order, and that it adds up whatever is asked."""

import random

import pytest

from kv.pool import BlockPool, PoolError


def is_run(blocks: list[int]) -> bool:
    return blocks == list(range(blocks[0], blocks[0] + len(blocks)))


def test_many_blocks_are_neighbours_though_scattered_ones_have_come_back() -> None:
    pool = BlockPool(400, lambda _block: None)
    some = pool.take(40)
    assert some is not None
    random.Random(0).shuffle(some)
    pool.give_back(some)
    first, one, second = pool.take(100), pool.take(1), pool.take(110)
    assert first is not None
    assert one is not None
    assert second is not None
    assert is_run(first + second), "few blocks come from what was given back, and leave no gap"
    assert one[0] in some
    pool.check()


def test_what_is_evicted_together_is_a_run_again() -> None:
    evicted: list[int] = []
    pool = BlockPool(64, evicted.append)
    first = pool.take(32)
    assert first is not None
    assert pool.take(32) is not None
    for block in first:
        pool.mark_findable(block)
    pool.give_back(reversed(first))
    again = pool.take(32)
    assert again == first
    assert evicted == first[::-1]
    assert pool.take(1) is None
    pool.check()


@pytest.mark.parametrize("seed", range(20))
def test_any_history_adds_up(seed: int) -> None:
    draw, cached = random.Random(seed), set[int]()
    pool = BlockPool(60, cached.discard)
    held: list[list[int]] = []
    for _ in range(300):
        available = pool.num_available
        count = draw.choice((0, 1, 2, 7, 8, 9, 20, 61))
        taken = pool.take(count)
        assert (taken is None) == (count > available)
        if taken is not None:
            assert len(set(taken)) == count
            assert cached.isdisjoint(taken)
            assert pool.num_available == available - count
            held.append(taken)
        while held and draw.random() < 0.6:
            back = held.pop(draw.randrange(len(held)))
            for block in back:
                if draw.random() < 0.3:
                    pool.mark_findable(block)
                    cached.add(block)
            pool.give_back(back)
        assert pool.num_cached == len(cached)
        assert pool.num_free == 60 - len(cached) - sum(map(len, held))
        pool.check()
    with pytest.raises(PoolError):
        pool.give_back([60])

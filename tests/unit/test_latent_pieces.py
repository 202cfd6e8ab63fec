"""How cached latents are cut into pieces: every token once, in order, no gaps between a piece's rows."""

from hypothesis import given
from hypothesis import strategies as st

from worker.backends.cuda.latent_pieces import cached_pieces


@given(st.lists(st.integers(0, 40), max_size=12), st.integers(1, 30))
def test_pieces_hold_every_cached_token_once(cached: list[int], most: int) -> None:
    seen: list[list[int]] = [[] for _ in cached]
    pieces = cached_pieces(cached, most)
    for piece in pieces:
        assert piece.starts[0] == 0
        assert 0 < piece.starts[-1] <= most
        for row in range(piece.rows):
            count = piece.starts[row + 1] - piece.starts[row]
            assert count > 0
            first = piece.firsts[row]
            seen[piece.first_row + row] += range(first, first + count)
    assert seen == [list(range(tokens)) for tokens in cached]
    # No more pieces than runs of rows that have something, and full ones.
    runs = sum(1 for row, n in enumerate(cached) if n and (row == 0 or not cached[row - 1]))
    assert len(pieces) <= runs + sum(cached) // most

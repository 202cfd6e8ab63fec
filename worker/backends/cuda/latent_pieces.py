"""Which cached tokens are expanded together, decided on the host."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class CachedPiece:
    """Which cached tokens are expanded together: of neighbouring rows, by their numbers."""

    first_row: int
    starts: list[int]
    """Of each row's tokens within the piece, and their end."""
    firsts: list[int]
    """The first of these tokens' positions, of each row."""

    @property
    def rows(self) -> int:
        """How many rows it has tokens of."""
        return len(self.firsts)


def cached_pieces(cached: list[int], most: int) -> list[CachedPiece]:
    """Cut the rows' cached tokens, so many of each, into pieces of at most ``most``.

    A piece has neighbouring rows alone, and at least a token of each.
    """
    pieces: list[CachedPiece] = []
    piece: CachedPiece | None = None
    for row, tokens in enumerate(cached):
        if not tokens:
            piece = None
        first = 0
        while first < tokens:
            if piece is None or piece.starts[-1] == most:
                piece = CachedPiece(row, [0], [])
                pieces.append(piece)
            count = min(tokens - first, most - piece.starts[-1])
            piece.starts.append(piece.starts[-1] + count)
            piece.firsts.append(first)
            first += count
    return pieces

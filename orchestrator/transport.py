"""The control socket: typed messages to and from the ranks of one epoch."""

from collections.abc import Callable

from orchestrator.router import Router, Sent
from protocol.control import FromWorker, ToWorker, from_worker_codec, rank_identity, to_worker_codec
from protocol.errors import InvalidRequestError, ProtocolError
from protocol.framing import MAX_CONTROL_FRAME_BYTES


class UnreachableRankError(Exception):
    """A message cannot be handed to a rank: it is gone, or takes nothing in."""

    def __init__(self, rank: int, *, is_gone: bool) -> None:
        why = "its connection is gone" if is_gone else "it takes nothing in: its queue is full"
        super().__init__(f"no message reaches rank {rank}: {why}")
        self.rank = rank


class Transport:
    """Owns the control socket, to which each rank has two connections (``rank_identity``).

    ``on_message(rank, message)`` gets what ranks say, Hello first and the rest in the order of each;
    ``on_nonsense(rank, why)`` is told of a frame that is no message. Peers that are no rank are not heard.
    """

    def __init__(
        self,
        address: str,
        world_size: int,
        on_message: Callable[[int, FromWorker], None],
        on_nonsense: Callable[[int, str], None],
    ) -> None:
        self._identities = [rank_identity(rank) for rank in range(world_size)]
        self._ranks = {
            rank_identity(rank, is_answering=is_answering): rank
            for rank in range(world_size)
            for is_answering in (False, True)
        }
        self._on_message, self._on_nonsense = on_message, on_nonsense
        self._encode = to_worker_codec().encode
        self._decode = from_worker_codec().decode
        self._router = Router(address, self._on_frame, max_bytes=MAX_CONTROL_FRAME_BYTES)

    def send(self, rank: int, message: ToWorker) -> None:
        """Send to one rank; ``UnreachableRankError`` where that is impossible now."""
        self._send(rank, self._encode(message))

    def send_all(self, message: ToWorker) -> None:
        """Send the same bytes, encoded once, to all; ``UnreachableRankError`` at the first failure."""
        frame = self._encode(message)
        for rank in range(len(self._identities)):
            self._send(rank, frame)

    def close(self) -> None:
        """Close the socket."""
        self._router.close()

    def _send(self, rank: int, frame: bytes) -> None:
        sent = self._router.send(self._identities[rank], frame)
        if sent is not Sent.YES:
            raise UnreachableRankError(rank, is_gone=sent is Sent.GONE)

    def _on_frame(self, peer: bytes, frame: bytes) -> None:
        rank = self._ranks.get(peer)
        if rank is None:
            return
        try:
            message = self._decode(frame)
        except (InvalidRequestError, ProtocolError) as error:
            self._on_nonsense(rank, error.message)
        else:
            self._on_message(rank, message)

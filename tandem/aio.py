"""``AsyncClient``: talk to a running server from asyncio."""

import asyncio
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, Unpack

from protocol.client import (
    KEEP_ALIVE_S,
    Cancelled,
    Delta,
    Failed,
    Finished,
    Info,
    PromptScores,
    Started,
    Stats,
)
from protocol.errors import TandemError, UnavailableError, from_info
from tandem.connection import ANSWER_LIMIT_S, Connection, Inbox
from tandem.discovery import find_instance
from tandem.results import Chunk, Collector, Messages, Parameters, Result, generate_message

CLIENT_CLOSED = "this client is closed"


class AsyncStream:
    """An answer while it is made: iterate it for ``Chunk``; ``result`` is there at the end.

    Leaving it early (``aclose``, its context manager, a cancelled task, dropping it) cancels the request.
    Owned by one task at a time.
    """

    def __init__(self, client: "AsyncClient", message: dict[str, Any]) -> None:
        self._client = client
        self._message = message
        self._connection: Connection | None = None
        self._inbox: Inbox | None = None
        self._collector = Collector()
        self._chunks: deque[Chunk] = deque()
        self._error: TandemError | None = None
        """What ended the stream, until what came before it is taken."""
        self._is_closed = False

    @property
    def result(self) -> Result | None:
        """The whole result, once the stream has ended by itself; else None."""
        return self._collector.result()

    @property
    def prompt_ids(self) -> list[int] | None:
        """The prompt's tokens, once the server has admitted the request."""
        started = self._collector.started
        return None if started is None else started.prompt_ids

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Chunk:
        if not self._chunks:
            self._chunks.extend(await self.next_chunks())
            if not self._chunks:
                raise StopAsyncIteration
        return self._chunks.popleft()

    async def next_chunks(self) -> list[Chunk]:
        """Wait for chunks and return all that have arrived; empty at the end.

        Errors: the request's own; ``UnavailableError``, ``InstanceFailedError`` where the server is lost.
        """
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        while not self._is_closed:
            inbox = self._inbox or await self._start()
            try:
                events = await inbox.take()
            except asyncio.CancelledError:
                await self.aclose()
                raise
            chunks = self._chunks_of(events)
            if chunks:
                return chunks
        return []

    def _chunks_of(self, events: Sequence[object]) -> list[Chunk]:
        chunks: list[Chunk] = []
        for event in events:
            try:
                chunk = self._take(event)
            except TandemError as error:
                if not chunks:
                    raise
                # What came before it is given out first: tokens that were sent are not lost.
                self._error = error
                break
            if chunk is not None:
                chunks.append(chunk)
        return chunks

    async def _start(self) -> Inbox:
        self._connection = await self._client.connection()
        self._inbox = self._connection.ask(self._message)
        return self._inbox

    def _take(self, event: object) -> Chunk | None:
        match event:
            case Started() | Delta() | PromptScores():
                return self._collector.take(event)
            case Finished():
                self._is_closed = True
                return self._collector.take(event)
            case Failed(error=error):
                self._is_closed = True
                raise from_info(error)
            case Cancelled():
                self._is_closed = True
                raise UnavailableError(
                    "the server gave this request up: it is stopping, or had heard nothing from this "
                    "client for a while"
                )
        raise TandemError(f"the server sent {type(event).__name__} to a stream")

    async def aclose(self) -> None:
        """Cancel the request, unless it has ended; chunks not yet taken are dropped."""
        self._is_closed = True
        self._error = None
        self._chunks.clear()
        self._cancel()

    def _cancel(self) -> None:
        if self._connection is not None and self._inbox is not None:
            self._connection.cancel(self._inbox)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    def __del__(self) -> None:
        connection, inbox = self._connection, self._inbox
        if connection is None or inbox is None or not inbox.is_open or connection.loop.is_closed():
            return
        # The collector runs in any thread.
        connection.loop.call_soon_threadsafe(connection.cancel, inbox)


class AsyncClient:
    """A client of one server: ``name`` finds it among this user's, the only one by default.

    ``address`` goes there instead (``ipc://…``). Connects when first used, and again after a loss.
    Used on one event loop at a time; the owner of its connection.
    """

    def __init__(
        self,
        name: str | None = None,
        *,
        address: str | None = None,
        runtime_directory: Path | None = None,
        connect_timeout_s: float = 5.0,
        keep_alive_s: float = KEEP_ALIVE_S,
        answer_limit_s: float = ANSWER_LIMIT_S,
    ) -> None:
        self._name = name
        self._address = address
        self._runtime_directory = runtime_directory
        self._connect_timeout_s = connect_timeout_s
        self._keep_alive_s = keep_alive_s
        self._answer_limit_s = answer_limit_s
        self._connection: Connection | None = None
        self._connecting: asyncio.Task[Connection] | None = None
        self._is_closed = False

    def stream(
        self,
        prompt: str | None = None,
        *,
        prompt_ids: Sequence[int] | None = None,
        **parameters: Unpack[Parameters],
    ) -> AsyncStream:
        """Return the answer to a raw prompt as a stream; it is asked for when first read."""
        return AsyncStream(self, generate_message(prompt, prompt_ids, None, parameters))

    def stream_chat(self, messages: Messages, **parameters: Unpack[Parameters]) -> AsyncStream:
        """Return the answer to a conversation, in the model's chat template, as a stream."""
        return AsyncStream(self, generate_message(None, None, messages, parameters))

    async def generate(
        self,
        prompt: str | None = None,
        *,
        prompt_ids: Sequence[int] | None = None,
        **parameters: Unpack[Parameters],
    ) -> Result:
        """Return the whole answer to a raw prompt, given as text or as token ids.

        Errors: ``InvalidRequestError`` naming the field, and the others of ``tandem.errors``.
        """
        return await _whole(self.stream(prompt, prompt_ids=prompt_ids, **parameters))

    async def chat(self, messages: Messages, **parameters: Unpack[Parameters]) -> Result:
        """Return the whole answer to a conversation: ``[{"role": "user", "content": "Hello"}]``."""
        return await _whole(self.stream_chat(messages, **parameters))

    async def stats(self) -> Stats:
        """Return the running server in numbers."""
        found = await self._ask("get_stats")
        assert isinstance(found, Stats)
        return found

    async def info(self) -> Info:
        """Return what is served, and how."""
        found = await self._ask("get_info")
        assert isinstance(found, Info)
        return found

    async def _ask(self, what: str) -> object:
        connection = await self.connection()
        inbox = connection.ask({"type": what})
        try:
            (event,) = await asyncio.wait_for(inbox.take(), self._answer_limit_s)
        except TimeoutError:
            raise UnavailableError(f"the server did not answer in {self._answer_limit_s:g} s") from None
        if isinstance(event, Failed):
            raise from_info(event.error)
        return event

    async def connection(self) -> Connection:
        """Return the open connection, made where there is none.

        Errors: ``NotFoundError`` where no such server runs, ``UnavailableError`` for one out of reach.
        """
        if self._is_closed:
            raise UnavailableError(CLIENT_CLOSED)
        loop = asyncio.get_running_loop()
        if self._connection is not None:
            if self._connection.loop is not loop:
                self._connection.close(UnavailableError("this client is used on another event loop now"))
            if self._connection.error is None:
                return self._connection
        if self._connecting is None or self._connecting.get_loop() is not loop:
            self._connecting = loop.create_task(self._connect())
            self._connecting.add_done_callback(self._connect_done)
        # Several tasks may wait for one connection; none of them may cancel it for the others.
        return await asyncio.shield(self._connecting)

    async def _connect(self) -> Connection:
        address = self._address or find_instance(self._name, self._runtime_directory).address
        connection = Connection(
            address, keep_alive_s=self._keep_alive_s, answer_limit_s=self._answer_limit_s
        )
        try:
            await connection.open(self._connect_timeout_s)
        except BaseException:
            connection.close(UnavailableError(CLIENT_CLOSED))
            raise
        self._connection = connection
        return connection

    def _connect_done(self, task: asyncio.Task[Connection]) -> None:
        if self._connecting is task:
            self._connecting = None
        if not task.cancelled():
            task.exception()  # Seen: whoever asked may be gone.

    async def aclose(self) -> None:
        """Close the connection; what is open is cancelled and ends with ``UnavailableError``."""
        self._is_closed = True
        if self._connecting is not None:
            self._connecting.cancel()
            await asyncio.wait([self._connecting])
        if self._connection is not None:
            self._connection.leave(UnavailableError(CLIENT_CLOSED))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()


async def _whole(stream: AsyncStream) -> Result:
    async with stream:
        while await stream.next_chunks():
            pass
        result = stream.result
    if result is None:
        raise TandemError("the stream ended without a result")
    return result

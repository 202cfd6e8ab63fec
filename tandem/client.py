"""``Client``: the same as ``AsyncClient`` for programs without an event loop. Safe in many threads."""

import asyncio
import threading
import weakref
from collections import deque
from collections.abc import Coroutine, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self, TypeVar, Unpack

from protocol.client import KEEP_ALIVE_S, Info, Stats
from protocol.errors import UnavailableError
from tandem.aio import CLIENT_CLOSED, AsyncClient, AsyncStream
from tandem.connection import ANSWER_LIMIT_S
from tandem.results import Chunk, Messages, Parameters, Result

T = TypeVar("T")
STOP_LIMIT_S: Final = 2.0


class Stream:
    """An answer while it is made: iterate it for ``Chunk``; ``result`` is there at the end.

    Leaving it early, by ``close``, its context manager, Ctrl-C or dropping it, cancels the request.
    """

    def __init__(self, client: "Client", loop: "_LoopThread", stream: AsyncStream) -> None:
        self._client = client  # Kept: a client that nobody holds ends its loop.
        self._loop = loop
        self._stream = stream
        self._chunks: deque[Chunk] = deque()

    @property
    def result(self) -> Result | None:
        """The whole result, once the stream has ended by itself; else None."""
        return self._stream.result

    @property
    def prompt_ids(self) -> list[int] | None:
        """The prompt's tokens, once the server has admitted the request."""
        return self._stream.prompt_ids

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Chunk:
        if not self._chunks:
            # A Ctrl-C in here cancels the waiting task, and that the request.
            self._chunks.extend(self._loop.run(self._stream.next_chunks()))
            if not self._chunks:
                raise StopIteration
        return self._chunks.popleft()

    def close(self) -> None:
        """Cancel the request, unless it has ended."""
        self._chunks.clear()
        if self._loop.is_alive:
            self._loop.run(self._stream.aclose())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Client:
    """A client of one server: ``name`` finds it among this user's, the only one by default.

    ``address`` goes there instead (``ipc://…``). Owns a thread with the event loop; ``close`` or the end of
    the program ends it.
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
        self._client = AsyncClient(
            name,
            address=address,
            runtime_directory=runtime_directory,
            connect_timeout_s=connect_timeout_s,
            keep_alive_s=keep_alive_s,
            answer_limit_s=answer_limit_s,
        )
        self._loop = _LoopThread()
        self._finalizer = weakref.finalize(self, _stop, self._loop, self._client)

    def stream(
        self,
        prompt: str | None = None,
        *,
        prompt_ids: Sequence[int] | None = None,
        **parameters: Unpack[Parameters],
    ) -> Stream:
        """Return the answer to a raw prompt as a stream; it is asked for when first read."""
        return Stream(self, self._loop, self._client.stream(prompt, prompt_ids=prompt_ids, **parameters))

    def stream_chat(self, messages: Messages, **parameters: Unpack[Parameters]) -> Stream:
        """Return the answer to a conversation, in the model's chat template, as a stream."""
        return Stream(self, self._loop, self._client.stream_chat(messages, **parameters))

    def generate(
        self,
        prompt: str | None = None,
        *,
        prompt_ids: Sequence[int] | None = None,
        **parameters: Unpack[Parameters],
    ) -> Result:
        """Return the whole answer to a raw prompt, given as text or as token ids.

        Errors: ``InvalidRequestError`` naming the field, and the others of ``tandem.errors``.
        """
        return self._loop.run(self._client.generate(prompt, prompt_ids=prompt_ids, **parameters))

    def chat(self, messages: Messages, **parameters: Unpack[Parameters]) -> Result:
        """Return the whole answer to a conversation: ``[{"role": "user", "content": "Hello"}]``."""
        return self._loop.run(self._client.chat(messages, **parameters))

    def stats(self) -> Stats:
        """Return the running server in numbers."""
        return self._loop.run(self._client.stats())

    def info(self) -> Info:
        """Return what is served, and how."""
        return self._loop.run(self._client.info())

    def close(self) -> None:
        """Close the connection and end the thread; open requests are cancelled."""
        self._finalizer()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _LoopThread:
    """A thread that runs an event loop, started when first needed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._is_stopped = False

    @property
    def is_alive(self) -> bool:
        """Whether it runs, and can still be used."""
        return self._loop is not None and not self._is_stopped

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine there and wait for it; an interrupt of the wait cancels it, and is raised."""
        try:
            loop = self._started()
        except UnavailableError:
            work.close()
            raise
        future = asyncio.run_coroutine_threadsafe(work, loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def _started(self) -> asyncio.AbstractEventLoop:
        with self._lock:
            if self._is_stopped:
                raise UnavailableError(CLIENT_CLOSED)
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                self._thread = threading.Thread(
                    target=self._loop.run_forever, name="tandem client", daemon=True
                )
                self._thread.start()
            return self._loop

    def stop(self, last: Coroutine[Any, Any, None]) -> None:
        """Run a last coroutine, and end the thread."""
        with self._lock:
            was_alive, self._is_stopped = self.is_alive, True
        loop, thread = self._loop, self._thread
        if not was_alive or loop is None or thread is None:
            last.close()
            return

        async def finish() -> None:
            await last
            others = asyncio.all_tasks() - {asyncio.current_task()}
            if others:
                # Waiting threads get their errors before the loop ends.
                await asyncio.wait(others, timeout=STOP_LIMIT_S)

        asyncio.run_coroutine_threadsafe(finish(), loop).result(2 * STOP_LIMIT_S)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(STOP_LIMIT_S)
        if not thread.is_alive():
            loop.close()


def _stop(loop: _LoopThread, client: AsyncClient) -> None:
    loop.stop(client.aclose())

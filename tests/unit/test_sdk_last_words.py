"""What a server said before it went away reaches a client that was busy meanwhile."""

import asyncio
import time
from pathlib import Path

import msgspec
import pytest
import zmq

from protocol.client import (
    Delta,
    Event,
    Events,
    Failed,
    Finished,
    Started,
    Timings,
    Usage,
    from_gateway_codec,
)
from protocol.errors import InstanceFailedError
from tandem import AsyncClient, Result

NUM_DELTAS = 50


class LastWords:
    """A server that takes one request, says all it has to say, and is gone."""

    def __init__(self, directory: Path) -> None:
        self.address = f"ipc://{directory / 's'}"
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.bind(self.address)

    def speak(self, last: Finished | Failed) -> None:
        assert self._socket.poll(5000)
        peer, frame = self._socket.recv_multipart()
        stream_id = msgspec.msgpack.decode(frame[1:])["id"]
        said: list[Event] = [Started(stream_id, [1], 0)]
        said += [Delta(stream_id, 0, [7], "x") for _ in range(NUM_DELTAS)]
        said += [Delta(stream_id, 0, [2], "", finish_reason="stop"), last]
        for event in said:
            renamed = msgspec.structs.replace(event, id=stream_id)
            self._socket.send_multipart([peer, from_gateway_codec().encode(Events([renamed]))])
        self._socket.close()
        self._context.term()
        # The client's sockets see the end of the connection before its loop looks at either.
        time.sleep(0.2)


async def hear(directory: Path, last: Finished | Failed) -> Result:
    server = LastWords(directory)
    async with AsyncClient(address=server.address) as client:
        answer = asyncio.create_task(client.generate("hello"))
        await asyncio.sleep(0.1)
        server.speak(last)  # On this loop's own thread: it reads nothing meanwhile.
        return await answer


def test_an_answer_that_was_finished_is_whole(tmp_path: Path) -> None:
    finished = Finished("", Usage(1, 0, NUM_DELTAS + 1), Timings(0.0, 0.0, 0.0))
    result = asyncio.run(hear(tmp_path, finished))
    assert result.token_ids == [7] * NUM_DELTAS + [2]


def test_an_error_is_the_servers_own(tmp_path: Path) -> None:
    failed = Failed("", InstanceFailedError("rank 1 is lost").info())
    with pytest.raises(InstanceFailedError, match="rank 1 is lost"):
        asyncio.run(hear(tmp_path, failed))


def test_tokens_that_come_with_an_error_are_given_out_first(tmp_path: Path) -> None:
    async def run() -> None:
        server = LastWords(tmp_path)
        async with AsyncClient(address=server.address) as client:
            stream = client.stream("hello")

            found: list[int] = []

            async def read() -> None:
                async for chunk in stream:
                    found.extend(chunk.token_ids)

            reading = asyncio.create_task(read())
            await asyncio.sleep(0.1)
            server.speak(Failed("", InstanceFailedError("rank 1 is lost").info()))
            with pytest.raises(InstanceFailedError, match="rank 1 is lost"):
                await reading
            assert found == [7] * NUM_DELTAS + [2]
            assert [chunk async for chunk in stream] == []

    asyncio.run(run())

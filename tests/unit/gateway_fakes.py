"""An engine that makes tokens by a rule, and a gateway around it."""

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import zmq

from orchestrator.connections import GatewayLimits
from orchestrator.gateway import Gateway
from orchestrator.request import End, Request, RequestOutput, RequestState
from orchestrator.text import TextService
from protocol.client import Event, Info, Stats, from_gateway_codec, to_gateway_codec
from protocol.control import TokenLogprobs
from protocol.errors import QueueFullError, TandemError
from protocol.framing import Codec

INFO = Info(
    id="",
    instance="test",
    model="fake",
    architecture="llama",
    state="ready",
    tp=1,
    pp=1,
    dtype="float32",
    context=512,
    vocab_size=400,
    kv_tokens=4096,
    max_rows=64,
    has_tokenizer=True,
    has_chat_template=True,
    memory=[],
)
STATS = Stats("", 0.0, *([0] * 14), 0.0)


def score(token_id: int) -> TokenLogprobs:
    return TokenLogprobs(token_id, -0.5, [token_id, 0], [-0.5, -3.0])


class FakeEngine:
    """Each step gives every request its next token: ``rule(request)``, else the prompt over and over."""

    def __init__(self, rule: Callable[[Request], int] | None = None, tokens_a_step: int = 1) -> None:
        self.rule = rule or (lambda r: r.prompt_ids[r.num_output % len(r.prompt_ids)])
        self.tokens_a_step = tokens_a_step
        self.running: list[Request] = []
        self.seen: list[Request] = []
        self.cancelled: list[Request] = []
        self.refuse_after: int | None = None
        self.error: TandemError | None = None

    def submit(self, request: Request) -> None:
        if self.refuse_after is not None and len(self.running) >= self.refuse_after:
            raise QueueFullError("the queue is full: try again later")
        request.state = RequestState.RUNNING
        request.token_ids = list(request.prompt_ids)
        request.admitted_s = request.arrival_s + 1e-6
        self.running.append(request)
        self.seen.append(request)

    def cancel(self, request: Request) -> None:
        self.cancelled.append(request)
        self._end(request, End.CANCELLED)

    def finish(self, request: Request, end: End) -> None:
        self._end(request, end)

    def _end(self, request: Request, end: End) -> None:
        if request.state is RequestState.RUNNING:
            request.state = RequestState.ENDED
            self.running.remove(request)
            # The real engine reports an end that its sink asked for, too.
            request.sink.deliver([RequestOutput(request, [], end=end)])

    def stats(self) -> Stats:
        return msgspec.structs.replace(STATS, running=len(self.running))

    def step(self) -> None:
        outputs = [self._advance(request) for request in list(self.running)]
        by_sink: dict[int, list[RequestOutput]] = {}
        for output in outputs:
            by_sink.setdefault(id(output.request.sink), []).append(output)
        for found in by_sink.values():
            found[0].request.sink.deliver(found)

    def _advance(self, request: Request) -> RequestOutput:
        wanted = request.sampling
        prompt_logprobs = None
        if wanted.prompt_logprobs is not None and not request.num_output:
            prompt_logprobs = (1, [score(t) for t in request.prompt_ids[1:]])
        token_ids: list[int] = []
        end = None
        while len(token_ids) < self.tokens_a_step and end is None:
            token_ids.append(self.rule(request))
            request.token_ids.append(token_ids[-1])
            if token_ids[-1] in request.stop_token_ids:
                end = End.STOP
            elif request.num_output >= request.max_tokens:
                end = End.LENGTH
        if self.error is not None:
            end = End.FAILED
        if end is not None:
            request.state = RequestState.ENDED
            self.running.remove(request)
        logprobs = None if wanted.logprobs is None else [score(t) for t in token_ids]
        return RequestOutput(
            request, token_ids, logprobs, prompt_logprobs, end, self.error if end is End.FAILED else None
        )


class Server:
    """A gateway with a fake engine that steps for as long as something runs."""

    def __init__(self, gateway: Gateway, engine: FakeEngine, address: str) -> None:
        self.gateway, self.engine, self.address = gateway, engine, address
        self.is_paused = False
        self.step_s = 0.0

    async def run(self) -> None:
        while True:
            if not self.is_paused:
                self.engine.step()
            await asyncio.sleep(self.step_s or (0.0 if self.engine.running else 0.001))

    async def until(self, what: Callable[[], bool], timeout_s: float = 10.0) -> None:
        async with asyncio.timeout(timeout_s):
            while not what():  # noqa: ASYNC110
                await asyncio.sleep(0.002)

    def assert_nothing_left(self) -> None:
        assert self.gateway.num_streams == 0
        assert self.gateway._choices == {}
        assert self.engine.running == []


@asynccontextmanager
async def serving(
    path: Path,
    engine: FakeEngine | None = None,
    *,
    model: Path | None = None,
    info: Info = INFO,
    limits: GatewayLimits | None = None,
) -> AsyncIterator[Server]:
    engine = engine or FakeEngine()
    text = await TextService.start(model or path, prestart=False)
    info = msgspec.structs.replace(
        info, has_tokenizer=text.has_tokenizer, has_chat_template=text.has_chat_template
    )
    address = f"ipc://{path}/gateway.sock"
    gateway = Gateway(address, engine, text, info, limits=limits)
    await gateway.open()
    server = Server(gateway, engine, address)
    task = asyncio.create_task(server.run())
    try:
        yield server
        assert not task.done(), task
    finally:
        task.cancel()
        gateway.close()
        await text.close()


class RawClient:
    """A DEALER that says exactly what it is told."""

    def __init__(self, address: str, **options: int) -> None:
        self.context = zmq.Context()
        self.socket = self.context.socket(zmq.DEALER)
        self.socket.setsockopt(zmq.LINGER, 0)
        for name, value in options.items():
            self.socket.setsockopt(getattr(zmq, name), value)
        self.socket.connect(address)
        self.events: list[Event] = []
        self._codec: Codec[Any] = to_gateway_codec()
        self._decoder = from_gateway_codec()
        self._ids = itertools.count()

    def send(self, message: Any) -> None:
        self.socket.send(message if isinstance(message, bytes) else self._codec.encode(message))

    def ask(self, **fields: Any) -> str:
        stream_id = fields.pop("id", None) or f"s{next(self._ids)}"
        self.send({"type": "generate", "id": stream_id, **fields})
        return stream_id

    def receive(self) -> int:
        """Take what has arrived; return how many frames it was."""
        count = 0
        while True:
            try:
                frame = self.socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                return count
            self.events += self._decoder.decode(frame).events
            count += 1

    def of(self, stream_id: str | None, kind: type[Any] = object) -> list[Any]:
        return [e for e in self.events if e.id == stream_id and isinstance(e, kind)]

    async def until(self, what: Callable[[], Any], timeout_s: float = 10.0) -> Any:
        async with asyncio.timeout(timeout_s):
            while not (self.receive(), what())[1]:  # noqa: ASYNC110
                await asyncio.sleep(0.002)
        return what()

    async def event(self, stream_id: str | None, kind: type[Any]) -> Any:
        found = await self.until(lambda: self.of(stream_id, kind))
        return found[-1]

    def close(self) -> None:
        self.socket.close(0)
        self.context.term()


@asynccontextmanager
async def raw(server: Server, **options: int) -> AsyncIterator[RawClient]:
    client = RawClient(server.address, **options)
    try:
        yield client
    finally:
        client.close()

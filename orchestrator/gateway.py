"""The gateway: where clients' requests become the engine's, and its outputs become their events.

Every stream that was opened ends with exactly one terminal event: finished, cancelled or failed.
"""

import asyncio
import secrets
import time
from collections.abc import Callable
from typing import Protocol

import msgspec

from orchestrator.connections import Connections, GatewayLimits
from orchestrator.intake import Intake, as_tandem_error, check_tools, choice_seed, template_variables
from orchestrator.outbox import split_scores
from orchestrator.request import End, Request, RequestOutput
from orchestrator.router import Router
from orchestrator.streams import Choice, Connection, Stream
from orchestrator.text.service import TextService
from orchestrator.text.stop import StopStrings
from protocol.client import (
    Cancel,
    Cancelled,
    Delta,
    Failed,
    Finished,
    FinishReason,
    Generate,
    GetInfo,
    GetStats,
    Info,
    KeepAlive,
    Started,
    Stats,
    Timings,
    Usage,
)
from protocol.errors import (
    DeadlineExceededError,
    InvalidRequestError,
    QueueFullError,
    SlowReaderError,
    TandemError,
    UnavailableError,
)


class EnginePort(Protocol):
    """What the gateway needs of the engine. Outputs come through ``deliver``, never inside ``submit``."""

    def submit(self, request: Request) -> None:
        """Queue a request, or raise QueueFullError, ContextTooLongError or UnavailableError."""

    def cancel(self, request: Request) -> None:
        """Give a request up; one that has ended is ignored."""

    def finish(self, request: Request, end: End) -> None:
        """End a request at its sink's word; one that has ended is ignored."""

    def stats(self) -> Stats:
        """Return the instance's numbers; ``id`` and ``connections`` are the gateway's to fill in."""


class Gateway:
    """Owns the client socket, all connections and their streams; the sink of their requests."""

    def __init__(
        self,
        address: str,
        engine: EnginePort,
        text: TextService,
        info: Info,
        *,
        end_token_ids: frozenset[int] = frozenset(),
        limits: GatewayLimits | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._address = address
        self._engine = engine
        self._text = text
        self._info = info
        self._end_token_ids = end_token_ids | text.end_token_ids
        self._limits = limits = limits or GatewayLimits()
        self._clock = clock
        self._intake = Intake(info)
        self._connections = Connections(limits, self._end_all, clock)
        self._choices: dict[Request, Choice] = {}
        self._num_requests = 0
        self._is_closing = False

    @property
    def num_streams(self) -> int:
        """Streams that have no terminal event yet."""
        return sum(len(c.streams) for c in self._connections.all())

    @property
    def num_connections(self) -> int:
        """Connections that have streams or untaken events."""
        return len(self._connections)

    async def open(self) -> None:
        """Bind the socket and take messages from now on."""
        self._connections.attach(Router(self._address, self._on_frame))

    def update_info(self, info: Info) -> None:
        """Say something else to ``GetInfo`` from now on (its state, above all)."""
        self._info = info

    def close(self, error: TandemError | None = None) -> None:
        """Fail every open stream, send what can be sent, and close the socket."""
        self._is_closing = True
        reason = error or UnavailableError("the server is stopping")
        for connection in self._connections.all():
            self._end_all(connection, reason)
        self._connections.close()

    # What clients send.

    def _on_frame(self, peer: bytes, frame: memoryview | bytes) -> None:
        try:
            connection = self._connections.hear(peer)
        except QueueFullError as error:
            self._connections.answer(peer, Failed(self._intake.recover_id(frame), error.info()))
            return
        try:
            message = self._intake.decode(frame)
        except Exception as error:
            stream_id = _unless_open(connection, self._intake.recover_id(frame))
            self._connections.push(connection, Failed(stream_id, as_tandem_error(error).info()))
        else:
            self._handle(connection, message)
        self._connections.flush()
        self._connections.forget_if_done(connection)

    def _handle(self, connection: Connection, message: msgspec.Struct) -> None:
        match message:
            case Generate():
                self._generate(connection, message)
            case Cancel():
                stream = connection.streams.get(message.id)
                if stream is not None:
                    self._end(stream, Cancelled(stream.id))
            case KeepAlive():
                pass
            case GetStats():
                stats = self._engine.stats()
                self._connections.push(
                    connection,
                    msgspec.structs.replace(stats, id=message.id, connections=len(self._connections)),
                )
            case GetInfo():
                self._connections.push(connection, msgspec.structs.replace(self._info, id=message.id))

    def _generate(self, connection: Connection, generate: Generate) -> None:
        if generate.id in connection.streams:
            # The open stream must not take this for its own end.
            error = InvalidRequestError(
                f"a stream {generate.id!r} is open on this connection: choose another id", field="id"
            )
            self._connections.push(connection, Failed(None, error.info()))
            return
        stream = Stream(generate.id, connection, generate, self._clock())
        try:
            self._check_room(connection, generate)
            self._intake.check(generate)
            check_tools(generate, self._text)
            token_ids = generate.prompt_ids
            if generate.prompt is not None:
                token_ids = self._text.encode_short(generate.prompt)
                if token_ids is not None:
                    self._intake.check_prompt(token_ids, "prompt")
        except TandemError as error:
            self._connections.push(connection, Failed(generate.id, error.info()))
            return
        connection.streams[stream.id] = stream
        connection.num_choices += generate.n
        self._connections.watch_silence()
        if token_ids is not None:
            self._admit(stream, token_ids)
        else:
            stream.task = asyncio.get_running_loop().create_task(self._tokenise(stream))

    def _check_room(self, connection: Connection, generate: Generate) -> None:
        if self._is_closing:
            raise UnavailableError("the server is stopping")
        limits = self._limits
        if len(connection.streams) >= limits.streams_per_connection:
            raise QueueFullError(
                f"{len(connection.streams)} streams are open on this connection, its limit"
            )
        if connection.num_choices + generate.n > limits.choices_per_connection:
            raise QueueFullError(
                f"n = {generate.n} with {connection.num_choices} answers under way is over the limit of "
                f"{limits.choices_per_connection} a connection",
                field="n",
            )
        if connection.backlog.size_bytes > limits.backlog_bytes:
            raise SlowReaderError("this connection's events are not being read: read them first")

    async def _tokenise(self, stream: Stream) -> None:
        """Turn the stream's text into tokens in a helper, then admit it. Cancelled with its stream."""
        generate, limit = stream.generate, self._info.context - 1
        field = "messages" if generate.messages is not None else "prompt"
        try:
            async with asyncio.timeout(generate.timeout_s):
                if generate.messages is not None:
                    tools = [] if generate.tool_choice == "none" else generate.tools
                    encoded = await self._text.chat(
                        generate.messages, limit, tools, template_variables(generate)
                    )
                    token_ids, stream.is_thinking = encoded.token_ids, encoded.is_thinking
                else:
                    assert generate.prompt is not None
                    token_ids = await self._text.encode(generate.prompt, limit)
            self._intake.check_prompt(token_ids, field)
        except TimeoutError:
            self._fail(stream, _too_late(generate, "tokenised"))
        except Exception as error:
            # Whatever went wrong, the stream must end, and this is the one who can end it.
            self._fail(stream, as_tandem_error(error))
        else:
            if not stream.has_ended:
                self._admit(stream, token_ids)
        finally:
            stream.task = None
        self._connections.flush()
        self._connections.forget_if_done(stream.connection)

    def _admit(self, stream: Stream, token_ids: list[int]) -> None:
        """Make the stream's choices and submit them: all or none."""
        generate = stream.generate
        sampling = generate.sampling
        seed = sampling.seed if sampling.seed is not None else secrets.randbits(63)
        stream.prompt_ids = token_ids
        for index in range(generate.n):
            request = self._request(stream, index, seed)
            try:
                self._engine.submit(request)
            except Exception as error:
                # A refusal, or worse: the stream must end, and the choices before this one with it.
                self._fail(stream, as_tandem_error(error))
                return
            choice = self._choice(stream, index, request)
            stream.open_choices[index] = self._choices[request] = choice
        stream.first_request = stream.open_choices[0].request
        self._connections.push(stream.connection, Started(stream.id, token_ids, seed))

    def _choice(self, stream: Stream, index: int, request: Request) -> Choice:
        generate, speech = stream.generate, self._text.speech
        stops = StopStrings(generate.stop) if generate.stop else None
        parser = None
        if generate.messages is not None and generate.parse:
            calls = bool(generate.tools) and generate.tool_choice != "none"
            parser = speech.parser(calls=calls, is_thinking=stream.is_thinking)
        detokenizer = self._text.detokenizer() if parser is None else speech.detokenizer()
        return Choice(stream, index, request, detokenizer, stops, parser)

    def _request(self, stream: Stream, index: int, seed: int) -> Request:
        generate = stream.generate
        sampling = msgspec.structs.replace(generate.sampling, seed=choice_seed(seed, index))
        if index:
            # All choices have the same prompt: its scores are computed and sent once.
            sampling = msgspec.structs.replace(sampling, prompt_logprobs=None)
        room = self._info.context - len(stream.prompt_ids)
        max_tokens = room if generate.max_tokens is None else min(generate.max_tokens, room)
        ends = frozenset() if generate.ignore_eos else self._end_token_ids
        self._num_requests += 1
        return Request(
            id=f"{self._num_requests}",
            prompt_ids=stream.prompt_ids,
            sampling=sampling,
            max_tokens=max_tokens,
            min_tokens=min(generate.min_tokens, max_tokens),
            stop_token_ids=ends.union(generate.stop_token_ids),
            priority=generate.priority,
            arrival_s=stream.received_s,
            deadline_s=None if generate.timeout_s is None else stream.received_s + generate.timeout_s,
            cache_salt=generate.cache_salt,
            sink=self,
        )

    # What the engine brings.

    def deliver(self, outputs: list[RequestOutput]) -> None:
        """Turn one commit's outputs into events, and send one frame to each connection they are for."""
        now = self._clock()
        choices = self._choices
        for output in outputs:
            choice = choices.get(output.request)
            if choice is None:
                continue  # It has ended at the client's or at a stop string's word.
            try:
                self._deliver_one(choice, output, now)
            except Exception as error:
                # One choice's text must not take the step's other streams down with it.
                self._fail(choice.stream, as_tandem_error(error))
        self._connections.flush()

    def _deliver_one(self, choice: Choice, output: RequestOutput, now: float) -> None:
        stream, token_ids = choice.stream, output.token_ids
        if stream.first_token_s is None and token_ids:
            stream.first_token_s = now - stream.received_s
        if (
            output.end is not None
            or not choice.is_plain
            or output.logprobs is not None
            or output.prompt_logprobs is not None
        ):
            self._deliver_rest(choice, output)
        elif token_ids:
            stream.completion_tokens += len(token_ids)
            connection = stream.connection
            if not connection.events:
                self._connections.dirty.append(connection)
            if type(token_ids) is not list:
                token_ids = list(token_ids)
            connection.events.append(
                Delta(stream.id, choice.index, token_ids, choice.detokenizer.push(token_ids))
            )

    def _deliver_rest(self, choice: Choice, output: RequestOutput) -> None:
        """Deliver what is more than plain tokens: ends, stop strings, log-probabilities."""
        stream = choice.stream
        if output.prompt_logprobs is not None:
            for scores in split_scores(stream.id, *output.prompt_logprobs):
                self._connections.push(stream.connection, scores)
        text, count, stopped = choice.read(output.token_ids, output.end)
        stream.completion_tokens += count
        reason: FinishReason | None = "stop" if stopped else output.end and output.end.finish_reason
        said, thought, calls = choice.parts(text, is_over=reason is not None)
        if reason == "stop" and choice.parser is not None and choice.parser.num_calls:
            reason = "tool_calls"
        if count or said or thought or calls or reason is not None:
            logprobs = None if output.logprobs is None else output.logprobs[:count]
            delta = Delta(
                stream.id,
                choice.index,
                list(output.token_ids[:count]),
                said,
                logprobs,
                reason,
                thought,
                calls or None,
            )
            self._connections.push(stream.connection, delta)
        if reason is not None:
            self._finish_choice(choice)
            if output.end is None:
                self._engine.finish(choice.request, End.STOP)
        elif output.end is End.CANCELLED:
            self._end(stream, Cancelled(stream.id))
        elif output.end is End.FAILED:
            self._fail(stream, output.error or TandemError("the engine gave no reason"))

    def _finish_choice(self, choice: Choice) -> None:
        stream = choice.stream
        del stream.open_choices[choice.index]
        del self._choices[choice.request]
        if stream.open_choices:
            return
        first = stream.first_request
        assert first is not None
        total_s = self._clock() - stream.received_s
        queue_s = total_s if first.admitted_s is None else max(first.admitted_s - stream.received_s, 0.0)
        usage = Usage(len(stream.prompt_ids), first.num_cached, stream.completion_tokens)
        first_token_s = total_s if stream.first_token_s is None else stream.first_token_s
        self._end(stream, Finished(stream.id, usage, Timings(queue_s, first_token_s, total_s)))

    def _end_all(self, connection: Connection, error: TandemError | None) -> None:
        """End all streams of a connection: cancelled, where no error is given."""
        for stream in list(connection.streams.values()):
            self._end(stream, Cancelled(stream.id) if error is None else Failed(stream.id, error.info()))

    def _fail(self, stream: Stream, error: TandemError) -> None:
        self._end(stream, Failed(stream.id, error.info()))

    def _end(self, stream: Stream, terminal: Finished | Cancelled | Failed) -> None:
        """Give a stream its one terminal event and the engine its unfinished choices back."""
        if stream.has_ended:
            return
        stream.has_ended = True
        connection = stream.connection
        del connection.streams[stream.id]
        connection.num_choices -= stream.generate.n
        if stream.task is not None and stream.task is not asyncio.current_task():
            stream.task.cancel()
        for choice in stream.open_choices.values():
            del self._choices[choice.request]
        for choice in stream.open_choices.values():
            self._engine.cancel(choice.request)
        stream.open_choices.clear()
        self._connections.push(connection, terminal)


def _unless_open(connection: Connection, stream_id: str | None) -> str | None:
    """Return the id a failure may carry: an open stream must not take it for its own end."""
    return None if stream_id in connection.streams else stream_id


def _too_late(generate: Generate, what: str) -> DeadlineExceededError:
    return DeadlineExceededError(
        f"the request was not {what} within its timeout of {generate.timeout_s:g} s", field="timeout_s"
    )

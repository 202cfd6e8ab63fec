"""Bad input: a typed error that names the field, and serving goes on."""

import asyncio
from pathlib import Path
from typing import Any

import msgspec
import pytest

from orchestrator.connections import GatewayLimits
from orchestrator.outbox import Backlog
from protocol.client import Delta, Event, Failed, Finished, PromptScores, Started
from protocol.errors import ErrorInfo
from protocol.framing import MAX_CLIENT_FRAME_BYTES, VERSION
from tests.unit.gateway_fakes import INFO, raw, score, serving
from tests.unit.text_models import directory

NAN = float("nan")
USER = [{"role": "user", "content": "x"}]
SAMPLING = {
    "temperature": [NAN, -1.0, float("inf"), "hot"],
    "top_p": [0.0, 1.5, NAN],
    "top_k": [-1, 1.5],
    "min_p": [-0.1, NAN],
    "repetition_penalty": [0.0, NAN],
    "presence_penalty": [3.0, NAN],
    "frequency_penalty": [-3.0, NAN],
    "logit_bias": [{400: 1.0}, {-1: 1.0}, {3: 101.0}, {3: NAN}],
    "seed": [-1, 2**63],
    "logprobs": [21, -1],
    "prompt_logprobs": [21],
    "heat": [1],
}
REQUEST = {
    "prompt": ["", 3],
    "prompt_ids": [[], [400], [-1], [2**31], ["x"], [True]],
    "messages": [[], [{"role": "robot", "content": "x"}], [{"role": "user"}]],
    "n": [0, 65],
    "max_tokens": [0, -5],
    "min_tokens": [-1],
    "stop": [[""], ["x"] * 17, "x"],
    "stop_token_ids": [[400], [-1]],
    "priority": [101],
    "timeout_s": [0.0, -1.0, NAN, 1e9],
    "cache_salt": ["x" * 257],
    "best_of": [2],
}
CASES = [(f"sampling.{k}", {"sampling": {k: v}}) for k, vs in SAMPLING.items() for v in vs]
CASES += [(k, {k: v}) for k, vs in REQUEST.items() for v in vs]
CASES += [
    ("min_tokens", {"min_tokens": 5, "max_tokens": 4}),
    ("prompt", {"prompt": "x", "messages": USER}),
    ("prompt_ids", {"prompt_ids": [5] * INFO.context}),
    ("prompt", {"prompt": "ab" * INFO.context}),
    ("messages", {"messages": [{"role": "user", "content": "ab" * INFO.context}]}),
]


def packed(message: Any) -> bytes:
    return bytes([VERSION]) + msgspec.msgpack.encode(message)


def test_every_bad_field_is_named_and_serving_goes_on(tmp_path: Path) -> None:
    async def run() -> None:
        async with serving(directory(tmp_path)) as server, raw(server) as client:
            for number, (field, wrong) in enumerate(CASES):
                given = {} if {"prompt", "prompt_ids", "messages"} & set(wrong) else {"prompt_ids": [5]}
                client.send(packed({"type": "generate", "id": f"c{number}", **given, **wrong}))
                failed = await client.event(f"c{number}", Failed)
                assert failed.error.code in ("invalid_request", "context_too_long"), (field, wrong, failed)
                named = failed.error.field or ""
                assert named.split("[")[0].startswith(field) or field in named, (field, wrong, failed)
            assert server.engine.seen == []
            await client.event(client.ask(prompt_ids=[5], max_tokens=2), Finished)
            server.assert_nothing_left()

    asyncio.run(run())


def test_frames_that_are_no_messages(tmp_path: Path) -> None:
    good = msgspec.msgpack.encode({"type": "generate", "id": "x", "prompt_ids": [5], "max_tokens": 2})
    bad_text = good[:1].replace(b"\x84", b"\x85") + good[1:] + b"\xa6prompt\xa3\xff\xfe\x01"
    cases: list[tuple[bytes, str, str | None, str | None]] = [
        (b"", "protocol", None, None),
        (b"\x01", "protocol", None, None),
        (b"\x09" + good, "protocol", None, None),
        (bytes([VERSION]) + good[:-2], "protocol", None, None),
        (bytes([VERSION]) + b"\x91" * 50_000, "invalid_request", None, None),
        (bytes([VERSION]) + bad_text, "invalid_request", "prompt", "x"),
        (packed({"type": "nonsense", "id": "x"}), "invalid_request", "type", "x"),
        (packed({"type": "cancel", "id": ""}), "invalid_request", "id", None),
        (packed({"type": "cancel", "id": "x" * 65}), "invalid_request", "id", None),
        (packed([1, 2]), "invalid_request", None, None),
        (bytes(MAX_CLIENT_FRAME_BYTES + 1), "protocol", None, None),
    ]

    async def run() -> None:
        async with serving(directory(tmp_path)) as server, raw(server) as client:
            for frame, code, field, stream_id in cases:
                client.events.clear()
                client.send(frame)
                failed = await client.event(stream_id, Failed)
                assert (failed.error.code, failed.error.field) == (code, field), failed
            client.socket.send_multipart([bytes([VERSION]) + good, b"more"])
            client.events.clear()
            assert (await client.event(None, Failed)).error.code == "protocol"
            # Far over the limit: that connection is lost, the others are not.
            async with raw(server) as other:
                other.send(bytes(3 * MAX_CLIENT_FRAME_BYTES))
                await client.event(client.ask(prompt_ids=[5], max_tokens=2), Finished)
            server.assert_nothing_left()
            await server.until(lambda: server.gateway.num_connections == 0)

    asyncio.run(run())


def test_an_open_stream_does_not_take_a_refusal_for_its_end(tmp_path: Path) -> None:
    async def run() -> None:
        async with serving(directory(tmp_path)) as server, raw(server) as client:
            server.is_paused = True
            stream = client.ask(prompt_ids=[5], max_tokens=3)
            client.ask(id=stream, prompt_ids=[6])
            client.ask(id=stream, prompt_ids=[6], n=0)
            await client.until(lambda: len(client.of(None, Failed)) == 2)
            assert client.of(None, Failed)[0].error.field == "id"
            server.is_paused = False
            await client.event(stream, Finished)
            assert client.of(stream, Failed) == []

    asyncio.run(run())


def test_limits_of_a_connection_and_of_all(tmp_path: Path) -> None:
    async def run() -> None:
        limits = GatewayLimits(connections=1, streams_per_connection=2, choices_per_connection=5)
        async with (
            serving(directory(tmp_path), limits=limits) as server,
            raw(server) as one,
            raw(server) as two,
        ):
            server.is_paused = True
            one.ask(prompt_ids=[5], n=3)
            failed = await one.event(one.ask(prompt_ids=[5], n=3), Failed)
            assert (failed.error.code, failed.error.field) == ("queue_full", "n")
            one.ask(prompt_ids=[5])
            failed = await one.event(one.ask(prompt_ids=[5]), Failed)
            assert failed.error.code == "queue_full"
            failed = await two.event(two.ask(prompt_ids=[5]), Failed)
            assert failed.error.code == "queue_full"
            server.is_paused = False
            await one.until(lambda: len([e for e in one.events if isinstance(e, Finished)]) == 2)
            await two.event(two.ask(prompt_ids=[5], max_tokens=1), Finished)

    asyncio.run(run())


def test_a_deadline_bounds_the_tokenising_too(tmp_path: Path) -> None:
    async def run() -> None:
        async with serving(directory(tmp_path)) as server, raw(server) as client:
            failed = await client.event(client.ask(prompt="x" * 5000, timeout_s=1e-6), Failed)
            assert (failed.error.code, failed.error.field) == ("deadline_exceeded", "timeout_s")
            server.assert_nothing_left()

    asyncio.run(run())


def test_scores_of_a_long_prompt_come_in_several_events(tmp_path: Path) -> None:
    async def run() -> None:
        info = msgspec.structs.replace(INFO, context=10_000)
        async with serving(directory(tmp_path), info=info) as server, raw(server) as client:
            stream = client.ask(prompt_ids=[5, 6] * 2500, max_tokens=1, sampling={"prompt_logprobs": 1})
            await client.event(stream, Finished)
            found = client.of(stream, PromptScores)
            assert [s.start for s in found] == [1, 2049, 4097]
            assert sum(len(s.logprobs) for s in found) == 4999

    asyncio.run(run())


def test_a_backlog_keeps_two_lives_of_one_id_apart() -> None:
    backlog = Backlog()
    first: list[Event] = [Started("a", [1], 0), Delta("a", 0, [1], "x"), Delta("a", 1, [2], "y")]
    first += [Delta("a", 0, [3], "z", [score(3)], "stop"), Delta("a", 1, [4], "", None, "length")]
    ended = Failed("a", ErrorInfo("invalid_request", "no"))
    again = Delta("a", 0, [9], "n")
    backlog.extend([*first, ended, Started("a", [1], 0), again])
    assert backlog.size_bytes > 0
    assert backlog.take() == [
        first[0],
        Delta("a", 0, [1, 3], "xz", [score(3)], "stop"),
        Delta("a", 1, [2, 4], "y", None, "length"),
        ended,
        Started("a", [1], 0),
        again,
    ]
    assert (backlog.take(), backlog.size_bytes) == ([], 0)


@pytest.mark.parametrize("count", [1, 3])
def test_events_over_a_frame_are_several_frames(count: int) -> None:
    from orchestrator.outbox import frames
    from protocol.client import Events
    from protocol.framing import Codec

    codec: Codec[Events] = Codec(Events, 2000)
    events: list[Event] = [Delta("a", 0, [1], "x" * 1500) for _ in range(count)]
    found = frames(codec, events)
    assert len(found) == count
    assert [e for frame in found for e in codec.decode(frame).events] == events

"""Whatever bytes arrive, the gateway answers in words or not at all, keeps nothing, and goes on serving."""

import asyncio
import random
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from orchestrator.intake import Intake
from protocol.client import Delta, Finished
from protocol.errors import TandemError
from protocol.framing import VERSION
from tests.unit.gateway_fakes import INFO, RawClient, Server, raw, serving
from tests.unit.text_models import directory

COUNTS = [5_000, pytest.param(120_000, marks=pytest.mark.long)]
GROWTH_BYTES = 96 << 20

VALID: list[dict[str, Any]] = [
    {"type": "generate", "id": "a", "prompt_ids": [5, 6], "max_tokens": 2},
    {"type": "generate", "id": "b", "prompt": "hello", "max_tokens": 1, "n": 2, "stop": ["x", "yz"]},
    {
        "type": "generate",
        "id": "c",
        "prompt_ids": [7],
        "max_tokens": 3,
        "sampling": {
            "temperature": 0.5,
            "logit_bias": {3: 1.0},
            "seed": 1,
            "logprobs": 2,
            "prompt_logprobs": 1,
        },
        "timeout_s": 3.0,
        "cache_salt": "s",
    },
    {"type": "cancel", "id": "a"},
    {"type": "keep_alive"},
    {"type": "get_stats", "id": "s"},
    {"type": "get_info", "id": "i"},
]
NAMES = sorted(
    {k for m in VALID for k in m} | {"temperature", "top_k", "role", "content", "messages", "x", ""}
)
NASTY: list[Any] = [
    *(None, True, 0, -1, 1, 2**31, 2**63 - 1, 2**64 - 1, -(2**63), 0.0, -0.5, 1e308),
    *(
        float("nan"),
        float("inf"),
        "",
        "a",
        "generate",
        "cancel",
        "\x00",
        "é😀",
        "x" * 300,
        b"",
        b"\xff\xfe",
    ),
]


def structure(chooser: random.Random, depth: int = 0) -> Any:
    kind = chooser.random()
    if depth > 3 or kind < 0.5:
        return chooser.choice(NASTY)
    if kind < 0.7:
        return [structure(chooser, depth + 1) for _ in range(chooser.randrange(5))]
    return {chooser.choice(NAMES): structure(chooser, depth + 1) for _ in range(chooser.randrange(5))}


def changed(chooser: random.Random) -> dict[str, Any]:
    """A valid message with one field replaced, removed or added."""
    message = dict(chooser.choice(VALID))
    name = chooser.choice([*message, *NAMES])
    if chooser.random() < 0.2:
        message.pop(name, None)
    else:
        message[name] = structure(chooser)
    return message


def mutated(chooser: random.Random) -> bytes:
    """A valid frame with bytes flipped, cut, doubled or inserted."""
    frame = bytearray(bytes([VERSION]) + msgspec.msgpack.encode(chooser.choice(VALID)))
    for _ in range(chooser.randrange(1, 4)):
        at = chooser.randrange(len(frame) + 1)
        match chooser.randrange(4):
            case 0:
                frame[at : at + 1] = chooser.randbytes(1)
            case 1:
                del frame[at : at + chooser.randrange(1, 5)]
            case 2:
                frame[at:at] = chooser.randbytes(chooser.randrange(1, 5))
            case _:
                frame += frame[at:]
    return bytes(frame)


def inputs(seed: int, count: int) -> Iterator[bytes]:
    chooser = random.Random(seed)
    for _ in range(count):
        match chooser.randrange(4):
            case 0:
                yield chooser.randbytes(chooser.randrange(80))
            case 1:
                yield bytes([VERSION]) + chooser.randbytes(chooser.randrange(80))
            case 2:
                yield mutated(chooser)
            case _:
                yield bytes([VERSION]) + msgspec.msgpack.encode(changed(chooser))


@pytest.mark.parametrize("count", COUNTS)
def test_the_codec_raises_typed_errors_only(count: int) -> None:
    intake = Intake(INFO)
    decoded = refused = 0
    for frame in inputs(1, count):
        try:
            intake.decode(frame)
            decoded += 1
        except TandemError as error:
            refused += bool(error.message)
        found = intake.recover_id(frame)
        assert found is None or 1 <= len(found) <= 64
    assert decoded
    assert refused
    assert decoded + refused == count


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.timeout(900)
def test_the_server_goes_on_serving(tmp_path: Path, count: int) -> None:
    async def run() -> None:
        async with serving(directory(tmp_path)) as server:
            await flood(server, inputs(2, count // 10))
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            await flood(server, inputs(3, count - count // 10))
            grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
            assert grown < GROWTH_BYTES, f"{grown} bytes"
            async with raw(server) as client:
                stream = client.ask(prompt_ids=[5, 6], max_tokens=3)
                await client.event(stream, Finished)
                assert [t for d in client.of(stream, Delta) for t in d.token_ids] == [5, 6, 5]
            await server.until(lambda: server.gateway.num_streams == 0)
            server.assert_nothing_left()
            await server.until(lambda: server.gateway.num_connections == 0)

    asyncio.run(run())


async def flood(server: Server, frames: Iterator[bytes]) -> None:
    """Send everything over a few connections, reading what comes back."""
    clients = [RawClient(server.address) for _ in range(3)]
    try:
        for number, frame in enumerate(frames):
            client = clients[number % len(clients)]
            client.send(frame)
            if number % 30 == 0:
                await asyncio.sleep(0)
                for each in clients:
                    each.receive()
                    each.events.clear()
        for client in clients:
            # Answers come in order: what was sent before this has been dealt with.
            client.send({"type": "get_stats", "id": "flood is over"})
            await client.until(lambda c=client: c.of("flood is over"), 60)  # type: ignore[misc]
    finally:
        for client in clients:
            client.close()

"""Clients that vanish, fall silent, read slowly or come in crowds."""

import asyncio
import random
from pathlib import Path
from typing import Any

import msgspec
import pytest

from orchestrator.connections import GatewayLimits
from protocol.client import Cancelled, Delta, Failed, Finished, Stats
from tests.unit.gateway_fakes import INFO, FakeEngine, RawClient, Server, raw, serving
from tests.unit.text_models import byte_level, directory

TERMINALS = (Finished, Cancelled, Failed)
TOKENIZER = byte_level()


def ids(text: str) -> list[int]:
    found: list[int] = TOKENIZER.encode(text).ids
    return found


def text_of(client: RawClient, stream_id: str, index: int = 0) -> str:
    return "".join(d.text for d in client.of(stream_id, Delta) if d.index == index)


def tokens_of(client: RawClient, stream_id: str, index: int = 0) -> list[int]:
    return [t for d in client.of(stream_id, Delta) if d.index == index for t in d.token_ids]


def test_a_vanished_client_is_cancelled(tmp_path: Path) -> None:
    async def run() -> None:
        limits = GatewayLimits(silence_s=60.0)
        async with serving(directory(tmp_path), limits=limits) as server:
            server.step_s = 0.01
            client = RawClient(server.address)
            stream = client.ask(prompt_ids=[5])
            await client.until(lambda: client.of(stream, Delta))
            client.close()
            # Its socket is gone: the first send that finds nobody says so, long before the silence does.
            await server.until(lambda: server.gateway.num_connections == 0)
            server.assert_nothing_left()

    asyncio.run(run())


def test_a_silent_client_is_cancelled_and_a_talking_one_is_not(tmp_path: Path) -> None:
    async def run() -> None:
        limits = GatewayLimits(silence_s=0.3, check_s=0.05)
        async with (
            serving(directory(tmp_path), limits=limits) as server,
            raw(server) as silent,
            raw(server) as alive,
        ):
            server.step_s = 0.02
            streams = silent.ask(prompt_ids=[5]), alive.ask(prompt_ids=[5])

            async def talk() -> None:
                while True:
                    alive.send({"type": "keep_alive"})
                    await asyncio.sleep(0.05)

            talking = asyncio.create_task(talk())
            await silent.event(streams[0], Cancelled)
            assert server.gateway.num_streams == 1
            talking.cancel()
            await alive.event(streams[1], Cancelled)
            server.assert_nothing_left()
            await server.until(lambda: server.gateway.num_connections == 0)

    asyncio.run(run())


def test_a_slow_reader_gets_merged_deltas_and_loses_none(tmp_path: Path) -> None:
    async def run() -> None:
        engine = FakeEngine(tokens_a_step=40)
        info = msgspec.structs.replace(INFO, context=200_000)
        async with (
            serving(directory(tmp_path), engine, info=info) as server,
            raw(server, RCVHWM=1) as client,
        ):
            words = "hello world é😀 "
            streams = [
                client.ask(prompt=words, max_tokens=15_000, sampling={"logprobs": 1}) for _ in range(2)
            ]
            await server.until(lambda: len(engine.seen) == 2 and not engine.running, 60)
            (connection,) = server.gateway._connections.all()
            assert len(connection.backlog) <= 2 * 3
            await asyncio.gather(*(client.event(s, Finished) for s in streams))
            expected = (ids(words) * 15_000)[:15_000]
            for stream in streams:
                assert tokens_of(client, stream) == expected
                assert text_of(client, stream) == TOKENIZER.decode(expected)
                scored = [s.token_id for d in client.of(stream, Delta) for s in d.logprobs]
                assert scored == expected
                assert len(client.of(stream, Delta)) < 15_000 / 40
                assert isinstance(client.of(stream)[-1], Finished)
            await server.until(lambda: server.gateway.num_connections == 0)

    asyncio.run(run())


def test_a_reader_too_slow_is_failed_and_then_forgotten(tmp_path: Path) -> None:
    async def run() -> None:
        engine = FakeEngine(tokens_a_step=400)
        info = msgspec.structs.replace(INFO, context=10_000_000)
        limits = GatewayLimits(backlog_bytes=100_000)
        path = directory(tmp_path)
        async with serving(path, engine, info=info, limits=limits) as server:  # noqa: SIM117
            async with raw(server, RCVHWM=1) as slow, raw(server) as other:
                streams = [slow.ask(prompt_ids=[5], max_tokens=9_000_000) for _ in range(3)]
                await server.until(lambda: len(engine.seen) == 3 and server.gateway.num_streams == 0, 30)
                server.assert_nothing_left()
                stream = other.ask(prompt_ids=[5], max_tokens=2)
                await other.event(stream, Finished)
                for stream in streams:
                    failed = await slow.event(stream, Failed)
                    assert failed.error.code == "slow_reader"
                    assert len([e for e in slow.of(stream) if isinstance(e, TERMINALS)]) == 1
                # Bad frames without end from somebody who does not read are not remembered without end.
                for _ in range(3):
                    for number in range(1000):
                        slow.send({"type": "get_info", "id": "x"})
                        if number % 20 == 0:
                            await asyncio.sleep(0.001)
                    assert sum(c.backlog.size_bytes for c in server.gateway._connections.all()) < 300_000

    asyncio.run(run())


async def crowd(server: Server, clients: int, seed: int) -> None:
    chooser = random.Random(seed)

    async def one(number: int) -> None:
        async with raw(server) as client:
            ways: list[dict[str, Any]] = [
                {"prompt_ids": [number + 5]},
                {"prompt": "hello world"},
                {"messages": [{"role": "user", "content": "hi"}]},
                {"prompt_ids": [7], "n": 3},
            ]
            leaves = number % 2 == 0
            stream = client.ask(**chooser.choice(ways), max_tokens=400 if leaves else 20)
            if leaves:
                await asyncio.sleep(chooser.random() * 0.2)
                client.send({"type": "cancel", "id": stream})
            await client.until(lambda: [e for e in client.of(stream) if isinstance(e, TERMINALS)], 60)
            client.send({"type": "get_stats", "id": "end"})
            await client.event("end", Stats)
            (terminal,) = [e for e in client.of(stream) if isinstance(e, TERMINALS)]
            assert isinstance(terminal, Finished if not leaves else (Finished, Cancelled))

    await asyncio.gather(*(one(number) for number in range(clients)))


@pytest.mark.parametrize("clients", [40, pytest.param(200, marks=pytest.mark.long)])
def test_a_crowd_half_of_which_cancels(tmp_path: Path, clients: int) -> None:
    async def run() -> None:
        async with serving(directory(tmp_path)) as server:
            server.step_s = 0.005
            await crowd(server, clients, seed=1)
            server.assert_nothing_left()
            await server.until(lambda: server.gateway.num_connections == 0)

    asyncio.run(run())


def test_an_idle_gateway_has_no_timers(tmp_path: Path) -> None:
    async def run() -> None:
        limits = GatewayLimits(silence_s=0.2, check_s=0.05)
        async with serving(directory(tmp_path), limits=limits) as server, raw(server) as client:
            await client.event(client.ask(prompt_ids=[5], max_tokens=2), Finished)
            connections = server.gateway._connections
            await server.until(
                lambda: connections._silence_timer is None and connections._retry_timer is None
            )

    asyncio.run(run())

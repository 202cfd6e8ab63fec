"""The SDK against a real gateway with a fake engine."""

import asyncio
import gc
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from orchestrator.connections import GatewayLimits
from protocol.errors import InstanceFailedError
from protocol.runtime_dir import InstanceDirectory, InstanceFacts, InstanceState
from tandem import AsyncClient, Client, find_instance
from tandem.errors import (
    InvalidRequestError,
    NotFoundError,
    QueueFullError,
    UnavailableError,
)
from tests.unit.gateway_fakes import INFO, FakeEngine, Server, serving
from tests.unit.text_models import byte_level, directory

TOKENIZER = byte_level()
ROOT = Path(__file__).parents[2]


def test_a_result_has_everything(tmp_path: Path) -> None:
    async def run() -> None:
        async with serving(directory(tmp_path)) as server, AsyncClient(address=server.address) as client:
            words = "hello 😀"
            prompt_ids = TOKENIZER.encode(words).ids
            result = await client.generate(words, max_tokens=9, seed=5, logprobs=1, prompt_logprobs=1, n=2)
            expected = (prompt_ids * 9)[:9]
            assert (result.prompt_ids, result.seed) == (prompt_ids, 5)
            assert (result.token_ids, result.finish_reason) == (expected, "length")
            assert result.text == TOKENIZER.decode(expected)
            assert result.logprobs is not None
            assert [s.token_id for s in result.logprobs] == expected
            assert result.prompt_logprobs is not None
            assert len(result.prompt_logprobs) == len(prompt_ids) - 1
            assert [c.token_ids for c in result.choices] == [expected] * 2
            assert result.usage.completion_tokens == 18
            assert result.timings.total_s > 0
            same = await client.generate(prompt_ids=prompt_ids, max_tokens=9)
            assert same.token_ids == expected
            chat = await client.chat([{"role": "user", "content": "hi"}], max_tokens=2)
            assert len(chat.token_ids) == 2
            assert (await client.info()).model == INFO.model
            assert (await client.stats()).running == 0

    asyncio.run(run())


def test_streams_and_leaving_them(tmp_path: Path) -> None:
    async def run() -> None:
        async with serving(directory(tmp_path)) as server, AsyncClient(address=server.address) as client:
            server.step_s = 0.002
            stream = client.stream_chat([{"role": "user", "content": "hi"}], max_tokens=20, ignore_eos=True)
            chunks = [chunk async for chunk in stream]
            assert stream.result is not None
            assert "".join(c.text for c in chunks) == stream.result.text
            assert [t for c in chunks for t in c.token_ids] == stream.result.token_ids
            assert chunks[-1].finish_reason == "length"

            async with client.stream(prompt_ids=[5, 6]) as stream:
                async for _ in stream:
                    break
            await server.until(lambda: server.gateway.num_streams == 0)
            assert stream.result is None
            assert [c async for c in stream] == []

            stream = client.stream(prompt_ids=[5, 6])
            assert (await anext(stream)).token_ids[0] == 5
            await stream.aclose()
            await server.until(lambda: server.gateway.num_streams == 0)

            task = asyncio.create_task(client.generate(prompt_ids=[5]))
            await server.until(lambda: server.gateway.num_streams == 1)
            task.cancel()
            await asyncio.wait([task])
            await server.until(lambda: server.gateway.num_streams == 0)

            dropped = client.stream(prompt_ids=[5, 6])
            await anext(dropped)
            del dropped
            gc.collect()
            await server.until(lambda: server.gateway.num_streams == 0)
            server.assert_nothing_left()

    asyncio.run(run())


def test_errors_are_raised_as_they_were(tmp_path: Path) -> None:
    async def run() -> None:
        engine = FakeEngine()
        async with (
            serving(directory(tmp_path), engine) as server,
            AsyncClient(address=server.address) as client,
        ):
            wrong: list[tuple[str, dict[str, Any]]] = [
                ("sampling.temperature", {"temperature": float("nan")}),
                ("heat", {"heat": 1}),
                ("prompt_ids", {"prompt_ids": [9999]}),
                ("prompt_ids", {"prompt_ids": ["x"]}),
                ("n", {"n": 0}),
            ]
            for field, parameters in wrong:
                with pytest.raises(InvalidRequestError) as caught:
                    await client.generate(**{"prompt_ids": [5], **parameters})
                assert caught.value.field == field
            with pytest.raises(InvalidRequestError, match="cannot be sent"):
                await client.generate(prompt_ids=[5], stop=[object()])  # type: ignore[list-item]
            engine.refuse_after = 0
            with pytest.raises(QueueFullError):
                await client.generate(prompt_ids=[5])
            engine.refuse_after = None
            engine.error = InstanceFailedError("rank 1 died")
            with pytest.raises(InstanceFailedError, match="rank 1 died"):
                await client.generate(prompt_ids=[5])

    asyncio.run(run())


def test_a_long_wait_is_kept_alive(tmp_path: Path) -> None:
    async def run() -> None:
        limits = GatewayLimits(silence_s=0.3, check_s=0.05)
        async with (
            serving(directory(tmp_path), limits=limits) as server,
            AsyncClient(address=server.address, keep_alive_s=0.05) as client,
        ):
            server.is_paused = True
            task = asyncio.create_task(client.generate(prompt_ids=[5], max_tokens=2))
            await asyncio.sleep(1.0)
            server.is_paused = False
            assert (await task).token_ids == [5, 5]

    asyncio.run(run())


def test_a_server_that_goes_away_ends_its_streams(tmp_path: Path) -> None:
    async def run() -> None:
        async with serving(directory(tmp_path)) as server, AsyncClient(address=server.address) as client:
            server.step_s = 0.01
            tasks = [asyncio.create_task(client.generate(prompt_ids=[5])) for _ in range(3)]
            await server.until(lambda: server.gateway.num_streams == 3)
            router = server.gateway._connections._router
            assert router is not None
            server.is_paused = True
            router.close()  # As a process that is killed: no word to anybody.
            for found in await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 2.0):
                assert isinstance(found, InstanceFailedError), found
            server.gateway._connections._router = None
            server.gateway._connections.close()
            with pytest.raises(UnavailableError, match="no server can be reached"):
                await client.generate(prompt_ids=[5])
            # One that comes back is used again.
            await server.gateway.open()
            server.is_paused = False
            assert (await client.generate(prompt_ids=[5], max_tokens=1)).token_ids == [5]

    asyncio.run(run())


def test_a_server_that_hangs_is_noticed(tmp_path: Path) -> None:
    async def run() -> None:
        import zmq

        with zmq.Context() as context, context.socket(zmq.ROUTER) as deaf:
            deaf.bind(f"ipc://{tmp_path}/deaf.sock")
            address = f"ipc://{tmp_path}/deaf.sock"
            async with AsyncClient(address=address, keep_alive_s=0.05, answer_limit_s=0.3) as client:
                with pytest.raises(UnavailableError, match="has not answered for"):
                    await asyncio.wait_for(client.generate(prompt_ids=[5]), 5.0)
                with pytest.raises(UnavailableError):
                    await asyncio.wait_for(client.stats(), 5.0)

    asyncio.run(run())


def publish(root: Path, name: str, state: InstanceState, address: str = "") -> InstanceDirectory:
    instance = InstanceDirectory(root, name)
    instance.acquire()
    instance.publish(InstanceFacts(name, 1, "m", 1, 1, state, 0, address or instance.gateway_address, 0.0))
    return instance


def test_finding_a_server(tmp_path: Path) -> None:
    def refused(kind: type[Exception], match: str, name: str | None = None) -> None:
        with pytest.raises(kind, match=match):
            find_instance(name, tmp_path)

    refused(NotFoundError, "no server is running.*tandem serve")
    refused(NotFoundError, "no server named 'a'", "a")
    first = publish(tmp_path, "a", "ready")
    assert find_instance(None, tmp_path).name == "a"
    second = publish(tmp_path, "b", "starting")
    refused(NotFoundError, r"2 servers are running \(a, b\)")
    refused(NotFoundError, "'c' is running, these are: a, b", "c")
    refused(UnavailableError, "still starting", "b")
    first.release()
    second.publish(msgspec.structs.replace(find_facts(second), state="failed", error="no memory"))
    refused(UnavailableError, "has failed: no memory")
    second.release()


def find_facts(instance: InstanceDirectory) -> InstanceFacts:
    facts = instance.facts()
    assert facts is not None
    return facts


@contextmanager
def background(path: Path, **options: Any) -> Iterator[Server]:
    """A server on a loop in a thread of its own."""
    started: list[Server] = []
    ready, stop = threading.Event(), asyncio.Event()
    loops: list[asyncio.AbstractEventLoop] = []

    async def run() -> None:
        async with serving(path, **options) as server:
            server.step_s = 0.002
            started.append(server)
            loops.append(asyncio.get_running_loop())
            ready.set()
            await stop.wait()

    thread = threading.Thread(target=asyncio.run, args=(run(),))
    thread.start()
    assert ready.wait(10)
    try:
        yield started[0]
    finally:
        loops[0].call_soon_threadsafe(stop.set)
        thread.join(10)
        assert not thread.is_alive()


def wait_for(what: Callable[[], bool]) -> None:
    waited = threading.Event()
    for _ in range(2000):
        if what():
            return
        waited.wait(0.005)
    raise AssertionError("not in time")


def test_the_sync_client_has_the_same_surface(tmp_path: Path) -> None:
    with background(directory(tmp_path)) as server:
        runtime = tmp_path / "runtime"
        runtime.mkdir()
        instance = publish(runtime, "only", "ready", server.address)
        with Client(runtime_directory=runtime) as client:
            result = client.generate("hello", max_tokens=4)
            assert result.text == TOKENIZER.decode(result.token_ids)
            stream = client.stream_chat([{"role": "user", "content": "hi"}], max_tokens=10)
            chunks = list(stream)
            assert stream.result is not None
            assert [t for c in chunks for t in c.token_ids] == stream.result.token_ids
            with client.stream(prompt_ids=[5]) as stream:
                next(stream)
            wait_for(lambda: server.gateway.num_streams == 0)
            assert client.info().model == "fake"
            with pytest.raises(InvalidRequestError):
                client.generate("")
            found: list[list[int]] = []
            threads = [
                threading.Thread(
                    target=lambda t=t: found.append(client.generate(prompt_ids=[t], max_tokens=5).token_ids)
                )
                for t in range(10, 18)
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert sorted(found) == [[t] * 5 for t in range(10, 18)]
        with pytest.raises(UnavailableError, match="closed"):
            client.stats()
        instance.release()


def test_ctrl_c_cancels_the_stream_and_leaves_the_client_usable(tmp_path: Path) -> None:
    with background(directory(tmp_path)) as server, Client(address=server.address) as client:
        stream = client.stream(prompt_ids=[5])
        next(stream)
        server.is_paused = True
        timer = threading.Timer(0.2, signal.raise_signal, (signal.SIGINT,))
        main = threading.get_ident()
        timer.function = lambda *_: signal.pthread_kill(main, signal.SIGINT)
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            for _ in stream:
                pass
        server.is_paused = False
        wait_for(lambda: server.gateway.num_streams == 0)
        assert client.generate(prompt_ids=[6], max_tokens=2).token_ids == [6, 6]


def test_a_client_that_is_dropped_does_not_keep_the_program(tmp_path: Path) -> None:
    code = f"""
from tandem import Client
client = Client(address={"ipc://" + str(tmp_path) + "/nobody.sock"!r})
try:
    client.stats()
except Exception as error:
    print(type(error).__name__)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=20
    )
    assert (done.stdout, done.stderr, done.returncode) == ("UnavailableError\n", "", 0)


def test_importing_is_quick_and_light() -> None:
    code = (
        "import time; t = time.process_time(); import tandem, sys; "
        "print(time.process_time() - t, {'torch', 'numpy', 'tokenizers', 'jinja2'} & set(sys.modules))"
    )
    times = []
    for _ in range(3):
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=20
        )
        seconds, heavy = done.stdout.strip().split(" ", 1)
        times.append(float(seconds))
        assert heavy == "set()", done.stderr
    assert min(times) < 0.15

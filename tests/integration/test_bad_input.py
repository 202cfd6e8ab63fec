"""Whatever a client sends is refused by name, and the real server goes on serving the others."""

import asyncio
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from protocol.client import Failed
from protocol.framing import MAX_CLIENT_FRAME_BYTES, VERSION
from tandem import AsyncClient, Client, TandemError
from tests.integration.test_gateway_fuzz import inputs
from tests.server import Place, Server, until
from tests.tiny_llama import write_tiny_llama
from tests.unit.gateway_fakes import RawClient

SMALL = ("--memory", "0.7")
CONTEXT = 4096
GREEDY: dict[str, Any] = {"prompt_ids": [5, 6, 7], "temperature": 0.0, "max_tokens": 8, "ignore_eos": True}
LONG: dict[str, Any] = {"prompt_ids": [5, 6, 7], "max_tokens": 4000, "ignore_eos": True}
VANISH_S = 15.0


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("models") / "tiny", context=CONTEXT)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    with Place(tmp_path_factory.mktemp("cache")) as place:
        yield place


@pytest.fixture(scope="module")
def running(place: Place, tiny: Path) -> Iterator[tuple[Server, list[int]]]:
    server = place.serve(tiny, "main", "--tp", "2", *SMALL)
    with server.client() as client:
        answer = client.generate(**GREEDY).token_ids
    yield server, answer
    assert server.stop() == 0, server.log
    assert "Traceback" not in server.log


@pytest.fixture
def server(running: tuple[Server, list[int]]) -> Iterator[Server]:
    """Give the server, which must answer as ever after the test, with all of its blocks."""
    server, expected = running
    yield server
    server.wait_idle()
    with server.client() as client:
        assert client.generate(**GREEDY).token_ids == expected


@pytest.fixture
def client(server: Server) -> Iterator[Client]:
    with server.client() as client:
        yield client


# What cannot be answered.

NAN = float("nan")
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"prompt_ids": []}, "prompt_ids"),
    ({"prompt_ids": [5] * CONTEXT}, "prompt_ids"),
    ({"prompt_ids": [10**6]}, "prompt_ids"),
    ({"prompt_ids": [-1]}, "prompt_ids"),
    ({"prompt": ""}, "prompt"),
    ({"prompt": "hello " * CONTEXT}, "prompt"),
    ({"messages": [{"role": "user", "content": "hello " * CONTEXT}]}, "messages"),
    ({"messages": [{"role": "user"}]}, "messages[0]"),
    ({"temperature": NAN}, "sampling.temperature"),
    ({"temperature": -0.1}, "sampling.temperature"),
    ({"top_p": 0.0}, "sampling.top_p"),
    ({"top_k": -1}, "sampling.top_k"),
    ({"min_p": 1.5}, "sampling.min_p"),
    ({"repetition_penalty": float("inf")}, "sampling.repetition_penalty"),
    ({"logprobs": 21}, "sampling.logprobs"),
    ({"logit_bias": {5: NAN}}, "sampling.logit_bias"),
    ({"logit_bias": {10**6: 1.0}}, "sampling.logit_bias"),
    ({"seed": -1}, "sampling.seed"),
    ({"n": 0}, "n"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"min_tokens": 9, "max_tokens": 3}, "min_tokens"),
    ({"stop": [""]}, "stop"),
    ({"stop_token_ids": [10**6]}, "stop_token_ids"),
    ({"timeout_s": NAN}, "timeout_s"),
    ({"nonsense": 1}, "nonsense"),
]


def test_bad_requests_name_the_field(client: Client) -> None:
    for given, field in REFUSED:
        asked = {"prompt_ids": [5], **given}
        if "prompt" in given or "messages" in given:
            del asked["prompt_ids"]
        messages = asked.pop("messages", None)
        call = partial(client.generate) if messages is None else partial(client.chat, messages)
        with pytest.raises(TandemError) as refused:
            call(**asked)
        error = refused.value
        assert error.code in ("invalid_request", "context_too_long"), (given, error)
        assert error.field is not None, (given, error)
        assert error.field.startswith(field), (given, error.field)


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        (("--prompt-ids", "1,x"), "prompt_ids"),
        (("--prompt-ids", "1000000"), "prompt_ids"),
        (("", "--raw"), "prompt"),
        (("hello", "--temperature", "nan"), "sampling.temperature"),
        (("hello", "--logprobs", "-1"), "sampling.logprobs"),
        (("hello", "--max-tokens", "0"), "max_tokens"),
    ],
)
def test_the_command_names_the_field(server: Server, arguments: tuple[str, ...], field: str) -> None:
    error = server.place.refusal("run", "tiny", *arguments, "--name", "main")
    assert error["code"] == "invalid_request"
    assert error["field"] == field


def test_arguments_that_are_no_utf8_are_refused(server: Server) -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-P",
            "-m",
            "cli",
            "run",
            "tiny",
            b"\xff\xfe",
            "--raw",
            "--name",
            "main",
            "--json",
        ],
        env=server.place.environment,
        cwd=server.place.path,
        capture_output=True,
        timeout=60,
    )
    assert done.returncode in (1, 2)
    assert b"Traceback" not in done.stderr
    assert "error" in json.loads(done.stdout)


# What is no message.


def failures(server: Server, frames: list[bytes], timeout_s: float = 10.0) -> list[Failed]:
    """Send frames over one connection and return what is said to them."""
    raw = RawClient(server.facts["address"])
    try:
        for frame in frames:
            raw.send(frame)

        def told() -> list[Failed]:
            raw.receive()
            return [event for event in raw.events if isinstance(event, Failed)]

        until(lambda: len(told()) >= len(frames), timeout_s)
        return told()
    finally:
        raw.close()


def test_bytes_that_are_no_message(server: Server) -> None:
    version = bytes([VERSION])
    frames = [
        b"",
        b"\xff" * 40,
        bytes([VERSION + 1]) + b"\x80",
        version,
        version + b"\x81\xa4type\xa7unknown",
        version + b"\x83\xa4type\xa8generate\xa2id\xa1a\xa6prompt\xa2\xff\xfe",
        version + bytes(MAX_CLIENT_FRAME_BYTES),
    ]
    told = failures(server, frames)
    assert len(told) == len(frames)
    assert {failed.error.code for failed in told} <= {"protocol", "invalid_request"}


def test_a_frame_of_any_size_costs_its_sender_the_connection_only(server: Server) -> None:
    huge, other = RawClient(server.facts["address"]), RawClient(server.facts["address"])
    try:
        huge.send(bytes(3 * MAX_CLIENT_FRAME_BYTES))
        huge.send({"type": "get_stats", "id": "lost"})
        other.send({"type": "get_stats", "id": "kept"})
        until(lambda: (other.receive(), other.of("kept"))[1])
    finally:
        huge.close()
        other.close()


def test_random_bytes_change_nothing(server: Server) -> None:
    frames = list(inputs(4, 2000))
    raw = RawClient(server.facts["address"])
    try:
        for frame in frames:
            raw.send(frame)
        raw.send({"type": "get_stats", "id": "the last one"})
        until(lambda: (raw.receive(), raw.of("the last one"))[1], 60.0)
    finally:
        raw.close()
    server.wait_idle(VANISH_S)


# Clients that go.

VANISHING = """
import sys
from tandem import Client
stream = Client("main").stream(prompt_ids=[5, 6, 7], ignore_eos=True, n=4)
next(stream)
print("streams", flush=True)
for _ in stream: pass
sys.stdin.read()
"""


def test_a_client_that_vanishes_leaves_nothing_behind(place: Place, server: Server) -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", VANISHING],
        env=place.environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == b"streams\n"
        before = server.stats()
        child.send_signal(signal.SIGKILL)
        child.wait(10)
        after = server.wait_idle(VANISH_S)
        assert after.connections <= 1
        assert after.cancelled > before.cancelled
    finally:
        child.kill()
        child.communicate()


@pytest.mark.parametrize("count", [60, pytest.param(200, marks=pytest.mark.long)])
def test_many_clients_at_once_half_of_them_leaving(server: Server, count: int) -> None:
    async def one(number: int) -> list[int] | None:
        async with AsyncClient("main", runtime_directory=server.place.root) as client:
            if number % 2:
                async with client.stream(**LONG, seed=number) as stream:
                    await anext(stream)
                return None
            return (await client.generate(**{**LONG, "max_tokens": 24}, seed=number)).token_ids

    async def everyone() -> list[list[int] | None]:
        return await asyncio.gather(*(one(number) for number in range(count)))

    before = server.stats()
    answers = asyncio.run(everyone())
    assert [len(answer) for answer in answers[::2] if answer is not None] == [24] * (count // 2)
    after = server.wait_idle()
    assert after.finished - before.finished == count // 2
    assert after.cancelled - before.cancelled == count // 2
    assert after.failed == before.failed
    with server.client() as client:
        until(lambda: client.stats().connections == 1)
        alone = client.generate(**{**LONG, "max_tokens": 24}, seed=2)
    assert alone.token_ids == answers[2]

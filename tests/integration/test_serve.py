"""The real server, from the command line and from the SDK, with a tiny model."""

import asyncio
import json
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

from tandem import AsyncClient, Client, TandemError
from tests.server import COMMAND_S, TANDEM, Place, Server, title, until
from tests.terminal_screen import CTRL_C, TerminalProgram
from tests.tiny_llama import write_tiny_llama

SMALL = ("--memory", "1")
GREEDY: dict[str, Any] = {"temperature": 0.0, "max_tokens": 12, "ignore_eos": True}
ENDLESS: dict[str, Any] = {"prompt_ids": [5, 6, 7], "ignore_eos": True}
HELLO = " hello"
IDLE_S = 4.0
IDLE_SHARE = 0.01


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny"
    # The context is so long that no answer ends by itself while a test looks at it.
    return write_tiny_llama(path, heads=6, kv_heads=3, context=16384)


@pytest.fixture(scope="module")
def mute(tiny: Path) -> Path:
    """The same model without a tokenizer."""
    model = tiny.with_name("mute")
    model.mkdir()
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        shutil.copy(tiny / name, model / name)
    return model


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    with Place(tmp_path_factory.mktemp("cache")) as place:
        yield place


@pytest.fixture(scope="module")
def server(place: Place, tiny: Path) -> Iterator[Server]:
    server = place.serve(tiny, "main", "--tp", "3", *SMALL)
    yield server
    assert server.stop() == 0, server.log
    # Nothing was said beside the boot's report: no warning, no traceback.
    told = server.log.splitlines()
    assert not any(" | " in line or "Traceback" in line for line in told), server.log
    assert told[-1].startswith("main is ready at"), server.log


@pytest.fixture
def client(server: Server) -> Iterator[Client]:
    with server.client() as client:
        yield client


@pytest.fixture
def ask(server: Server) -> Callable[..., dict[str, Any]]:
    def run(*arguments: str) -> dict[str, Any]:
        return server.place.tandem_json("run", "tiny", *arguments, "--name", "main")

    return run


# Commands.


def test_run_starts_a_server_for_one_answer(place: Place, tiny: Path, tmp_path: Path) -> None:
    report_path = tmp_path / "boot.json"
    layout = ("--pp", "2", "--memory", "0.8", "--context", "64", "--boot-report", str(report_path))
    drawn = ("--max-tokens", "5", "--seed", "3", "--logprobs", "2")
    before = place.running()
    found = place.tandem_json("run", str(tiny), "hello world", *layout, *drawn)
    assert set(found) == {
        *("prompt_ids", "token_ids", "text", "reasoning", "tool_calls", "finish_reason", "logprobs"),
        *("timings", "usage", "seed"),
    }
    assert len(found["token_ids"]) <= 5
    assert found["seed"] == 3
    assert found["finish_reason"] in ("length", "stop")
    assert [len(scored["top_ids"]) for scored in found["logprobs"]] == [2] * len(found["token_ids"])
    assert 0 <= found["timings"]["queue_s"] <= found["timings"]["first_token_s"]
    assert found["timings"]["first_token_s"] <= found["timings"]["total_s"]
    assert place.running() == before
    report = json.loads(report_path.read_text())
    assert (report["tp"], report["pp"], report["context"]) == (1, 2, 64)
    assert {span["rank"] for span in report["spans"]} == {-1, 0, 1}
    assert all(report["start_s"] <= span["start_s"] <= span["end_s"] for span in report["spans"])
    assert [memory["rank"] for memory in report["memory"]] == [0, 1]
    assert sum(memory["budget_bytes"] for memory in report["memory"]) <= 0.8 * 2**30


def test_run_asks_a_running_server(
    server: Server, client: Client, ask: Callable[..., dict[str, Any]]
) -> None:
    drawn = ("--temperature", "0", "--max-tokens", "6")
    raw = ask("hello world", "--raw", *drawn)
    by_sdk = client.generate("hello world", temperature=0.0, max_tokens=6)
    assert (raw["prompt_ids"], raw["token_ids"], raw["text"]) == (
        *(by_sdk.prompt_ids, by_sdk.token_ids, by_sdk.text),
    )
    by_ids = ask("--prompt-ids", ",".join(map(str, raw["prompt_ids"])), *drawn)
    assert by_ids["token_ids"] == raw["token_ids"]
    templated = ask("hello world", *drawn)
    by_chat = client.chat([{"role": "user", "content": "hello world"}], temperature=0.0, max_tokens=6)
    assert templated["prompt_ids"] == by_chat.prompt_ids != raw["prompt_ids"]
    assert templated["token_ids"] == by_chat.token_ids
    shown = server.place.tandem("run", "tiny", "hello world", "--raw", *drawn, "--name", "main")
    assert shown.returncode == 0
    assert shown.stdout.decode().rstrip("\n") == raw["text"].rstrip("\n")
    assert shown.stderr == b""


def test_chat_from_a_pipe(server: Server) -> None:
    lines = b"/set temperature 0\n/set max_tokens 4\nhello\nworld\n"
    done = server.place.tandem("chat", "--name", "main", "--json", stdin=lines)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["model"] == "tiny"
    assert [m["role"] for m in found["messages"]] == ["user", "assistant"] * 2
    assert [m["content"] for m in found["messages"][::2]] == ["hello", "world"]
    again = server.place.tandem("chat", "--name", "main", "--json", stdin=lines)
    assert again.stdout == done.stdout


def test_processes_say_what_they_are(server: Server) -> None:
    assert title(server.process.pid) == "tandem: main orchestrator"
    assert sorted(map(title, server.workers)) == [f"tandem: main worker {rank}/3" for rank in (1, 2, 3)]


def test_two_servers_and_the_end_of_one(server: Server, tiny: Path, client: Client) -> None:
    place = server.place
    expected = client.generate("hello", **GREEDY).token_ids
    other = place.serve(tiny, "other", "--served-model-name", "grown", *SMALL)
    refused = place.refusal("serve", "--model", str(tiny), "--name", "other", *SMALL)
    assert (refused["code"], refused["field"]) == ("already_running", "name")
    nameless = place.refusal("chat")
    assert "main, other" in nameless["message"]
    listed = {facts["name"]: facts for facts in place.tandem_json("ps")["instances"]}
    assert set(listed) == {"main", "other"}
    assert listed["other"] == other.facts
    assert listed["other"]["pid"] == other.process.pid
    assert (listed["main"]["model"], listed["other"]["model"]) == ("tiny", "grown")
    assert (listed["main"]["state"], listed["main"]["tp"], listed["main"]["pp"]) == ("ready", 3, 1)
    assert listed["main"]["memory_bytes"] <= 2**30
    with other.client() as second:
        assert second.info().model == "grown"
        assert second.generate("hello", **GREEDY).token_ids == expected
    stopped = place.tandem_json("stop", "other")
    assert (stopped["name"], stopped["stopped"]) == ("other", True)
    assert other.process.wait(1) == 0
    assert "draining" not in other.log
    assert place.running() == ["main"]
    assert not (place.root / "other").exists()
    assert place.refusal("stop", "other")["code"] == "not_found"
    assert client.generate("hello", **GREEDY).token_ids == expected


def test_ctrl_c_finishes_what_runs_and_a_second_one_does_not(place: Place, tiny: Path) -> None:
    first = place.serve(tiny, "first", *SMALL)
    with first.client() as client:
        stream = client.stream(prompt_ids=[5], max_tokens=2000, ignore_eos=True)
        count = len(next(stream).token_ids)
        first.process.send_signal(signal.SIGINT)
        until(lambda: "draining" in first.log)
        with first.client() as late, pytest.raises(TandemError) as refused:
            late.generate(prompt_ids=[5])
        assert refused.value.code == "unavailable"
        assert count + sum(len(chunk.token_ids) for chunk in stream) == 2000
        assert first.process.wait(30) == 0
    second = place.serve(tiny, "second", *SMALL)
    with second.client() as client:
        stream = client.stream(**ENDLESS)
        next(stream)
        second.process.send_signal(signal.SIGINT)
        until(lambda: "draining" in second.log)
        second.process.send_signal(signal.SIGINT)
        with pytest.raises(TandemError) as ended:
            list(stream)
        assert ended.value.code == "unavailable"
        assert second.process.wait(30) == 128 + signal.SIGINT
    assert "Traceback" not in first.log + second.log


def test_a_model_without_a_tokenizer(place: Place, mute: Path, tiny: Path) -> None:
    mute_server = place.serve(mute, "mute", *SMALL)
    with mute_server.client() as client:
        info = client.info()
        assert not info.has_tokenizer
        assert not info.has_chat_template
        answer = client.generate(prompt_ids=[5, 6, 7], **GREEDY)
        assert (len(answer.token_ids), answer.text) == (12, "")
        for field, asked in (
            ("prompt", lambda: client.generate("hello")),
            ("messages", lambda: client.chat([{"role": "user", "content": "hello"}])),
            ("stop", lambda: client.generate(prompt_ids=[5], stop=["x"])),
        ):
            with pytest.raises(TandemError) as refused:
                asked()
            assert (refused.value.code, refused.value.field) == ("invalid_request", field)
    for arguments in (("hi",), ("hi", "--raw")):
        error = place.refusal("run", "mute", *arguments, "--name", "mute")
        assert "--prompt-ids" in error["message"]
    drawn = ("--temperature", "0", "--max-tokens", "12")
    shown = place.tandem("run", "mute", "--prompt-ids", "5,6,7", "--name", "mute", *drawn)
    assert shown.stdout.decode().split() == [str(t) for t in answer.token_ids]
    assert mute_server.stop() == 0


def test_on_a_terminal_it_shows_the_boot_and_ctrl_c_ends_it(place: Place, tiny: Path) -> None:
    command = [*TANDEM, "serve", "--model", str(tiny), *SMALL]
    with TerminalProgram(command, place.environment, str(place.path)) as terminal:
        terminal.wait_for("tiny is ready at")
        assert "tiny: tp 1 pp 1, float32, ready in" in terminal.text
        assert "import torch" in terminal.text
        assert "ranks ready" not in terminal.text
        terminal.send(CTRL_C)
        assert terminal.wait_end() == 0
        assert terminal.lines[-1] == "stopping"
    with TerminalProgram(command, place.environment, str(place.path)) as terminal:
        terminal.wait_for("of 1 ranks ready")
        terminal.send(CTRL_C)
        assert terminal.wait_end() == 128 + signal.SIGINT
        assert "ready" not in terminal.text
        assert "Traceback" not in terminal.text
    assert "tiny" not in place.running()


# The SDK.


def hello_token(client: Client) -> int:
    (token,) = client.generate(HELLO, max_tokens=1).prompt_ids
    return token


def test_streaming_adds_up_to_the_whole(client: Client) -> None:
    whole = client.generate("hello world", **GREEDY, logprobs=1)
    with client.stream("hello world", **GREEDY, logprobs=1) as stream:
        chunks = list(stream)
        assert stream.prompt_ids == whole.prompt_ids
        result = stream.result
    assert result is not None
    assert [t for c in chunks for t in c.token_ids] == result.token_ids == whole.token_ids
    assert "".join(c.text for c in chunks) == result.text == whole.text
    assert [s for c in chunks for s in c.logprobs or ()] == result.logprobs
    assert [c.finish_reason for c in chunks][-1] == whole.finish_reason == "length"
    chat = [{"role": "user", "content": "hello"}]
    whole = client.chat(chat, **GREEDY)
    assert "".join(c.text for c in client.stream_chat(chat, **GREEDY)) == whole.text


def test_parameters_reach_the_sampler(client: Client) -> None:
    hello = hello_token(client)
    forced: dict[str, Any] = {**GREEDY, "logit_bias": {hello: 100.0}}
    assert client.generate("world", **forced).text == HELLO * 12
    stopped = client.generate("world", **forced, stop=["o h"])
    assert (stopped.text, stopped.finish_reason) == (" hell", "stop")
    later = client.generate("world", **forced, stop=["o h"], min_tokens=5)
    assert later.text.startswith(HELLO * 4)
    at_token = client.generate("world", **forced, stop_token_ids=[hello])
    assert (at_token.token_ids, at_token.text, at_token.finish_reason) == ([hello], "", "stop")
    drawn = client.generate("world", seed=5, n=3, max_tokens=12, ignore_eos=True)
    assert [choice.index for choice in drawn.choices] == [0, 1, 2]
    assert len({tuple(choice.token_ids) for choice in drawn.choices}) == 3
    alone = client.generate("world", seed=5, max_tokens=12, ignore_eos=True)
    assert alone.token_ids == drawn.token_ids
    assert drawn.usage.completion_tokens == 36


def test_log_probabilities_of_prompt_and_answer_agree(client: Client) -> None:
    answer = client.generate("hello world", **GREEDY, logprobs=3)
    assert answer.logprobs is not None
    assert [scored.top_ids[0] for scored in answer.logprobs] == answer.token_ids
    both = [*answer.prompt_ids, *answer.token_ids]
    scored = client.generate(prompt_ids=both, max_tokens=1, prompt_logprobs=3).prompt_logprobs
    assert scored is not None
    assert [s.token_id for s in scored] == both[1:]
    tail = scored[len(answer.prompt_ids) - 1 :]
    for in_answer, in_prompt in zip(answer.logprobs, tail, strict=True):
        assert in_prompt.top_ids == in_answer.top_ids
        assert in_prompt.logprob == pytest.approx(in_answer.logprob, abs=1e-4)


def test_leaving_a_stream_cancels_it(server: Server, client: Client) -> None:
    before = client.stats().cancelled
    stream = client.stream(**ENDLESS)
    next(stream)
    assert client.stats().running == 1
    stream.close()
    until(lambda: client.stats().running == 0)
    with client.stream(**ENDLESS, n=2) as second:
        next(second)
        assert client.stats().running == 2
    server.wait_idle()
    assert client.stats().cancelled == before + 3


def test_the_asynchronous_client(server: Server, client: Client) -> None:
    expected = client.generate("hello", **GREEDY)

    async def talk() -> None:
        async with AsyncClient("main", runtime_directory=server.place.root) as on_loop:
            answers = await asyncio.gather(*(on_loop.generate("hello", **GREEDY) for _ in range(5)))
            assert [a.token_ids for a in answers] == [expected.token_ids] * 5
            chat = await on_loop.chat([{"role": "user", "content": "hello"}], **GREEDY)
            assert len(chat.token_ids) == 12
            text = [chunk.text async for chunk in on_loop.stream("hello", **GREEDY)]
            assert "".join(text) == expected.text
            async with aclosing(on_loop.stream(**ENDLESS)) as stream:
                await anext(stream)
                assert (await on_loop.stats()).running == 1
            await idle(on_loop)
            waiting = asyncio.create_task(on_loop.generate(**ENDLESS))
            async with asyncio.timeout(COMMAND_S):
                while not (await on_loop.stats()).running:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
            await idle(on_loop)

    async def idle(on_loop: AsyncClient) -> None:
        async with asyncio.timeout(COMMAND_S):
            while (await on_loop.stats()).running:  # noqa: ASYNC110
                await asyncio.sleep(0.01)

    asyncio.run(talk())


def test_a_server_with_nothing_to_do_does_nothing(server: Server) -> None:
    server.wait_idle()
    began_s, had_s = time.monotonic(), server.cpu_s()
    # The one sleep: what is observed here is that nothing happens.
    time.sleep(IDLE_S)
    spent_s = server.cpu_s() - had_s
    assert spent_s < IDLE_SHARE * (time.monotonic() - began_s)

"""What becomes of requests: events in order, one terminal each, nothing left behind."""

import asyncio
import stat
from pathlib import Path
from typing import Any

import msgspec
import pytest

from orchestrator.request import Request
from protocol.client import Cancelled, Delta, Failed, Finished, Info, PromptScores, Started, Stats
from protocol.errors import InstanceFailedError
from tests.unit.gateway_fakes import INFO, FakeEngine, RawClient, raw, serving
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


def test_a_stream_in_order(tmp_path: Path) -> None:
    async def run() -> None:
        async with serving(directory(tmp_path)) as server, raw(server) as client:
            words = "hello world é😀 "
            stream = client.ask(prompt=words, max_tokens=40, sampling={"seed": 7})
            finished = await client.event(stream, Finished)
            started, *middle, last = client.of(stream)
            assert isinstance(started, Started)
            assert (started.prompt_ids, started.seed) == (ids(words), 7)
            assert last is finished
            assert all(isinstance(e, Delta) for e in middle)
            assert [d.finish_reason for d in middle] == [None] * (len(middle) - 1) + ["length"]
            expected = (ids(words) * 40)[:40]
            assert tokens_of(client, stream) == expected
            assert text_of(client, stream) == TOKENIZER.decode(expected)
            assert finished.usage == msgspec.structs.replace(
                finished.usage, prompt_tokens=len(ids(words)), cached_tokens=0, completion_tokens=40
            )
            assert 0 < finished.timings.queue_s < finished.timings.first_token_s < finished.timings.total_s
            assert stat.S_IMODE((tmp_path / "gateway.sock").stat().st_mode) == 0o600
            server.assert_nothing_left()

    asyncio.run(run())


def test_chat_ends_with_the_end_token_which_has_no_text(tmp_path: Path) -> None:
    async def run() -> None:
        engine = FakeEngine(lambda r: [*ids("hello é"), 2][r.num_output])
        async with serving(directory(tmp_path), engine) as server, raw(server) as client:
            stream = client.ask(messages=[{"role": "user", "content": "hi"}])
            await client.event(stream, Finished)
            assert tokens_of(client, stream) == [*ids("hello é"), 2]
            assert text_of(client, stream) == "hello é"
            assert client.of(stream, Delta)[-1].finish_reason == "stop"
            (request,) = engine.seen
            assert request.prompt_ids == ids("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")
            assert request.stop_token_ids == {2}
            assert request.max_tokens == INFO.context - len(request.prompt_ids)

    asyncio.run(run())


def test_what_a_request_asks_reaches_the_engine(tmp_path: Path) -> None:
    async def run() -> None:
        engine = FakeEngine()
        async with serving(directory(tmp_path), engine) as server, raw(server) as client:
            asked: dict[str, Any] = {
                "min_tokens": 1,
                "max_tokens": 2,
                "stop_token_ids": [9],
                "ignore_eos": True,
                "priority": 3,
                "timeout_s": 5.0,
                "cache_salt": "me",
            }
            sampling = {"temperature": 0.5, "top_k": 4, "logit_bias": {3: 1.5}, "seed": 11}
            stream = client.ask(prompt_ids=[5, 6], sampling=sampling, **asked)
            await client.event(stream, Finished)
            (request,) = engine.seen
            assert (request.min_tokens, request.max_tokens, request.priority) == (1, 2, 3)
            assert (request.stop_token_ids, request.cache_salt) == ({9}, "me")
            assert request.deadline_s == pytest.approx(request.arrival_s + 5.0)
            assert msgspec.to_builtins(request.sampling, str_keys=False) == sampling

    asyncio.run(run())


def test_choices_have_their_own_seeds_and_one_terminal(tmp_path: Path) -> None:
    async def run() -> None:
        engine = FakeEngine(lambda r: 50 + r.sampling.seed % 97)  # type: ignore[operator]
        async with serving(directory(tmp_path), engine) as server, raw(server) as client:
            sampling = {"seed": 42, "logprobs": 1, "prompt_logprobs": 1}
            streams = [
                client.ask(prompt_ids=[3, 4, 5], n=4, max_tokens=3, sampling=sampling) for _ in range(2)
            ]
            for stream in streams:
                finished = await client.event(stream, Finished)
                assert finished.usage.completion_tokens == 12
                assert finished.usage.prompt_tokens == 3
                assert len(client.of(stream, Finished)) == 1
                (scores,) = client.of(stream, PromptScores)
                assert (scores.start, [s.token_id for s in scores.logprobs]) == (1, [4, 5])
            first, second = ([tokens_of(client, s, i) for i in range(4)] for s in streams)
            assert first == second
            assert first[0] == [50 + 42 % 97] * 3
            assert len({r.sampling.seed for r in engine.seen}) == 4
            assert all(d.logprobs is not None for d in client.of(streams[0], Delta))
            server.assert_nothing_left()

    asyncio.run(run())


def test_a_missing_seed_is_drawn_once(tmp_path: Path) -> None:
    async def run() -> None:
        engine = FakeEngine()
        async with serving(directory(tmp_path), engine) as server, raw(server) as client:
            streams = [client.ask(prompt_ids=[3], max_tokens=1) for _ in range(2)]
            for stream in streams:
                await client.event(stream, Finished)
            seeds = [client.of(s, Started)[0].seed for s in streams]
            assert seeds == [r.sampling.seed for r in engine.seen]
            assert seeds[0] != seeds[1]

    asyncio.run(run())


@pytest.mark.parametrize("tokens_a_step", [1, 5])
def test_stop_strings(tmp_path: Path, tokens_a_step: int) -> None:
    async def run() -> None:
        engine = FakeEngine(tokens_a_step=tokens_a_step)
        async with serving(directory(tmp_path), engine) as server, raw(server) as client:
            words = "abcdef and xyz"
            sampling = {"logprobs": 0}
            stream = client.ask(prompt=words, max_tokens=99, stop=["f and", "zz"], sampling=sampling)
            finished = await client.event(stream, Finished)
            count = next(n for n in range(99) if "f and" in TOKENIZER.decode(ids(words)[:n]))
            assert text_of(client, stream) == "abcde"
            assert tokens_of(client, stream) == ids(words)[:count]
            assert finished.usage.completion_tokens == count
            assert [s.token_id for d in client.of(stream, Delta) for s in d.logprobs] == ids(words)[:count]
            assert client.of(stream, Delta)[-1].finish_reason == "stop"
            # Withheld text comes at the end where nothing completed it.
            other = client.ask(prompt=words, max_tokens=6, stop=["fg"])
            await client.event(other, Finished)
            assert text_of(client, other) == TOKENIZER.decode(ids(words)[:6])
            # min_tokens: not looked for before.
            later = client.ask(prompt="ab", max_tokens=8, stop=["b"], min_tokens=4)
            await client.event(later, Finished)
            assert text_of(client, later) == "ababa"
            server.assert_nothing_left()

    asyncio.run(run())


def test_a_directory_without_a_tokenizer_serves_token_ids(tmp_path: Path) -> None:
    async def run() -> None:
        async with serving(tmp_path) as server, raw(server) as client:
            stream = client.ask(prompt_ids=[5, 6], max_tokens=3)
            await client.event(stream, Finished)
            assert tokens_of(client, stream) == [5, 6, 5]
            assert text_of(client, stream) == ""
            for field, value in (("prompt", "x"), ("messages", [{"role": "user", "content": "x"}])):
                failed = await client.event(client.ask(**{field: value}), Failed)
                assert (failed.error.code, failed.error.field) == ("invalid_request", field)
                assert "no tokenizer: send prompt_ids" in failed.error.message
            failed = await client.event(client.ask(prompt_ids=[1], stop=["x"]), Failed)
            assert failed.error.field == "stop"

    asyncio.run(run())


def test_cancelling(tmp_path: Path) -> None:
    async def run() -> None:
        async with serving(directory(tmp_path)) as server, raw(server) as client:
            server.step_s = 0.01
            running = client.ask(prompt_ids=[5], n=3)
            await client.until(lambda: client.of(running, Delta))
            tokenised = client.ask(prompt="the quick " * 400)
            for stream in (running, tokenised, "unknown"):
                client.send({"type": "cancel", "id": stream})
            for stream in (running, tokenised):
                await client.event(stream, Cancelled)
            await client.until(lambda: not server.engine.running)
            client.send({"type": "get_stats", "id": "last"})
            await client.event("last", Stats)
            assert [
                len([e for e in client.of(s) if isinstance(e, TERMINALS)]) for s in (running, tokenised)
            ] == [1, 1]
            assert client.of("unknown") == []
            assert not any(
                isinstance(e, Delta)
                for e in client.of(running)[client.of(running).index(client.of(running, Cancelled)[0]) :]
            )
            server.assert_nothing_left()
            # The id is free again.
            again = client.ask(id=running, prompt_ids=[5], max_tokens=1)
            await client.event(again, Finished)

    asyncio.run(run())


def test_a_refused_choice_takes_the_others_back(tmp_path: Path) -> None:
    async def run() -> None:
        engine = FakeEngine()
        engine.refuse_after = 2
        async with serving(directory(tmp_path), engine) as server, raw(server) as client:
            failed = await client.event(client.ask(prompt_ids=[5], n=3), Failed)
            assert failed.error.code == "queue_full"
            assert engine.cancelled == engine.seen
            assert len(engine.seen) == 2
            server.assert_nothing_left()

    asyncio.run(run())


def test_an_instance_that_fails_fails_every_stream(tmp_path: Path) -> None:
    async def run() -> None:
        engine = FakeEngine()
        async with serving(directory(tmp_path), engine) as server, raw(server) as client:
            server.step_s = 0.01
            streams = [client.ask(prompt_ids=[5], n=2) for _ in range(3)]
            await client.until(lambda: all(client.of(s, Delta) for s in streams))
            engine.error = InstanceFailedError("rank 1 died")
            for stream in streams:
                failed = await client.event(stream, Failed)
                assert (failed.error.code, failed.error.message) == ("instance_failed", "rank 1 died")
                assert len(client.of(stream, Failed)) == 1
            server.assert_nothing_left()

    asyncio.run(run())


def test_closing_fails_what_is_open(tmp_path: Path) -> None:
    async def run() -> None:
        async with serving(directory(tmp_path)) as server, raw(server) as client:
            server.step_s = 0.01
            stream = client.ask(prompt_ids=[5])
            await client.until(lambda: client.of(stream, Delta))
            server.gateway.close()
            failed = await client.event(stream, Failed)
            assert failed.error.code == "unavailable"
            server.assert_nothing_left()

    asyncio.run(run())


def test_stats_and_info(tmp_path: Path) -> None:
    async def run() -> None:
        async with serving(directory(tmp_path)) as server, raw(server) as client:
            client.ask(prompt_ids=[5])
            client.send({"type": "get_stats", "id": "a"})
            client.send({"type": "get_info", "id": "b"})
            assert (await client.event("a", Stats)).connections == 1
            assert await client.event("b", Info) == msgspec.structs.replace(INFO, id="b")
            server.gateway.update_info(msgspec.structs.replace(INFO, state="draining"))
            client.send({"type": "get_info", "id": "c"})
            assert (await client.event("c", Info)).state == "draining"

    asyncio.run(run())


def test_text_that_breaks_ends_its_own_stream_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run() -> None:
        async with serving(directory(tmp_path)) as server, raw(server) as client:
            server.is_paused = True
            broken, whole = (
                client.ask(prompt_ids=[5], max_tokens=3),
                client.ask(prompt_ids=[6], max_tokens=3),
            )
            await client.until(lambda: len(server.engine.seen) == 2)
            choice = server.gateway._choices[server.engine.seen[0]]

            class Broken:
                def push(self, token_ids: object) -> str:
                    raise RuntimeError("no text")

                def finish(self) -> str:
                    return ""

            choice.detokenizer = Broken()
            server.is_paused = False
            failed = await client.event(broken, Failed)
            assert "no text" in failed.error.message
            await client.event(whole, Finished)
            server.assert_nothing_left()

    asyncio.run(run())


def test_requests_are_unique(tmp_path: Path) -> None:
    async def run() -> list[Request]:
        async with serving(directory(tmp_path)) as server, raw(server) as one, raw(server) as two:
            for client in (one, two):
                await client.event(client.ask(id="same", prompt_ids=[5], n=2, max_tokens=1), Finished)
            return server.engine.seen

    seen = asyncio.run(run())
    assert len({request.id for request in seen}) == 4

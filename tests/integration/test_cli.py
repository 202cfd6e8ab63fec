"""The commands as processes, against a server that speaks the protocol and has no model."""

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from protocol.runtime_dir import InstanceDirectory, runtime_root
from tests.integration.conftest import StartFake


@pytest.fixture
def tandem(
    environment: dict[str, str], tmp_path: Path
) -> Callable[..., subprocess.CompletedProcess[bytes]]:
    def call(*arguments: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
        command = [sys.executable, "-P", "-m", "cli", *arguments]
        return subprocess.run(
            command, input=stdin, capture_output=True, env=environment, cwd=tmp_path, timeout=60
        )

    return call


Tandem = Callable[..., subprocess.CompletedProcess[bytes]]


def test_a_conversation_from_a_pipe(start_fake: StartFake, tandem: Tandem) -> None:
    start_fake()
    done = tandem("chat", stdin=b"hello\n\nsay 3\nturns?\n/system be brief\nsystem?\n")
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode().splitlines() == ["echo: 'hello'", "word0 word1 word2 ", "5", "be brief"]
    assert done.stderr == b"system prompt set\n"


def test_the_temperature_of_a_chat(start_fake: StartFake, tandem: Tandem) -> None:
    start_fake()
    done = tandem("chat", "--temperature", "0", stdin=b"sampling?\n")
    assert done.stdout.startswith(b"t=0.0 ")
    refused = tandem("chat", "--temperature", "-1", "--json", stdin=b"sampling?\n")
    assert refused.returncode == 1
    assert json.loads(refused.stdout)["error"]["field"] == "temperature"


def test_chat_as_one_json_object(start_fake: StartFake, tandem: Tandem) -> None:
    start_fake()
    done = tandem("chat", "--json", stdin=b"hello\nturns?\n")
    assert done.returncode == 0
    assert done.stderr == b""
    found = json.loads(done.stdout)
    assert [m["content"] for m in found["messages"]] == ["hello", "echo: 'hello'", "turns?", "3"]


def test_a_refused_line_is_told_and_the_rest_answered(start_fake: StartFake, tandem: Tandem) -> None:
    start_fake()
    done = tandem("chat", stdin=b"fail\n\xff\xfe\nturns?\n")
    assert done.returncode == 1
    assert done.stdout == b"1\n"
    assert done.stderr.decode().splitlines() == [
        "the queue is full, try later",
        "line 2 is not UTF-8: invalid start byte at byte 0",
    ]


def test_run_from_a_running_server(start_fake: StartFake, tandem: Tandem) -> None:
    start_fake()
    assert tandem("run", "fake", "say 4", "--name", "fake").stdout == b"word0 word1 word2 word3 \n"
    done = tandem("run", "fake", "hi", "--name", "fake", "--json", "--temperature", "0", "--seed", "3")
    assert done.returncode == 0
    found = json.loads(done.stdout)
    assert found["text"] == "echo: 'hi'"
    assert found["prompt_ids"] == [1, 2, 3]
    assert found["token_ids"] == [0]
    assert found["finish_reason"] == "stop"
    assert found["logprobs"] is None
    assert set(found["timings"]) == {"queue_s", "first_token_s", "total_s"}
    ids = tandem("run", "fake", "--prompt-ids", "9,8", "--name", "fake", "--json")
    assert json.loads(ids.stdout)["prompt_ids"] == [9, 8]


def test_models_without_template_or_tokenizer(start_fake: StartFake, tandem: Tandem) -> None:
    start_fake("--name", "plain", "--no-template")
    start_fake("--name", "ids", "--no-tokenizer")
    refused = tandem("run", "fake", "hi", "--name", "plain")
    assert refused.returncode == 1
    assert b"--raw" in refused.stderr
    assert tandem("run", "fake", "hi", "--raw", "--name", "plain").stdout == b"echo: 'hi'\n"
    assert b"--raw" in tandem("chat", "--name", "plain").stderr
    for arguments in (("hi",), ("hi", "--raw")):
        refused = tandem("run", "fake", *arguments, "--name", "ids", "--json")
        assert refused.returncode == 1
        assert "--prompt-ids" in json.loads(refused.stdout)["error"]["message"]
    assert tandem("run", "fake", "--prompt-ids", "5", "--name", "ids").stdout == b"0 \n"


def test_several_servers_need_a_name(start_fake: StartFake, tandem: Tandem) -> None:
    start_fake("--name", "a")
    start_fake("--name", "b")
    done = tandem("chat", "--json")
    assert done.returncode == 1
    assert "a, b" in json.loads(done.stdout)["error"]["message"]
    assert tandem("chat", "--name", "b", stdin=b"hi\n").stdout == b"echo: 'hi'\n"


def test_a_server_that_dies_mid_answer(
    start_fake: StartFake, environment: dict[str, str], tmp_path: Path
) -> None:
    server = start_fake()
    chat = subprocess.Popen(
        [sys.executable, "-P", "-m", "cli", "chat"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
        cwd=tmp_path,
    )
    assert chat.stdin is not None
    assert chat.stdout is not None
    chat.stdin.write(b"say 100000\n")
    chat.stdin.flush()
    assert chat.stdout.read(12) == b"word0 word1 "
    server.kill()
    _, errors = chat.communicate(timeout=30)
    assert chat.returncode == 1
    assert b"Error: " in errors
    assert b"Traceback" not in errors


def test_ctrl_c_of_run_cancels_and_exits_130(
    start_fake: StartFake, tandem: Tandem, environment: dict[str, str], tmp_path: Path
) -> None:
    start_fake()
    run = subprocess.Popen(
        [sys.executable, "-P", "-m", "cli", "run", "fake", "say 100000", "--name", "fake"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
        cwd=tmp_path,
    )
    assert run.stdout is not None
    assert run.stdout.read(12) == b"word0 word1 "
    run.send_signal(signal.SIGINT)
    _, errors = run.communicate(timeout=30)
    assert run.returncode == 130
    assert b"Traceback" not in errors
    stats = tandem("chat", stdin=b"/stats\n").stderr.decode()
    assert "0 running" in stats
    assert "1 cancelled" in stats


def test_stop_drains_and_waits(start_fake: StartFake, tandem: Tandem) -> None:
    server = start_fake()
    done = tandem("stop", "fake", "--json")
    assert done.returncode == 0
    assert json.loads(done.stdout)["stopped"] is True
    assert server.wait(timeout=1) == 0
    assert tandem("ps").stdout == b"no server runs\n"
    assert tandem("stop", "fake").returncode == 1


def test_stop_now_ends_one_that_does_not_drain(
    start_fake: StartFake, tandem: Tandem, environment: dict[str, str]
) -> None:
    server = start_fake("--ignore-term")
    done = tandem("stop", "fake", "--now")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(b"fake is stopped")
    assert server.wait(timeout=1) == -signal.SIGKILL
    assert InstanceDirectory(runtime_root(environment), "fake").facts() is None

"""What the commands print and how they exit, without a server."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

import cli
from protocol.runtime_dir import InstanceDirectory, InstanceFacts, runtime_root
from tests.tiny_llama import write_tiny_llama

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    runtime = tmp_path / "run"
    runtime.mkdir(mode=0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(runtime))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


def call(*arguments: str, stdin: str = "") -> Result:
    return CliRunner().invoke(cli.main, arguments, input=stdin)


def publish(name: str, **changes: object) -> InstanceDirectory:
    directory = InstanceDirectory(runtime_root(os.environ), name)
    directory.acquire()
    facts = {
        "name": name,
        "pid": os.getpid(),
        "model": "smollm2-135m",
        "tp": 3,
        "pp": 2,
        "state": "ready",
        "memory_bytes": 5 << 29,
        "address": directory.gateway_address,
        "started_at": 1.0,
    }
    directory.publish(InstanceFacts(**(facts | changes)))  # type: ignore[arg-type]
    return directory


def error_of(done: Result) -> dict[str, str]:
    assert done.exit_code == 1
    assert done.stdout.count("\n") == 1
    found: dict[str, str] = json.loads(done.stdout)["error"]
    assert set(found) == {"code", "message", "field"}
    return found


def test_help_lists_the_commands() -> None:
    done = call("--help")
    assert done.exit_code == 0
    for command in ("serve", "chat", "run", "plan", "pull", "ps", "stop"):
        assert f"  {command} " in done.output
        assert call(command, "--help").exit_code == 0


@pytest.mark.parametrize("arguments", [("--help",), ("ps",), ("stop", "nobody")])
def test_small_commands_answer_at_once_and_without_torch(arguments: tuple[str, ...]) -> None:
    code = (
        "import sys, cli\n"
        "try: cli.main(sys.argv[1:])\n"
        'finally: sys.stderr.write(f\'loaded {sorted({"torch", "rich", "numpy"} & set(sys.modules))}\')'
    )
    seconds = []
    for _ in range(3):
        started = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=30
        )
        seconds.append(time.monotonic() - started)
        assert done.stderr.endswith("loaded []"), done.stderr
    # 0.1 s on an idle core; the best of three, as other tests run beside this one.
    assert min(seconds) < 0.3


def test_ps_shows_what_runs() -> None:
    assert call("ps").stdout == "no server runs\n"
    assert json.loads(call("ps", "--json").stdout) == {"instances": []}
    one, two = publish("one"), publish("two", state="draining", tp=1, pp=1)
    try:
        lines = call("ps").stdout.splitlines()
        assert lines[0].split() == ["NAME", "MODEL", "LAYOUT", "STATE", "MEMORY"]
        assert lines[1].split() == ["one", "smollm2-135m", *["tp", "3", "pp", "2", "ready", "2.5", "GiB"]]
        assert "draining" in lines[2]
        done = json.loads(call("ps", "--json").stdout)
        assert [(i["name"], i["state"]) for i in done["instances"]] == [
            ("one", "ready"),
            ("two", "draining"),
        ]
    finally:
        one.release()
        two.release()


def test_stop_of_a_server_that_does_not_run_names_those_that_do() -> None:
    one = publish("one")
    try:
        found = error_of(call("stop", "other", "--json"))
        assert found["code"] == "not_found"
        assert found["field"] == "name"
        assert "one" in found["message"]
        human = call("stop", "other")
        assert human.exit_code == 1
        assert human.stdout == ""
        assert human.stderr.startswith("Error: ")
        assert "Traceback" not in human.stderr
    finally:
        one.release()


@pytest.mark.parametrize(
    "arguments",
    [
        ("chat", "--json", "--tp", "2"),
        ("run", "m", "--json"),
        ("run", "m", "hello", "--prompt-ids", "1", "--json"),
        ("run", "m", "hello", "--name", "n", "--tp", "2", "--json"),
    ],
)
def test_a_wrong_command_line_exits_2(arguments: tuple[str, ...]) -> None:
    done = call(*arguments)
    assert done.exit_code == 2
    assert json.loads(done.stdout)["error"]["code"] == "usage"
    human = call(*(a for a in arguments if a != "--json"))
    assert human.exit_code == 2
    assert human.stdout == ""
    assert "Error: " in human.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ("run",),
        ("stop",),
        ("pull",),
        ("serve",),
        ("nope",),
        ("chat", "--tp", "0"),
        ("run", "m", "x", "--dtype", "int1"),
    ],
)
def test_click_refuses_with_2(arguments: tuple[str, ...]) -> None:
    assert call(*arguments).exit_code == 2


def test_chat_and_run_without_a_server_say_how_to_get_one() -> None:
    assert error_of(call("chat", "--json"))["code"] == "not_found"
    assert "tandem serve" in error_of(call("chat", "--json"))["message"]
    assert error_of(call("run", "m", "hi", "--name", "n", "--json"))["code"] == "not_found"


def test_prompt_ids_are_numbers() -> None:
    found = error_of(call("run", "m", "--prompt-ids", "1,two", "--name", "n", "--json"))
    assert (found["code"], found["field"]) == ("invalid_request", "prompt_ids")


def test_pull_of_a_directory_and_of_nothing(private: Path) -> None:
    (private / "model").mkdir()
    path = str(private / "model")
    assert json.loads(call("pull", path, "--json").stdout) == {"name": path, "path": path}
    assert call("pull", path).stdout == f"{path}\n"
    found = error_of(call("pull", str(private / "none"), "--json"))
    assert found["code"] == "unknown_model"
    assert "smollm2-135m" in found["message"]


def test_plan_shows_each_rank_and_what_would_fit(private: Path) -> None:
    model = str(write_tiny_llama(private / "tiny"))
    done = json.loads(call("plan", "--model", model, "--tp", "2", "--pp", "2", "--json").stdout)
    assert [rank["layers"] for rank in done["ranks"]] == [[0, 1], [0, 1], [1, 2], [1, 2]]
    for rank in done["ranks"]:
        assert sum(line["predicted_bytes"] for line in rank["lines"]) <= rank["budget_bytes"]
    lines = call("plan", "--model", model, "--tp", "2", "--memory", "1.5").stdout.splitlines()
    assert lines[0].split()[:3] == ["RANK", "LAYERS", "WEIGHTS"]
    assert [line.split()[:2] for line in lines[1:3]] == [["0", "0-1"], ["1", "0-1"]]
    assert lines[1].endswith("768.0 MiB")
    assert error_of(call("plan", "--model", model, "--tp", "3", "--json"))["code"] == "impossible_layout"
    small = error_of(call("plan", "--model", model, "--memory", "0.01", "--json"))
    assert (small["code"], small["field"]) == ("does_not_fit", "memory")
    absent = error_of(call("plan", "--model", "smollm2-135m", "--json"))
    assert "tandem pull smollm2-135m" in absent["message"]


@pytest.mark.parametrize("size", ["nan", "-1", "0", "inf", "much"])
def test_a_memory_that_is_no_size_is_refused(size: str) -> None:
    done = call("plan", "--model", "m", f"--memory={size}", "--json")
    assert done.exit_code == 2
    assert "memory" in json.loads(done.stdout)["error"]["message"]


def test_an_unwritable_cache_is_told(private: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (private / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(private / "file"))
    found = error_of(call("pull", "smollm2-135m", "--json"))
    assert found["code"] == "storage"
    assert str(private / "file") in found["message"]


def test_a_runtime_directory_of_others_is_refused(private: Path) -> None:
    (private / "run" / "tandem").mkdir(mode=0o755)
    (private / "run" / "tandem").chmod(0o755)
    assert error_of(call("ps", "--json"))["code"] == "storage"


def test_ctrl_c_exits_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_root: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "running_instances", interrupted)
    assert call("ps").exit_code == 130


@pytest.mark.parametrize("size", ["3", "0.7", "1.23456789"])
def test_a_server_that_is_started_is_given_the_same_memory(size: str) -> None:
    parameter = cli._Gib()
    given = parameter.convert(size, None, None)
    command = cli._serve_command("m", "n", {"memory": given, "tp": 3, "pp": None})
    assert command[-4:-2] == ["--memory", command[-3]]
    assert parameter.convert(command[-3], None, None) == given
    assert command[-2:] == ["--tp", "3"]

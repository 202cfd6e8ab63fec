"""A server in the background: its word, its end, and that it does not outlive whoever started it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest

from protocol.errors import ErrorInfo, InstanceFailedError
from protocol.runtime_dir import InstanceFacts
from tandem.instances import children_of, wait_ended
from tandem.local_server import BootFailedError, LocalServer

FACTS = InstanceFacts("n", 1, "m", 1, 1, "ready", 0, "ipc:///x", 0.0)
ROOT = Path(__file__).parents[2]
PARENT = """
import sys
from tandem.local_server import LocalServer
server = LocalServer([sys.executable, "-c", sys.argv[1]])
server.wait_ready()
print(server.pid, flush=True)
sys.stdin.read()
"""


def child(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def ready(then: str) -> str:
    return f"import signal, sys\nprint({msgspec.json.encode(FACTS).decode()!r}, flush=True)\n{then}"


WATCHING = "from tandem.local_server import end_with\nend_with(0)\n"


def test_ready_is_the_servers_own_word_and_the_end_is_in_order(tmp_path: Path) -> None:
    mark = tmp_path / "drained"
    code = f"def drain(*_):\n    open({str(mark)!r}, 'w').close()\n    sys.exit(0)\n"
    code = "import signal, sys\n" + code + "signal.signal(signal.SIGTERM, drain)\n"
    with LocalServer(child(code + ready("signal.pause()"))) as server:
        assert server.wait_ready() == FACTS
        assert not server.ended()
        assert os.getsid(server.pid) == server.pid
        pid = server.pid
    assert mark.exists()
    assert not Path(f"/proc/{pid}").exists()
    server.stop()


def test_the_error_of_the_boot_is_raised_with_the_exit_code() -> None:
    error = '{"error":{"code":"does_not_fit","message":"too small","field":"memory"}}'
    with (
        LocalServer(child(f"import sys\nprint({error!r})\nsys.exit(1)")) as server,
        pytest.raises(BootFailedError, match=r"exit code 1") as caught,
    ):
        server.wait_ready()
    assert caught.value.info() == ErrorInfo("does_not_fit", "too small", "memory")


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("import sys; sys.exit(3)", "exit code 3"),
        ("import os; os.kill(os.getpid(), 9)", "killed by signal 9"),
    ],
)
def test_an_end_without_a_word_is_told(code: str, words: str) -> None:
    with LocalServer(child(code)) as server, pytest.raises(InstanceFailedError, match=words):
        server.wait_ready()


def test_one_that_does_not_drain_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tandem.local_server.STOP_S", 0.2)
    code = ready("signal.pause()").replace(
        "import signal, sys\n", "import signal, sys\nsignal.signal(15, signal.SIG_IGN)\n"
    )
    with LocalServer(child(code)) as server:
        server.wait_ready()
        started = time.monotonic()
    assert time.monotonic() - started < 5


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_it_ends_with_whoever_started_it(how: signal.Signals) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, ready(WATCHING + "signal.pause()")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=ROOT,
    )
    assert parent.stdin is not None
    assert parent.stdout is not None
    with parent.stdin, parent.stdout:
        server = int(parent.stdout.readline())
        pidfd = os.pidfd_open(server)
        try:
            assert children_of(parent.pid) == [server]
            parent.send_signal(how)
            assert wait_ended(pidfd, 5)
        finally:
            os.close(pidfd)
            parent.wait()


def test_a_process_without_children_has_none() -> None:
    assert children_of(2**22 + 1) == []

"""A server of a benchmark's own, started as a user would, and requests to it through the SDK."""

import os
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from benchmarks.process_cpu import ServerCpu
from benchmarks.timed_streams import Request, run_streams
from benchmarks.token_times import StreamTimes
from protocol.client import Info
from tandem import Client
from tandem.local_server import LocalServer


class Served:
    """A server of its own for a measurement, and the ways to load it. Use as a context manager."""

    def __init__(
        self, model: Path, devices: str, arguments: Sequence[str], draw: random.Random, limit_s: float
    ) -> None:
        """``draw``: for prompts. ``limit_s``: how long what is sent at a time may take."""
        # Found from anywhere; a checkout need not be installed.
        paths = [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
        self._environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
        self._draw, self._limit_s = draw, limit_s
        self._server = LocalServer(
            (
                *("env", f"PYTHONPATH={self._environment['PYTHONPATH']}"),
                *(sys.executable, "-P", "-m", "cli", "serve", "--json", "--while-stdin"),
                *("--model", str(model), "--devices", devices, "--name", f"gpu-serve-{os.getpid()}"),
                *arguments,
            )
        )
        self._began_s = time.monotonic()

    def __enter__(self) -> Self:
        try:
            self.address = self._server.wait_ready().address
            self.boot_s = time.monotonic() - self._began_s
            with Client(address=self.address) as client:
                self.info: Info = client.info()
        except BaseException:
            self._server.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.stop()

    def request(
        self,
        prompt_tokens: int,
        answer_tokens: int,
        delay_s: float = 0.0,
        *,
        is_background: bool = False,
    ) -> Request:
        """Return a request whose prompt nobody has sent before."""
        ids = [self._draw.randrange(3, self.info.vocab_size) for _ in range(prompt_tokens)]
        return Request(
            prompt_ids=ids, max_tokens=answer_tokens, delay_s=delay_s, is_background=is_background
        )

    def send(self, requests: Sequence[Request]) -> tuple[list[StreamTimes], ServerCpu]:
        """Send requests and return what came, and the server's processor time meanwhile."""
        if len(requests) > self.info.max_rows:
            raise SystemExit(
                f"{len(requests)} requests at a time are to be measured and the server runs "
                f"{self.info.max_rows}: pass it -- --max-rows {len(requests)}, or ask for fewer --rows"
            )
        cpu = ServerCpu(self._server.pid)
        streams = run_streams(self.address, requests, self._environment, cpu.sample, self._limit_s)
        for stream, request in zip(streams, requests, strict=True):
            asked = request["max_tokens"]
            assert stream.tokens == asked or request["is_background"], (stream.tokens, asked)
        return streams, cpu

    def idle_percent(self, seconds: float) -> dict[str, float]:
        """Return what each role uses of a core while nothing is asked."""
        time.sleep(1.0)
        cpu = ServerCpu(self._server.pid)
        cpu.sample()
        start = time.monotonic()
        time.sleep(seconds)
        end = time.monotonic()
        cpu.sample()
        return {role: used / (end - start) * 100 for role, used in cpu.between(start, end).items()}

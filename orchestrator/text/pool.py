"""The pool of text helper processes, seen from the orchestrator."""

import asyncio
import os
import sys
from asyncio.subprocess import PIPE, Process
from pathlib import Path

from protocol.errors import InvalidRequestError, QueueFullError, TandemError, UnavailableError
from protocol.text import (
    LENGTH_BYTES,
    MAX_TEXT_FRAME_BYTES,
    EncodeChat,
    Encoded,
    HelperReady,
    RefusalKind,
    Refused,
    TextAnswer,
    TextJob,
    from_helper_codec,
    to_helper_codec,
)

START_DEADLINE_S = 30.0
MAX_WAITING = 1024


class HelperPool:
    """Owns the helpers: at most ``size``, started when needed, killed at a deadline and then replaced.

    A cancelled job goes on in its helper, so that cancelling costs no process; its answer is dropped.
    """

    def __init__(self, directory: Path, *, size: int, deadline_s: float, memory_bytes: int) -> None:
        self._directory = directory
        self._deadline_s = deadline_s
        self._memory_bytes = memory_bytes
        self._free = asyncio.Semaphore(size)
        self._idle: list[_Helper] = []
        self._jobs: set[asyncio.Task[Encoded]] = set()
        self._starting: asyncio.Task[None] | None = None
        self._closed = False

    def prestart(self) -> None:
        """Start one helper in the background, so that the first job need not wait for it."""
        self._starting = asyncio.create_task(self._prestart())

    async def _prestart(self) -> None:
        async with self._free:
            try:
                self._idle.append(await self._start())
            except TandemError:
                # Nobody waits for this one: the first job starts its own and reports what is wrong.
                return

    async def run(self, job: TextJob) -> Encoded:
        """Return a job's answer.

        Errors: ``InvalidRequestError`` naming ``messages`` or ``prompt`` where the template or tokenizer
        refused, or took too long or too much memory; ``QueueFullError`` where too many jobs wait.
        """
        if self._closed:
            raise UnavailableError("the server is stopping: no text is tokenised any more")
        if len(self._jobs) >= MAX_WAITING:
            raise QueueFullError(f"{MAX_WAITING} texts wait to be tokenised: try again later")
        task = asyncio.create_task(self._run(job))
        self._jobs.add(task)
        task.add_done_callback(self._forget)
        return await asyncio.shield(task)

    def _forget(self, task: asyncio.Task[Encoded]) -> None:
        self._jobs.discard(task)
        if not task.cancelled():
            task.exception()  # Seen: whoever asked may be gone.

    async def _run(self, job: TextJob) -> Encoded:
        if self._starting is not None and not self._starting.done():
            await asyncio.wait([self._starting])
        async with self._free:
            helper = await self._take()
            try:
                answer = await asyncio.wait_for(helper.ask(job), self._deadline_s)
            except TimeoutError:
                await helper.kill()
                raise _took_too_much(job, f"{self._deadline_s:g} s") from None
            except (EOFError, OSError):
                status = await helper.kill()
                raise _took_too_much(job, f"its memory or time (its process ended with {status})") from None
            except BaseException:
                await helper.kill()
                raise
            match answer:
                case Encoded():
                    self._idle.append(helper)
                    return answer
                case Refused(kind=RefusalKind.MEMORY):
                    await helper.kill()
                    raise _took_too_much(job, f"{self._memory_bytes >> 20} MiB of memory")
                case Refused(message=message):
                    self._idle.append(helper)
                    raise InvalidRequestError(message, field=_field(job))
                case _:
                    await helper.kill()
                    raise UnavailableError(f"a text helper answered {type(answer).__name__} to a job")

    async def _take(self) -> "_Helper":
        while self._idle:
            helper = self._idle.pop()
            if helper.is_alive:
                return helper
            await helper.kill()
        return await self._start()

    async def _start(self) -> "_Helper":
        spawning = asyncio.create_task(self._spawn())
        try:
            process = await asyncio.shield(spawning)
        except asyncio.CancelledError:
            # A half-made process would be nobody's: it takes a moment to be made, and is then ended.
            await _Helper(await spawning).kill()
            raise
        helper = _Helper(process)
        try:
            ready = await asyncio.wait_for(helper.read(), START_DEADLINE_S)
        except (EOFError, OSError, TimeoutError) as error:
            status = await helper.kill()
            raise UnavailableError(
                f"a text helper did not start ({type(error).__name__}, exit status {status}): "
                "see the server's log"
            ) from None
        except BaseException:
            await helper.kill()
            raise
        assert isinstance(ready, HelperReady)
        return helper

    async def _spawn(self) -> Process:
        limits = (str(self._memory_bytes), str(int(self._deadline_s) + 1))
        return await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", "-m", "orchestrator.text.helper"),
            *(str(self._directory), str(os.getpid()), *limits),
            stdin=PIPE,
            stdout=PIPE,
            # A terminal's Ctrl-C is for the server alone, which then ends its helpers in order.
            start_new_session=True,
        )

    async def close(self) -> None:
        """Kill the helpers and wait until they are gone."""
        self._closed = True
        tasks: list[asyncio.Task[Encoded] | asyncio.Task[None]] = [*self._jobs]
        if self._starting is not None:
            tasks.append(self._starting)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        while self._idle:
            await self._idle.pop().kill()


class _Helper:
    """One process and its two pipes."""

    def __init__(self, process: Process) -> None:
        self._process = process
        self._jobs = to_helper_codec()
        self._answers = from_helper_codec()

    @property
    def is_alive(self) -> bool:
        """Whether it can take a job, as far as is known."""
        assert self._process.stdout is not None
        return self._process.returncode is None and not self._process.stdout.at_eof()

    async def ask(self, job: TextJob) -> TextAnswer:
        assert self._process.stdin is not None
        frame = self._jobs.encode(job)
        self._process.stdin.write(len(frame).to_bytes(LENGTH_BYTES, "little") + frame)
        await self._process.stdin.drain()
        return await self.read()

    async def read(self) -> TextAnswer:
        assert self._process.stdout is not None
        size = int.from_bytes(await self._process.stdout.readexactly(LENGTH_BYTES), "little")
        if size > MAX_TEXT_FRAME_BYTES:
            raise EOFError(f"a frame of {size} bytes")
        return self._answers.decode(await self._process.stdout.readexactly(size))

    async def kill(self) -> int:
        """Kill the process, wait for its end and return its status."""
        if self._process.stdout is not None and self._process.stdout.at_eof():
            # It is ending by itself: a signal now would race with its reaping and lose its status.
            try:
                return await asyncio.wait_for(self._process.wait(), 1.0)
            except TimeoutError:
                pass
        if self._process.returncode is None:
            try:
                self._process.kill()
            except ProcessLookupError:
                pass  # It has just ended by itself.
        if self._process.stdin is not None:
            self._process.stdin.close()
        return await self._process.wait()


def _field(job: TextJob) -> str:
    return "messages" if isinstance(job, EncodeChat) else "prompt"


def _took_too_much(job: TextJob, what: str) -> InvalidRequestError:
    doing = (
        "rendering the model's chat template" if isinstance(job, EncodeChat) else "tokenising the prompt"
    )
    return InvalidRequestError(
        f"{doing} took more than {what}: send less text, or prompt_ids", field=_field(job)
    )

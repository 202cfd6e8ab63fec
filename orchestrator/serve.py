"""Serve one instance: plan it, boot it, open it, and end it, whatever happens between.

Ends in order (exit code 0): SIGTERM or the first Ctrl-C, which drain. Ends with an error (1): a
``TandemError`` of the boot, or the loss of a rank. A signal before it is ready, or a second Ctrl-C, ends at
once (128 + its number).
"""

import asyncio
import gc
import signal
import time
import traceback
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

from orchestrator.boot_report import Spans, make_report, process_start_s, write_report
from orchestrator.budget import device_kind
from orchestrator.config import ServeConfig
from orchestrator.display import Display
from orchestrator.engine import Engine
from orchestrator.instance import Blueprint, Home, make_abort_page, make_arenas
from orchestrator.launcher import Launcher, LaunchOrder, LocalLauncher, rank_environment
from orchestrator.ranks import RankEvents, Ranks
from orchestrator.supervisor import RankLostError, StepClock, fault_error, restart_policy, status_words
from protocol.control import ExpertLoad, Fault, StepResult
from protocol.errors import InstanceFailedError, TandemError, UnavailableError

if TYPE_CHECKING:
    from orchestrator.gateway import Gateway
    from orchestrator.text import TextService

FIRST_EPOCH = 1


def run(config: ServeConfig, display: Display, launcher: Launcher | None = None) -> int:
    """Serve on an event loop of this process's own, as its only business; return the exit code."""
    began_s = process_start_s()
    import setproctitle
    import uvloop

    setproctitle.setproctitle(f"tandem: {config.name} orchestrator")
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(serve(config, display, launcher, began_s=began_s))


async def serve(
    config: ServeConfig, display: Display, launcher: Launcher | None = None, *, began_s: float | None = None
) -> int:
    """Serve until told to stop, or until that cannot be; return the exit code. Leaves nothing behind.

    ``began_s``: where the waterfall begins, monotonic. Takes SIGTERM and SIGINT over while it runs.
    """
    try:
        return await _serve(_Server(config, display, launcher or LocalLauncher(), Spans(began_s)))
    except TandemError as error:
        display.failed(error)
        return 1
    finally:
        display.close()


async def _serve(server: "_Server") -> int:
    task = asyncio.get_running_loop().create_task(server.run())
    signals = _Signals(task, server)
    try:
        return await task
    except asyncio.CancelledError:
        if signals.code is None:
            raise
        return signals.code
    finally:
        signals.close()


class _Signals:
    """What SIGTERM and SIGINT ask for."""

    def __init__(self, task: "asyncio.Task[int]", server: "_Server") -> None:
        self.code: int | None = None
        """Set where a signal ends the server at once."""
        self._task, self._server = task, server
        self._loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            self._loop.add_signal_handler(number, self._take, number)

    def close(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._loop.remove_signal_handler(number)

    def _take(self, number: signal.Signals) -> None:
        engine = self._server.engine
        if engine is not None and engine.state == "ready":
            self._server.drain(number)
        elif self.code is None and (engine is None or number == signal.SIGINT):
            self.code = 128 + number
            self._task.cancel()


class _Server:
    """Owns one instance from its lock to its end."""

    def __init__(self, config: ServeConfig, display: Display, launcher: Launcher, spans: Spans) -> None:
        self._config, self._display, self._launcher, self._spans = config, display, launcher, spans
        self._deadlines = config.deadlines
        self._policy = restart_policy(config.max_restarts)
        self._gateway: Gateway | None = None
        self._home = Home(config)
        self._lost: Fault | None = None
        self._statuses: dict[int, int] = {}
        self.engine: Engine | None = None
        """Set while requests are taken or drained."""

    async def run(self) -> int:
        """Live."""
        with self._home:
            try:
                async with AsyncExitStack() as stack:
                    return await self._run(stack)
            except RankLostError as lost:
                error = fault_error(lost.fault)
            except TandemError as known:
                error = known
            finally:
                self._note_statuses()
            self._home.say("failed", error.message)
            raise error

    async def _run(self, stack: AsyncExitStack) -> int:
        with self._spans.span("plan"):
            blueprint = Blueprint.of(self._config)
            arenas = await stack.enter_async_context(AsyncExitStack())
            arena_fds = make_arenas(blueprint.arena_bytes, arenas)
            page_fd = make_abort_page(stack) if blueprint.waits_on_devices else None
        self._home.planned_bytes = blueprint.planned_bytes
        self._home.say("starting")
        with self._spans.span("launch"):
            ranks = await stack.enter_async_context(self._launch(blueprint, arena_fds, page_fd))
            self._statuses = ranks.statuses
        self._display.boot_begins(blueprint.title, blueprint.topology.world_size)
        gateway_stack = await stack.enter_async_context(AsyncExitStack())
        try:
            engine = await self._boot(blueprint, ranks, gateway_stack)
            if device_kind(self._config.devices) != "cpu":
                await arenas.aclose()  # The weights have gone on to the devices.
            await self._serve(engine)
        except BaseException as error:
            # Everyone is told before the ranks are ended: that can take seconds.
            self._give_up(error)
            await gateway_stack.aclose()
            if isinstance(error, RankLostError | TandemError | asyncio.CancelledError):
                raise
            traceback.print_exception(error)
            raise InstanceFailedError(f"the orchestrator has failed: {error!r}") from error
        await gateway_stack.aclose()
        await ranks.end(politely=True)
        return 0

    def _launch(self, blueprint: Blueprint, arena_fds: list[int], page_fd: int | None) -> Ranks:
        order = LaunchOrder(
            address=self._home.directory.control_address,
            epoch=FIRST_EPOCH,
            world_size=blueprint.topology.world_size,
            inherited_fds=(*arena_fds, *(() if page_fd is None else (page_fd,))),
            environment=rank_environment(self._config.environment, blueprint.threads),
        )
        events = RankEvents(
            on_result=self._on_result,
            on_lost=self._on_lost,
            on_load=self._on_load,
            on_progress=self._display.progress,
            on_output=self._display.output,
        )
        rendezvous = self._home.directory.rendezvous(FIRST_EPOCH)
        boots = blueprint.boots(FIRST_EPOCH, arena_fds, rendezvous, page_fd)
        return Ranks(self._launcher, order, boots, self._deadlines, events)

    async def _boot(self, blueprint: Blueprint, ranks: Ranks, stack: AsyncExitStack) -> Engine:
        """Wait for the ranks and the tokenizer, then take requests."""
        texts = asyncio.get_running_loop().create_task(self._start_text(stack))
        try:
            ready = await ranks.boot()
            blueprint = blueprint.settled(ready)
            text = await texts
        except BaseException:
            texts.cancel()
            await asyncio.wait([texts])
            raise
        from orchestrator.gateway import Gateway

        engine = Engine(
            blueprint.scheduler(FIRST_EPOCH),
            ranks.send,
            StepClock(ready, self._deadlines),
            sampling_rank=blueprint.topology.sampling_rank,
        )
        with self._spans.span("open"):
            report = make_report(
                self._config.name,
                self._config.model_name,
                self._config.dtype,
                blueprint.topology,
                blueprint.plan,
                ready,
                self._spans,
            )
            info = blueprint.info(report, text)
            gateway = Gateway(
                self._home.directory.gateway_address,
                engine,
                text,
                info,
                end_token_ids=frozenset(blueprint.model.eos_token_ids),
            )
            await gateway.open()
            stack.callback(gateway.close)
        if self._config.boot_report is not None:
            write_report(report, self._config.boot_report)
        self._gateway, self._info = gateway, info
        self.engine = engine
        if self._lost is not None:
            engine.on_lost(self._lost)
        # What a boot leaves stays: a collection that went through it would hold every stream up.
        gc.collect()
        gc.freeze()
        self._display.ready(report, self._home.say("ready"))
        return engine

    async def _start_text(self, stack: AsyncExitStack) -> "TextService":
        # After the ranks are on their way: they import more than this does.
        from orchestrator.text import TextService

        began_s = time.monotonic()
        text = await TextService.start(self._config.model)
        self._spans.add("tokenizer", began_s)
        stack.push_async_callback(text.close)
        return text

    async def _serve(self, engine: Engine) -> None:
        """Serve until drained; ``RankLostError`` where a rank is lost and the policy gives up."""
        try:
            await engine.run()
        except RankLostError as lost:
            gives_up = not self._policy.may_restart(lost.fault, has_committed=engine.has_committed)
            assert gives_up, "no policy that restarts is accepted yet"
            raise

    def _note_statuses(self) -> None:
        unclean = {rank: status for rank, status in sorted(self._statuses.items()) if status}
        if unclean:
            told = ", ".join(f"{rank} with {status_words(status)}" for rank, status in unclean.items())
            self._display.note(f"ranks ended: {told}")

    def _on_result(self, result: StepResult) -> None:
        if self.engine is not None:
            self.engine.on_result(result)

    def _on_load(self, load: ExpertLoad) -> None:
        if self.engine is not None:
            self.engine.on_load(load)

    def _on_lost(self, fault: Fault) -> None:
        if self.engine is not None:
            self.engine.on_lost(fault)
        else:
            self._lost = fault

    def drain(self, number: signal.Signals) -> None:
        """Take no new requests and end when those there are have."""
        import msgspec

        assert self.engine is not None
        assert self._gateway is not None
        engine = self.engine
        engine.drain()
        self._home.say("draining")
        self._gateway.update_info(msgspec.structs.replace(self._info, state="draining"))
        if engine.has_requests:
            self._display.note("draining: requests that run are finished; Ctrl-C again ends at once")
        elif number == signal.SIGINT:
            self._display.note("stopping")
        error = UnavailableError(
            f"the server is stopping, and its {self._deadlines.drain_s:g} s for requests that ran are over"
        )
        asyncio.get_running_loop().call_later(self._deadlines.drain_s, engine.end_requests, error)

    def _give_up(self, error: BaseException) -> None:
        """Tell every client and the facts file at once."""
        match error:
            case RankLostError():
                told = fault_error(error.fault)
            case TandemError():
                told = error
            case asyncio.CancelledError():
                told = UnavailableError("the server was told to end at once")
            case _:
                told = InstanceFailedError(f"the orchestrator has failed: {error!r}")
        if self.engine is not None:
            self.engine.give_up(told)
        if self._gateway is not None:
            # The engine does not know the streams that are still being tokenised.
            self._gateway.close(told)
        self._home.say("failed", told.message)

"""What an instance will be, worked out before anything is started; its files; and its arenas."""

import os
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

import msgspec

from kv.manager import KVManager
from loader.index import check_against, read_index
from models.layout import arena
from models.memory import MemoryPlan, plan_memory
from models.registry import load_spec
from models.spec import ModelSpec
from orchestrator.boot_report import BootReport, check_report_path, size
from orchestrator.budget import (
    check_left,
    device_kind,
    overheads,
    place_ranks,
    rank_budgets,
    threads_per_rank,
)
from orchestrator.config import ServeConfig
from orchestrator.scheduler import Scheduler, SchedulerConfig
from protocol.abort_page import make_page
from protocol.client import Info
from protocol.control import Boot, Ready
from protocol.errors import InvalidRequestError, MemoryBudgetError, StorageError, UnsupportedModelError
from protocol.runtime_dir import InstanceDirectory, InstanceFacts, InstanceState
from protocol.topology import Topology

if TYPE_CHECKING:
    from orchestrator.text import TextService


LEAST_CONTEXT = 2
"""A token of the prompt and one of the answer."""


class Blueprint(msgspec.Struct, frozen=True):
    """One instance, as arithmetic."""

    config: ServeConfig
    model: ModelSpec
    topology: Topology
    plan: MemoryPlan
    arena_bytes: tuple[int, ...]
    """By rank."""
    devices: tuple[str, ...]
    """By rank."""
    threads: int
    """Compute threads of a rank."""

    @classmethod
    def of(cls, config: ServeConfig) -> Self:
        """Work an instance out.

        Reads config.json and the checkpoint's headers, which must be this model's.
        Errors: ``ModelFormatError``, ``UnsupportedModelError``, ``StorageError``, ``LayoutError``,
        ``MemoryBudgetError``, ``InvalidRequestError``.
        """
        _check_limits(config)
        if config.boot_report is not None:
            check_report_path(config.boot_report)
        model = load_spec(config.model, config.dtype, config.kv_dtype)
        check_against(model, read_index(config.model))
        check_devices(model, config)
        topology = config.topology
        ranks = topology.world_size
        budgets = rank_budgets(config.devices, ranks, config.memory_bytes, config.environment)
        if device_kind(config.devices) == "cpu":
            check_left(config.memory_bytes)
        charged = overheads(config.devices)
        plan = plan_memory(model, topology, budgets, config.limits, charged, config.context)
        return cls(
            config=config,
            model=model,
            topology=topology,
            plan=plan,
            arena_bytes=tuple(arena(model, topology, plan.stages, rank).size for rank in range(ranks)),
            devices=tuple(place_ranks(config.devices, ranks)),
            threads=threads_per_rank(len(os.sched_getaffinity(0)), ranks),
        )

    @property
    def planned_bytes(self) -> int:
        """What all ranks together will take."""
        return sum(line.predicted_bytes for rank in self.plan.ranks for line in rank.lines)

    @property
    def title(self) -> str:
        """One line for people."""
        ranks = _counted(self.topology.world_size, "rank")
        return (
            f"{self.config.model_name}: {self.topology}, {ranks} of {_counted(self.threads, 'thread')}, "
            f"{size(sum(self.arena_bytes))} of weights"
        )

    @property
    def waits_on_devices(self) -> bool:
        """Whether kernels of its ranks wait for each other, so that they need an abort page."""
        return self.topology.world_size > 1 and device_kind(self.config.devices) != "cpu"

    def boots(
        self, epoch: int, arena_fds: Sequence[int], rendezvous: Path, page_fd: int | None
    ) -> list[Boot]:
        """Return what each rank is told."""
        config = self.config
        return [
            Boot(
                epoch=epoch,
                instance=config.name,
                rank=rank.rank,
                topology=self.topology,
                stages=[[layers.start, layers.stop] for layers in self.plan.stages],
                model_directory=str(config.model.resolve()),
                dtype=config.dtype,
                device=self.devices[rank.rank],
                arena_fds=list(arena_fds),
                kv_bytes=rank.block_bytes * self.plan.num_blocks,
                block_tokens=config.limits.block_tokens,
                num_blocks=self.plan.num_blocks,
                budget_bytes=rank.budget_bytes,
                device_ranks=self.devices.count(self.devices[rank.rank]),
                kernel_cache=str(config.kernel_cache or ""),
                max_rows=config.max_rows,
                step_tokens=config.step_tokens,
                logit_rows=config.logit_rows,
                context=self.plan.context,
                threads=self.threads,
                rendezvous=str(rendezvous),
                collective_timeout_s=config.deadlines.collective_s,
                page_fd=page_fd,
                kv_dtype=config.kv_dtype,
            )
            for rank in self.plan.ranks
        ]

    def settled(self, ready: Sequence[Ready]) -> Self:
        """Return the blueprint with as many blocks as every rank has.

        Errors: ``MemoryBudgetError`` where they do not hold the context that was asked for.
        """
        plan = self.plan.with_blocks(min(rank.num_blocks for rank in ready))
        wanted = self.config.context or LEAST_CONTEXT
        if plan.context < wanted:
            raise MemoryBudgetError(
                f"the ranks found room for {plan.kv_tokens} tokens of KV, {wanted} were asked: "
                "give more --memory, more ranks, or a smaller --context",
                field="memory",
            )
        return msgspec.structs.replace(self, plan=plan)

    def scheduler(self, epoch: int) -> Scheduler:
        """Return a scheduler with an empty pool."""
        config = self.config
        bounds = SchedulerConfig(
            epoch=epoch,
            max_rows=config.max_rows,
            step_tokens=config.step_tokens,
            context=self.plan.context,
            pp=config.pp,
            max_waiting=config.max_waiting,
        )
        manager = KVManager(self.plan.num_blocks, config.limits.block_tokens, self.model.kv_groups)
        return Scheduler(bounds, manager)

    def info(self, report: BootReport, text: "TextService") -> Info:
        """Return what clients are told of an instance that is ready."""
        tightest = self.plan.tightest.rank
        return Info(
            id="",
            instance=self.config.name,
            model=self.config.model_name,
            architecture=self.model.architecture,
            state="ready",
            tp=self.config.tp,
            pp=self.config.pp,
            dtype=self.config.dtype,
            context=self.plan.context,
            vocab_size=self.model.vocab_size,
            kv_tokens=self.plan.kv_tokens,
            max_rows=self.config.max_rows,
            has_tokenizer=text.has_tokenizer,
            has_chat_template=text.has_chat_template,
            memory=report.memory[tightest].lines,
            ep=self.config.ep,
            dcp=self.config.dcp,
            kv_dtype=self.model.kv_groups[0].dtype,
        )


def _counted(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def _check_limits(config: ServeConfig) -> None:
    for name in ("tp", "pp", "max_rows", "step_tokens", "logit_rows", "block_tokens", "max_waiting"):
        value = getattr(config, name)
        if value < 1:
            raise InvalidRequestError(f"{name} must be at least 1, not {value}", field=name)
    if config.context is not None and config.context < LEAST_CONTEXT:
        raise InvalidRequestError(
            f"a context of {config.context} holds no prompt and answer: ask for {LEAST_CONTEXT} or more",
            field="context",
        )
    if config.step_tokens < config.max_rows:
        raise InvalidRequestError(
            f"a step of {config.step_tokens} tokens cannot advance {config.max_rows} rows: "
            "raise --step-tokens or lower --max-rows",
            field="step_tokens",
        )


def check_devices(model: ModelSpec, config: ServeConfig) -> None:
    """Refuse what the kernels of a device kind do not do (``UnsupportedModelError``)."""
    if device_kind(config.devices) == "cpu":
        return
    if config.dcp > 1:
        raise UnsupportedModelError(
            f"KV kept by position over {config.dcp} ranks is served on CPUs: on GPUs take dcp 1",
            field="dcp",
        )
    local = [group for group in model.kv_groups if group.is_local]
    if local:
        raise UnsupportedModelError(
            f"layers that see {local[0].window} tokens alone ({local[0].kind}) are served on CPUs: on GPUs "
            "this model is not yet",
            field="devices",
        )
    page_tokens = config.topology.page_tokens(config.limits.block_tokens)
    for group in model.kv_groups:
        if group.dtype == "float8" and page_tokens % 8:
            raise UnsupportedModelError(
                f"a GPU reads float8 KV in pages of a multiple of 8 tokens, not of {page_tokens}",
                field="kv_dtype",
            )
        if group.dtype not in (model.dtype, "float8"):
            raise UnsupportedModelError(
                f"KV in {group.dtype} for a model in {model.dtype} is served on the CPU alone: on a GPU "
                "leave --kv-dtype out, or ask for float8",
                field="kv_dtype",
            )


def make_arenas(sizes: Sequence[int], stack: AsyncExitStack) -> list[int]:
    """Return a memfd of exactly so many bytes for each rank; the stack closes them.

    Errors: ``StorageError``.
    """
    fds: list[int] = []
    for rank, num_bytes in enumerate(sizes):
        try:
            fd = os.memfd_create(f"tandem-arena-{rank}", os.MFD_CLOEXEC)
            stack.callback(os.close, fd)
            os.ftruncate(fd, num_bytes)
        except OSError as error:
            raise StorageError(
                f"the arena of rank {rank} ({size(num_bytes)}) cannot be made: {error.strerror}"
            ) from None
        fds.append(fd)
    return fds


def make_abort_page(stack: AsyncExitStack) -> int:
    """Return the descriptor of an epoch's abort page; the stack closes it. Errors: ``StorageError``."""
    try:
        fd = make_page()
    except OSError as error:
        raise StorageError(f"the abort page cannot be made: {error.strerror}") from None
    stack.callback(os.close, fd)
    return fd


class Home:
    """Owner of the instance's directory and facts: the name is taken inside ``with``, and given back after.

    Errors: ``StorageError`` where a socket's path would be too long; ``AlreadyRunningError``.
    """

    def __init__(self, config: ServeConfig) -> None:
        self._config = config
        self._started_at = time.time()
        self.directory = InstanceDirectory(config.runtime_root, config.name)
        self._address = self.directory.gateway_address
        self.planned_bytes = 0

    def __enter__(self) -> Self:
        self.directory.acquire()
        try:
            self.say("starting")
        except BaseException:
            self.directory.release()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.directory.release()

    def say(self, state: InstanceState, error: str | None = None) -> InstanceFacts:
        """Publish and return the facts of this moment."""
        facts = InstanceFacts(
            name=self._config.name,
            pid=os.getpid(),
            model=self._config.model_name,
            tp=self._config.tp,
            pp=self._config.pp,
            state=state,
            memory_bytes=self.planned_bytes,
            address=self._address,
            started_at=self._started_at,
            error=error,
            ep=self._config.ep,
            dcp=self._config.dcp,
        )
        self.directory.publish(facts)
        return facts

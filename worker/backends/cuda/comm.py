"""Ranks as processes with GPUs: kernels over mapped memory, and NCCL for what is long."""

import contextlib
import os
from collections.abc import Sequence
from datetime import timedelta

import torch
from torch.distributed import FileStore  # type: ignore[attr-defined]

from protocol.topology import Topology
from worker.backends.cuda.comm_ipc import IpcGroup, IpcLane
from worker.backends.cuda.comm_memory import MOST_GROUP, LaneLayout, Regions, lay_out
from worker.backends.cuda.comm_nccl import NCCL_FROM_BYTES, NcclWay
from worker.backends.cuda.comm_page import MOST_RANKS, DeviceOperation, Page
from worker.backends.cuda.driver import CudaError
from worker.backends.cuda.launch import Kernels

_FAREWELL_S = 1.0
"""How long a rank keeps its memory for peers that have not left yet."""


class CudaCommunicator:
    """``Communicator`` of a worker process with a GPU. Owns its buffers and its mappings.

    Every operation but ``all_to_all`` and ``barrier`` is queued on the current stream and returns at once;
    a graph can hold it. Kernels that wait for a peer in vain end by themselves: at the deadline, by the
    abort word, or when the peer has left. What they leave behind is worth nothing, so the host asks
    ``check`` before it believes a step's results. A group's collectives come from one stream at a time, and
    so do a lane's messages.
    """

    deals_in_steps = False

    def __init__(
        self,
        rank: int,
        topology: Topology,
        *,
        page: Page | None = None,
        regions: Regions | None = None,
        group: IpcGroup | None = None,
        dcp: IpcGroup | None = None,
        lanes: dict[DeviceOperation, IpcLane] | None = None,
        nccl: NcclWay | None = None,
        store: FileStore | None = None,
    ) -> None:
        """Use ``connect``."""
        self.rank, self.topology = rank, topology
        self.dcp = dcp
        """See ``Communicator.dcp``; the group's own object where that is as large."""
        self._page, self._regions, self._group = page, regions, group
        self._lanes, self._nccl, self._store = lanes or {}, nccl, store
        self._is_closed = False

    @classmethod
    def connect(
        cls,
        topology: Topology,
        rank: int,
        rendezvous_file: str | os.PathLike[str],
        timeout_s: float,
        kernels: Kernels,
        *,
        page_fd: int | None,
        nccl_bytes: int = 0,
    ) -> "CudaCommunicator":
        """Meet the other ranks through ``rendezvous_file``, new for this epoch, in a private directory.

        Uses torch's current device. ``timeout_s`` bounds the meeting and every later wait. ``page_fd`` is
        the abort page that the supervisor made, and stays the caller's; a single rank needs none.
        ``nccl_bytes``: the longest message, where every rank has a GPU of its own; 0 leaves NCCL out.
        Errors: ``CollectiveError``; ``CudaError``; ``ValueError`` for too many ranks.
        """
        if topology.world_size == 1:
            return cls(rank, topology)
        if topology.tp > MOST_GROUP or topology.world_size > MOST_RANKS:
            raise ValueError(f"{topology} has more ranks than {MOST_GROUP} a group or {MOST_RANKS} in all")
        assert page_fd is not None, "ranks that have peers get an abort page"
        torch.empty(1, device="cuda")  # torch's context becomes the current one
        store = FileStore(os.fspath(rendezvous_file), topology.world_size)
        store.set_timeout(timedelta(seconds=timeout_s))
        page = Page(page_fd, rank, topology.world_size, timeout_s)
        layout = lay_out(topology)
        regions = Regions(rank, layout.num_bytes)
        regions.exchange(store, _peers(topology, rank))
        stage, place = topology.stage(rank), topology.tp_rank(rank)
        group = dcp = None
        if topology.tp > 1:
            ranks = topology.tp_group(stage)
            group = IpcGroup(kernels, ranks, rank, regions, layout.group, page, timeout_s)
        if topology.dcp > 1:
            dcp = group
            if topology.dcp < topology.tp:
                ranks = topology.dcp_group(rank)
                dcp = IpcGroup(kernels, ranks, rank, regions, layout.positions, page, timeout_s)

        lanes = {}

        def open_lane(operation: DeviceOperation, peer: int, lane: LaneLayout) -> None:
            lanes[operation] = IpcLane(kernels, operation, rank, peer, regions, lane, page, timeout_s)

        if not topology.is_last(rank):
            open_lane(DeviceOperation.TO_NEXT_STAGE, topology.rank(stage + 1, place), layout.hidden)
        if not topology.is_first(rank):
            open_lane(DeviceOperation.FROM_PREVIOUS_STAGE, topology.rank(stage - 1, place), layout.hidden)
        if topology.pp > 1 and topology.is_last(rank):
            open_lane(DeviceOperation.TOKENS_TO_FIRST_STAGE, topology.rank(0, place), layout.tokens)
        if topology.pp > 1 and topology.is_first(rank):
            last = topology.rank(topology.pp - 1, place)
            open_lane(DeviceOperation.TOKENS_FROM_LAST_STAGE, last, layout.tokens)
        nccl = None
        if topology.tp > 1 and nccl_bytes >= NCCL_FROM_BYTES:
            nccl = NcclWay(store, topology.tp_group(stage), rank, timeout_s, nccl_bytes)
        page.barrier()
        return cls(
            rank,
            topology,
            page=page,
            regions=regions,
            group=group,
            dcp=dcp,
            lanes=lanes,
            nccl=nccl,
            store=store,
        )

    @property
    def buffer_bytes(self) -> int:
        """Device memory of the IPC way; what NCCL takes only the driver knows."""
        return 0 if self._regions is None else self._regions.num_bytes

    def check(self) -> None:
        """Raise what a kernel of this rank gave up on, or the supervisor's abort. Asks no device.

        Says all about a step once the step's results have come. Errors: ``CollectiveError``.
        """
        error = None if self._page is None else self._page.error()
        if error is not None:
            raise error

    def all_reduce(self, x: torch.Tensor) -> None:
        """See ``Communicator.all_reduce``."""
        if self._group is None:
            return
        if self._nccl is not None and x.nbytes >= NCCL_FROM_BYTES and x.is_contiguous():
            self._nccl.all_reduce(x)
        else:
            self._group.all_reduce(x)

    def fuses(self, x: torch.Tensor) -> bool:
        """Whether ``all_reduce_norm`` takes ``x`` [tokens, hidden]; else use ``all_reduce`` and a norm."""
        return self._group is not None and self._group.fuses(x)

    def all_reduce_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> torch.Tensor:
        """See ``IpcGroup.all_reduce_norm``; only for what ``fuses``."""
        assert self._group is not None
        return self._group.all_reduce_norm(x, residual, weight, eps)

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """See ``Communicator.all_gather``."""
        if self._group is None:
            return x.unsqueeze(0)
        if self._nccl is not None and x.nbytes >= NCCL_FROM_BYTES and x.is_contiguous():
            return self._nccl.all_gather(x)
        return self._group.all_gather(x)

    def reduce_scatter(self, x: torch.Tensor) -> torch.Tensor:
        """See ``Communicator.reduce_scatter``."""
        if self._group is None:
            return x
        is_even = x.shape[0] % self.topology.tp == 0
        if self._nccl is not None and x.nbytes >= NCCL_FROM_BYTES and x.is_contiguous() and is_even:
            return self._nccl.reduce_scatter(x)
        return self._group.reduce_scatter(x)

    def all_to_all(self, x: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
        """See ``Communicator.all_to_all``. The host waits for the peers' counts, not for the device."""
        return x if self._group is None else self._group.all_to_all(x, counts)

    def to_next_stage(self, x: torch.Tensor) -> None:
        """See ``Communicator.to_next_stage``; what comes later on this stream may write to ``x`` again."""
        self._lanes[DeviceOperation.TO_NEXT_STAGE].move(x.contiguous())

    def from_previous_stage(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """See ``Communicator.from_previous_stage``; it is the stream that waits."""
        out = torch.empty(tuple(shape), dtype=dtype, device="cuda")
        self._lanes[DeviceOperation.FROM_PREVIOUS_STAGE].move(out)
        return out

    def tokens_to_first_stage(self, t: torch.Tensor) -> None:
        """See ``Communicator.tokens_to_first_stage``; ``t`` on the device."""
        self._lanes[DeviceOperation.TOKENS_TO_FIRST_STAGE].move(t.contiguous())

    def tokens_from_last_stage(self, count: int) -> torch.Tensor:
        """Return int64 [count] on the device; the stream waits for what the last stage gives."""
        out = torch.empty(count, dtype=torch.int64, device="cuda")
        self._lanes[DeviceOperation.TOKENS_FROM_LAST_STAGE].move(out)
        return out

    def barrier(self) -> None:
        """Return when the host of every rank is here; what their devices still do is not waited for."""
        if self._page is not None:
            self._page.barrier()

    def close(self) -> None:
        """See ``Communicator.close``. Waits for this rank's kernels, which deadline or abort end."""
        if self._page is None or self._regions is None or self._is_closed:
            return
        self._is_closed = True
        # After a fault the context may be lost; then the process's end frees what cannot be freed here.
        with contextlib.suppress(RuntimeError):
            torch.cuda.synchronize()
        if self._nccl is not None:
            with contextlib.suppress(RuntimeError):
                self._nccl.close()
        is_well = self._page.error() is None
        self._regions.close_peers()
        self._page.leave(_FAREWELL_S if is_well else 0.0)
        with contextlib.suppress(CudaError):
            self._regions.close()
            self._page.close()


def _peers(topology: Topology, rank: int) -> list[int]:
    """Return the ranks whose memory this one writes to."""
    stage, place = topology.stage(rank), topology.tp_rank(rank)
    neighbours = (topology.rank((stage + step) % topology.pp, place) for step in (-1, 1))
    return sorted({*topology.tp_group(stage), *neighbours} - {rank})

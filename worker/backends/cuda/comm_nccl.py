"""The NCCL way, for long messages between GPUs: torch's group of one tensor-parallel group of ranks.

NCCL is told of its buffers by the environment alone, which is the launcher's: ``NCCL_BUFFSIZE=1048576``,
and ``NCCL_NVLS_ENABLE=0`` unless the user says otherwise: multicast fails late in many virtual machines.
"""

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]

from worker.comm_group import CollectiveError

NCCL_FROM_BYTES = 32 << 20
"""From here on NCCL takes over from the kernels over IPC (measured: docs/performance.md)."""

_CHANNELS = 16
"""At most, because each takes buffers; long messages between two GPUs need no more."""


class NcclWay:
    """Collectives of a group whose ranks have a GPU each; NCCL refuses two ranks on one."""

    def __init__(
        self, store: Store, ranks: Sequence[int], rank: int, timeout_s: float, largest_bytes: int
    ) -> None:
        """Run every collective once at ``largest_bytes``, so that its memory is taken before it is counted.

        Errors: ``CollectiveError``.
        """
        from torch.distributed import ProcessGroupNCCL  # of GPU builds alone

        self._size = len(ranks)
        options = ProcessGroupNCCL.Options()
        options._timeout = timedelta(seconds=timeout_s)  # noqa: SLF001
        options.config.max_ctas = _CHANNELS
        try:
            self._group: Any = ProcessGroupNCCL(
                PrefixStore(f"nccl/{ranks[0]}", store), ranks.index(rank), self._size, options
            )
            x = torch.zeros(
                largest_bytes // 2 // self._size * self._size, dtype=torch.bfloat16, device="cuda"
            )
            self.all_reduce(x)
            self.reduce_scatter(x)
            self.all_gather(x[: x.numel() // self._size])
            torch.cuda.synchronize()
        except RuntimeError as error:
            others = [peer for peer in ranks if peer != rank]
            reason = str(error).partition("\n")[0]
            raise CollectiveError(rank, "connect by NCCL", others, reason) from None

    def all_reduce(self, x: torch.Tensor) -> None:
        """Sum contiguous ``x`` in place: the same bits on all ranks, in an order of NCCL's own."""
        self._group.allreduce([x]).wait()

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """See ``Communicator.all_gather``; ``x`` contiguous."""
        out = torch.empty((self._size, *x.shape), dtype=x.dtype, device=x.device)
        self._group._allgather_base(out, x).wait()  # noqa: SLF001
        return out

    def reduce_scatter(self, x: torch.Tensor) -> torch.Tensor:
        """See ``Communicator.reduce_scatter``; ``x`` contiguous."""
        out = torch.empty((x.shape[0] // self._size, *x.shape[1:]), dtype=x.dtype, device=x.device)
        self._group._reduce_scatter_base(out, x).wait()  # noqa: SLF001
        return out

    def close(self) -> None:
        """End the communicator, and what still waits in it."""
        self._group.abort()

"""The device's part of a boot on an NVIDIA GPU.

The context, the arena and the kernels come up beside the reading; weights are then copied to the
device from where they were read to. Graphs are captured against KV's reserved range, and KV gets, last,
what the budget has left.
"""

from pathlib import Path

from models.parameter import DTYPE_BYTES
from protocol.control import MeasuredLine, Ready
from worker.boot import Booted, BootWork


def boot_on_cuda(work: BootWork) -> Booted:
    """Import torch, make the device ready, and warm up once the weights are there."""
    boot, spans = work.boot, work.spans
    with spans.span("import torch"):
        from worker.backends.cuda.assemble import Assembled
        from worker.backends.cuda.comm import CudaCommunicator
        from worker.backends.cuda.device import Device
    ordinal = int(boot.device.partition(":")[2])
    with spans.span("context"):
        device = Device.open(
            ordinal, Path(boot.kernel_cache), boot.budget_bytes, is_alone=boot.device_ranks == 1
        )
    with spans.span("connect"):
        # NCCL refuses ranks that share a GPU.
        nccl_bytes = boot.step_tokens * work.spec.hidden_size * DTYPE_BYTES[work.spec.dtype]
        comm = CudaCommunicator.connect(
            boot.topology,
            boot.rank,
            boot.rendezvous,
            boot.collective_timeout_s,
            device.kernels,
            page_fd=boot.page_fd,
            nccl_bytes=nccl_bytes if device.is_alone else 0,
        )
    with spans.span("build"):
        assembled = Assembled(work, device, comm)
    work.wait_loaded()
    with spans.span("wait for peers"):
        # They read parts of this rank's weights.
        comm.barrier()
    with spans.span("copy to device"):
        assembled.place(work.memory)
    with spans.span("warm-up"):
        times = assembled.warm_up()
    with spans.span("map KV"):
        num_blocks = assembled.map_rest()
    return Booted(
        assembled.runner,
        comm,
        Ready(
            boot.epoch,
            boot.rank,
            spans.found,
            [MeasuredLine(name, size) for name, size in assembled.lines().items()],
            times.per_token_s,
            times.fixed_s,
            num_blocks,
        ),
    )

"""The device's part of a boot on a CPU: weights are computed with where they were read to."""

from protocol.control import Ready
from worker.boot import Booted, BootWork
from worker.memory import MemoryMeter, own_bytes


def boot_on_cpu(work: BootWork) -> Booted:
    """Import torch, connect, build, and warm up once the weights are there."""
    boot, spans, meter = work.boot, work.spans, MemoryMeter()
    with spans.span("import torch"):
        import torch

        from worker.comm import GlooCommunicator

    torch.set_num_threads(boot.threads)
    torch.set_num_interop_threads(1)
    meter.add("runtime", own_bytes())
    with spans.span("connect"):
        comm = meter.growth(
            "communicator",
            lambda: GlooCommunicator.connect(
                boot.topology, boot.rank, boot.rendezvous, boot.collective_timeout_s
            ),
        )
    with spans.span("build"):
        from worker.assemble import RankLimits, assemble

        assembled = assemble(work.spec, work.held, work.memory, work.stages, comm, RankLimits.of(boot))
        meter.add("weights", work.held.size)
        meter.add("kv cache", assembled.kv_bytes)
    work.wait_loaded()
    with spans.span("wait for peers"):
        comm.barrier()
    with spans.span("warm-up"):
        from worker.warmup import WarmUp

        times = WarmUp(assembled.runner, comm, work.spec, meter).run()
    ready = Ready(
        boot.epoch,
        boot.rank,
        spans.found,
        meter.lines(),
        times.per_token_s,
        times.fixed_s,
        boot.num_blocks,
    )
    return Booted(assembled.runner, comm, ready)

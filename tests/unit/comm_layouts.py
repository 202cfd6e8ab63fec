"""Runs one function per rank of a layout, each in a thread of its own."""

import threading
from collections.abc import Callable
from typing import TypeVar

import torch

from protocol.topology import Topology
from worker.comm import Communicator, thread_group

T = TypeVar("T")


def on_all_ranks(topology: Topology, work: Callable[[Communicator], T], timeout_s: float = 20.0) -> list[T]:
    """Return what each rank's ``work`` returned; the first error of any is raised, the others released."""
    torch.set_num_threads(1)
    comms = thread_group(topology, timeout_s)
    if len(comms) == 1:
        return [work(comms[0])]
    results: dict[int, T] = {}
    errors: list[BaseException] = []

    def run(comm: "Communicator") -> None:
        try:
            results[comm.rank] = work(comm)
        except BaseException as error:
            errors.append(error)
            comms[comm.rank].abort()

    threads = [threading.Thread(target=run, args=(comm,)) for comm in comms]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout_s + 10)
        assert not thread.is_alive(), "a rank hangs past its deadline"
    if errors:
        raise errors[0]
    return [results[rank] for rank in range(topology.world_size)]

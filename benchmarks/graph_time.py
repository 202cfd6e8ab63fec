"""What a launch takes inside a CUDA graph: no Python between one and the next."""

import statistics
from collections.abc import Callable

import torch

BURST_US = 10_000.0
REPEATS = 5


def launch_us(launch: Callable[[int], object], launches: int) -> float:
    """Return the median microseconds of one of ``launches`` calls, captured together and replayed.

    ``launch`` is told which of them it is, so that it can take turns with data that no cache holds.
    """
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        launch(0)
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            for i in range(launches):
                launch(i)
        began = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        ended = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]

        def burst_us(replays: int) -> float:
            began.record()
            for _ in range(replays):
                graph.replay()
            ended.record()
            ended.synchronize()
            return float(began.elapsed_time(ended)) * 1e3 / replays

        burst_us(1)
        replays = max(round(BURST_US / burst_us(1)), 1)
        return statistics.median(burst_us(replays) for _ in range(REPEATS)) / launches

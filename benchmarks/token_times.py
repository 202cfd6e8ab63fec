"""From the moments at which tokens reached a client to step times."""

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StreamTimes:
    """One stream as its client saw it; monotonic seconds, the same clock in all processes."""

    sent_s: float
    arrivals: tuple[tuple[float, int], ...]
    """Moment and tokens of each chunk that brought some."""

    @property
    def first_s(self) -> float:
        """When the first token came."""
        return self.arrivals[0][0]

    @property
    def last_s(self) -> float:
        """When the last token came."""
        return self.arrivals[-1][0]

    @property
    def tokens(self) -> int:
        """All its tokens."""
        return sum(count for _, count in self.arrivals)


def steady_window(streams: Sequence[StreamTimes]) -> tuple[float, float]:
    """Return from when to when all streams decode: the last one's first token to the first one's last.

    Errors: ``ValueError`` where there is no such time.
    """
    start, end = max(s.first_s for s in streams), min(s.last_s for s in streams)
    if end <= start:
        raise ValueError(
            f"of {len(streams)} streams one ended before another had its first token: ask for more tokens"
        )
    return start, end


def step_figures(streams: Sequence[StreamTimes], window: tuple[float, float]) -> dict[str, float]:
    """Return what a step takes inside a window, milliseconds.

    ``step_ms``: median time between a stream's tokens. Tokens that came together share the time since the
    chunk before. ``step_mean_ms``: their mean, which sees rare stalls. ``gap_p99_ms``: 99th percentile of
    the time between chunks, as a reader feels it. ``merged``: part of the tokens that did not come alone.
    ``tokens_per_s``: the streams' rates together.

    Errors: ``ValueError`` where there are too few tokens.
    """
    start, end = window
    by_stream = [list(_gaps(stream, start, end)) for stream in streams]
    if not all(by_stream):
        raise ValueError("a stream has too few tokens in the window: ask for more")
    gaps = [gap for stream in by_stream for gap in stream]
    each = [gap / count for gap, count in gaps for _ in range(count)]
    tokens = len(each)
    return {
        "step_ms": statistics.median(each) * 1e3,
        "step_mean_ms": sum(gap for gap, _ in gaps) / tokens * 1e3,
        "gap_p99_ms": _percentile([gap for gap, _ in gaps], 99) * 1e3,
        "merged": sum(count for _, count in gaps if count > 1) / tokens,
        "tokens": tokens,
        "tokens_per_s": sum(sum(n for _, n in s) / sum(gap for gap, _ in s) for s in by_stream),
    }


def _gaps(stream: StreamTimes, start: float, end: float) -> Iterator[tuple[float, int]]:
    """Give time and tokens of each chunk whose predecessor lies in the window too."""
    before: float | None = None
    for moment, count in stream.arrivals:
        if start <= moment <= end:
            if before is not None:
                yield moment - before, count
            before = moment


def _percentile(values: Sequence[float], percent: int) -> float:
    if len(values) == 1:
        return values[0]
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]

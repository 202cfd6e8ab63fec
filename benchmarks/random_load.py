"""Does a server stand a random load as large as it may be, and does its memory stay where it is?

A server is started as a user would; for ``--seconds`` so many streams at once ask for prompts and answers
of any length that the context holds, sampled in every way, some with a shared beginning, some cancelled.
Every stream must end as asked. The device's free memory is looked at once a second.

    python -m benchmarks.random_load --model DIR [--devices cuda:0] [--seconds 300] [--streams 256]
"""

import argparse
import asyncio
import random
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec

from benchmarks.served import Served
from tandem import AsyncClient
from tandem.results import Parameters

SHARED_TOKENS = 300
CANCELLED = 0.1
"""Share of the streams that are given up early."""


def some_length(draw: random.Random, most: int) -> int:
    """Return a length from 1 to ``most``; as many are short as long, by powers."""
    return max(int(most ** draw.random()), 1)


def parameters(draw: random.Random, max_tokens: int) -> Parameters:
    """Return one way of sampling."""
    found: Parameters = {
        "max_tokens": max_tokens,
        "temperature": draw.choice([0.0, 0.7, 1.0, 1.5]),
        "ignore_eos": True,
    }
    if draw.random() < 0.3:
        found |= {"top_p": draw.uniform(0.5, 1.0), "top_k": draw.choice([0, 5, 200])}
    if draw.random() < 0.2:
        found |= {"presence_penalty": 0.5, "repetition_penalty": 1.2}
    if draw.random() < 0.2:
        found["logprobs"] = draw.randrange(5)
    return found


class RandomLoad:
    """Streams until a time, and what became of them."""

    def __init__(self, address: str, context: int, vocab_size: int, until_s: float) -> None:
        self._address, self._context, self._vocab_size, self._until_s = (
            address,
            context,
            vocab_size,
            until_s,
        )
        self.ends: Counter[str] = Counter()
        self.tokens = 0
        self.most_tokens = 0
        """Of prompt and answer of one request."""

    async def run(self, streams: int) -> None:
        """Keep so many streams going."""
        async with AsyncClient(address=self._address) as client:
            await asyncio.gather(*(self._stream(client, random.Random(i)) for i in range(streams)))

    async def _stream(self, client: AsyncClient, draw: random.Random) -> None:
        shared = [7 * i % self._vocab_size for i in range(SHARED_TOKENS)]
        while time.monotonic() < self._until_s:
            total = max(some_length(draw, self._context - 1), 2)
            # Long answers take minutes: most of a long request is its prompt.
            answer = min(some_length(draw, 600), total - 1)
            prompt = [draw.randrange(3, self._vocab_size) for _ in range(total - answer)]
            if draw.random() < 0.3 and len(prompt) > SHARED_TOKENS:
                prompt[:SHARED_TOKENS] = shared
            give_up = draw.randrange(1, answer + 1) if draw.random() < CANCELLED else None
            stream = client.stream(prompt_ids=prompt, **parameters(draw, answer))
            had = 0
            async for chunk in stream:
                had += len(chunk.token_ids)
                if give_up is not None and had >= give_up and had < answer:
                    await stream.aclose()
                    break
            self.tokens += had
            self.most_tokens = max(self.most_tokens, len(prompt) + had)
            if had == answer:
                self.ends["length"] += 1
            else:
                assert give_up is not None, f"{had} tokens of {answer}"
                self.ends["cancelled"] += 1


async def watch(free: list[int], until_s: float, look: Any) -> None:
    """Note the device's free bytes once a second."""
    while time.monotonic() < until_s:
        free.append(look())
        await asyncio.sleep(1.0)


def device_free() -> int:
    """Return the first GPU's free bytes."""
    import pynvml

    pynvml.nvmlInit()
    return int(pynvml.nvmlDeviceGetMemoryInfo(pynvml.nvmlDeviceGetHandleByIndex(0)).free)


async def measure(served: Served, seconds: float, streams: int, look: Any) -> dict[str, Any]:
    """Load a server, and return what was seen."""
    info = served.info
    until_s = time.monotonic() + seconds
    load = RandomLoad(served.address, info.context, info.vocab_size, until_s)
    free: list[int] = []
    watching = asyncio.create_task(watch(free, until_s, look))
    began_s = time.monotonic()
    await load.run(streams)
    took_s = time.monotonic() - began_s
    await watching
    async with AsyncClient(address=served.address) as client:
        stats = await client.stats()
    return {
        "seconds": took_s,
        "ends": dict(load.ends),
        "tokens": load.tokens,
        "most_tokens": load.most_tokens,
        "prompt_tokens": stats.prompt_tokens,
        "cached_tokens": stats.cached_tokens,
        "preemptions": stats.preemptions,
        "failed": stats.failed,
        "free_bytes": [min(free), max(free)],
        "still_held_blocks": stats.blocks_total - stats.blocks_free - stats.blocks_cached,
    }


def main() -> None:
    """Print what was seen; exit 1 where a request failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--devices", default="cuda:0")
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--json", type=Path)
    parser.add_argument("arguments", nargs="*", help="for tandem serve, after --")
    options = parser.parse_args()
    look = device_free if options.devices.startswith("cuda") else (lambda: 0)
    with Served(options.model, options.devices, options.arguments, random.Random(0), 600.0) as served:
        found = asyncio.run(measure(served, options.seconds, options.streams, look))
    for name, value in found.items():
        print(f"{name}: {value}")
    if options.json:
        options.json.write_bytes(msgspec.json.encode(found))
    sys.exit(1 if found["failed"] or found["still_held_blocks"] else 0)


if __name__ == "__main__":
    main()

"""``python -P -m benchmarks.stream_clients ADDRESS …``: a process that reads streams through the SDK."""

import argparse
import asyncio

from tandem import AsyncClient

PROMPT_TOKENS = 32


async def read(client: AsyncClient, prompt_ids: list[int], max_tokens: int) -> int:
    """Read one stream to its end; return its tokens."""
    count = 0
    stream = client.stream(
        prompt_ids=prompt_ids, max_tokens=max_tokens, temperature=0.0, seed=1, ignore_eos=True
    )
    while chunks := await stream.next_chunks():
        count += sum(len(chunk.token_ids) for chunk in chunks)
    return count


async def run(address: str, connections: int, streams: int, max_tokens: int) -> int:
    """Read ``streams`` streams over ``connections`` connections at once; return the tokens of all."""
    clients = [AsyncClient(address=address) for _ in range(connections)]
    # No two prompts share a block: admission costs what it costs without prefix hits.
    prompts = [[3 + number % 500] * PROMPT_TOKENS for number in range(streams)]
    counts = await asyncio.gather(
        *(read(clients[number % connections], prompt, max_tokens) for number, prompt in enumerate(prompts))
    )
    for client in clients:
        await client.aclose()
    return sum(counts)


def main() -> None:
    """Print how many tokens came."""
    parser = argparse.ArgumentParser()
    parser.add_argument("address")
    parser.add_argument("--connections", type=int, required=True)
    parser.add_argument("--streams", type=int, required=True)
    parser.add_argument("--max-tokens", type=int, required=True)
    options = parser.parse_args()
    print(asyncio.run(run(options.address, options.connections, options.streams, options.max_tokens)))


if __name__ == "__main__":
    main()

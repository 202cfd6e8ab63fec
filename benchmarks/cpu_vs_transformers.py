"""Is tandem on a CPU at least as fast as transformers on the same cores?

Three questions in one run, each side alone on the machine while it is timed: boot to the first token
(whole processes, from exec), single-stream greedy decode, and 16 requests of mixed lengths against
one left-padded batch of transformers (which decodes until its longest answer is done). Rounds
alternate; medians are printed. Both sides load the same safetensors in float32.

    python -m benchmarks.cpu_vs_transformers [--model smollm2-135m] [--rounds 3] [--json FILE]
"""

import argparse
import asyncio
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from loader.hub import pull
from tandem import AsyncClient

PROMPT = "The three laws of motion are"
DECODE_TOKENS = 128


def mixed_requests(vocab_size: int) -> list[tuple[list[int], int]]:
    """Return 16 prompts of 8 to 400 tokens with answers of 8 to 160 tokens, from a fixed seed."""
    draw = random.Random(16)
    found = []
    for _ in range(16):
        length = int(8 * 50 ** draw.random())
        answer = int(8 * 20 ** draw.random())
        found.append(([draw.randrange(100, vocab_size) for _ in range(length)], answer))
    return found


class Transformers:
    """The other side, in this process."""

    def __init__(self, directory: Path) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(os.cpu_count() or 1)
        self._torch = torch
        self.model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        self.vocab_size = int(self.model.config.vocab_size)

    def _generate(self, rows: list[list[int]], tokens: int) -> None:
        width = max(map(len, rows))
        ids = self._torch.tensor([[0] * (width - len(r)) + r for r in rows])
        mask = self._torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows])
        with self._torch.inference_mode():
            self.model.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=tokens,
                min_new_tokens=tokens,
                do_sample=False,
                pad_token_id=0,
            )

    def decode(self, prompt: list[int]) -> float:
        """Return tokens a second of a single stream, the prompt's step taken off."""
        first = _timed(lambda: self._generate([prompt], 1))
        whole = _timed(lambda: self._generate([prompt], DECODE_TOKENS + 1))
        return DECODE_TOKENS / (whole - first)

    def batch(self, requests: list[tuple[list[int], int]]) -> float:
        """Return useful tokens a second of one padded batch."""
        longest = max(answer for _, answer in requests)
        seconds = _timed(lambda: self._generate([prompt for prompt, _ in requests], longest))
        return sum(answer for _, answer in requests) / seconds


def _timed(call: Callable[[], None]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


class Tandem:
    """Our side: a server of its own and the SDK."""

    def __init__(self, directory: Path, runtime: Path) -> None:
        self.environment = os.environ | {"XDG_RUNTIME_DIR": str(runtime)}
        runtime.chmod(0o700)
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "cli", "serve", "--model", str(directory), "--name", "bench"],
            env=self.environment,
            stderr=subprocess.PIPE,
        )
        self._address = f"ipc://{runtime / 'tandem' / 'bench' / 'gateway.sock'}"
        facts = runtime / "tandem" / "bench" / "instance.json"
        deadline = time.monotonic() + 120
        while not (facts.exists() and b'"ready"' in facts.read_bytes()):
            if self._process.poll() is not None or time.monotonic() > deadline:
                assert self._process.stderr is not None
                raise SystemExit(f"tandem did not start: {self._process.stderr.read().decode()}")
            time.sleep(0.05)

    async def _generate(self, requests: list[tuple[list[int], int]]) -> None:
        async with AsyncClient(address=self._address) as client:
            await asyncio.gather(
                *(
                    client.generate(prompt_ids=prompt, max_tokens=answer, temperature=0.0, ignore_eos=True)
                    for prompt, answer in requests
                )
            )

    def _seconds(self, requests: list[tuple[list[int], int]]) -> float:
        return _timed(lambda: asyncio.run(self._generate(requests)))

    def decode(self, prompt: list[int]) -> float:
        """Return tokens a second of a single stream, the prompt's step taken off."""
        first = self._seconds([(prompt, 1)])
        return DECODE_TOKENS / (self._seconds([(prompt, DECODE_TOKENS + 1)]) - first)

    def batch(self, requests: list[tuple[list[int], int]]) -> float:
        """Return tokens a second over all requests at once."""
        return sum(answer for _, answer in requests) / self._seconds(requests)

    def stop(self) -> None:
        """Drain and wait."""
        self._process.terminate()
        self._process.wait(30)
        assert self._process.stderr is not None
        self._process.stderr.close()


ANSWER = """
import sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
torch.set_num_threads(int(sys.argv[3]))
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
ids = tokenizer(sys.argv[2], return_tensors="pt")
print(tokenizer.decode(model.generate(**ids, max_new_tokens=1, do_sample=False, pad_token_id=0)[0]))
"""


def boot_seconds(command: list[str], environment: dict[str, str]) -> float:
    """Return the whole-process time of a command that answers with one token."""
    return _timed(
        lambda: (
            subprocess.run(command, env=environment, check=True, capture_output=True, timeout=120) and None
        )
    )


def measure(model: str, rounds: int) -> dict[str, Any]:
    """Run both sides in turn and return medians, ratios and every sample."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "tandem"
    directory = pull(model, cache)
    samples: dict[str, list[float]] = {}

    def keep(name: str, value: float) -> None:
        samples.setdefault(name, []).append(value)

    with tempfile.TemporaryDirectory() as scratch:
        environment = os.environ | {"XDG_RUNTIME_DIR": scratch}
        Path(scratch).chmod(0o700)
        ours = [sys.executable, "-P", "-m", "cli", "run", str(directory), PROMPT]
        ours += ["--raw", "--max-tokens", "1", "--temperature", "0", "--json"]
        theirs = [sys.executable, "-c", ANSWER, str(directory), PROMPT, str(os.cpu_count())]
        for _ in range(rounds):
            keep("boot tandem", boot_seconds(ours, environment))
            keep("boot transformers", boot_seconds(theirs, environment))
        other = Transformers(directory)
        prompt = [(7 * i + 100) % other.vocab_size for i in range(16)]
        requests = mixed_requests(other.vocab_size)
        for _ in range(rounds):
            keep("decode transformers", other.decode(prompt))
            keep("batch transformers", other.batch(requests))
            tandem = Tandem(directory, Path(scratch))
            try:
                tandem.decode(prompt)  # Connect, warm the caches.
                keep("decode tandem", tandem.decode(prompt))
                keep("batch tandem", tandem.batch(requests))
            finally:
                tandem.stop()
    median = {name: statistics.median(values) for name, values in samples.items()}
    return {
        "cores": os.cpu_count(),
        "rounds": rounds,
        "median": median,
        "ratio": {
            "boot": median["boot transformers"] / median["boot tandem"],
            "decode": median["decode tandem"] / median["decode transformers"],
            "batch": median["batch tandem"] / median["batch transformers"],
        },
        "samples": samples,
    }


ROWS = (
    ("boot to first token, s", "boot", 1.0),
    ("single-stream decode, tokens/s", "decode", 1.0),
    ("16 mixed requests, tokens/s", "batch", 2.0),
)


def main() -> None:
    """Print the table; exit 1 where a demand is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    found = measure(options.model, options.rounds)
    print(f"{'':34}{'tandem':>10}{'transformers':>14}{'ratio':>8}{'demand':>8}")
    for title, key, demand in ROWS:
        ours, theirs = found["median"][f"{key} tandem"], found["median"][f"{key} transformers"]
        print(f"{title:34}{ours:>10.2f}{theirs:>14.2f}{found['ratio'][key]:>8.2f}{demand:>8.1f}")
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))
    if any(found["ratio"][key] < demand for _, key, demand in ROWS):
        sys.exit(1)


if __name__ == "__main__":
    main()

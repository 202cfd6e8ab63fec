"""Every layout through the whole system, its ranks sharing one GPU: one rank's tokens, and the CPU's.

Kernels that wait for each other take turns on one GPU, up to 33 ms for each meeting of eight ranks: few
layers, few rows, short answers. What is timed here says nothing about speed.
"""

import math
import os
import random
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("cuda.bindings")

from benchmarks.make_checkpoint import write_checkpoint  # noqa: E402
from orchestrator.gpus import free_bytes  # noqa: E402
from protocol.control import TokenLogprobs  # noqa: E402
from tandem import Client  # noqa: E402
from tandem.errors import InstanceFailedError  # noqa: E402
from tandem.instances import children_of  # noqa: E402
from tests.faults.streams import Streams  # noqa: E402
from tests.gpu.serving import GPU  # noqa: E402
from tests.gpu.serving import serving as started  # noqa: E402
from tests.server import Server, title, until  # noqa: E402

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]

MODELS = ("tiny-8-8", "tiny-8-2", "tiny-latent")
"""8 heads; 8 KV heads, or 2, or one latent, which ranks of more than 2 or 1 a group have copies of."""
LAYOUTS = [
    *[("tiny-8-2", tp, pp) for tp, pp in ((2, 1), (4, 1), (8, 1), (1, 2), (2, 2))],
    *[("tiny-8-8", tp, pp) for tp, pp in ((8, 1), (1, 4))],
    ("tiny-latent", 4, 1),
]
LIMITS = ("--dtype=float32", "--max-rows=8", "--step-tokens=64", "--context=256")
GIB_A_RANK = 2
LAYOUT_S = 60.0
ANSWER_S = 30.0
MAX_TOKENS = 12
LOGPROB_BOUND = 1e-3
SLACK_BYTES = 32 << 20
TOLD_S, ENDED_S, FREED_S = 3.0, 5.0, 5.0

_draw = random.Random(11)
# Of one token, of whole steps, and longer than a step.
PROMPTS = [[_draw.randrange(3, 2048) for _ in range(length)] for length in (1, 7, 16, 33, 64, 90)]


@dataclass(frozen=True)
class Answers:
    """What a server says."""

    greedy: list[list[int]]
    """Of all prompts at once."""
    drawn: list[int]
    """By a seed, through every filter."""
    scores: list[TokenLogprobs]
    """Of the drawn tokens."""


def greedy(server: Server, prompts: list[list[int]]) -> list[list[int]]:
    """Return the answers to prompts that come at once."""

    def one(client: Client, ids: list[int]) -> list[int]:
        return client.generate(
            prompt_ids=ids, temperature=0.0, max_tokens=MAX_TOKENS, ignore_eos=True, timeout_s=ANSWER_S
        ).token_ids

    with server.client() as client, ThreadPoolExecutor(len(prompts)) as pool:
        return list(pool.map(lambda ids: one(client, ids), prompts))


def ask(server: Server) -> Answers:
    found = greedy(server, PROMPTS)
    with server.client() as client:
        drawn = client.generate(
            prompt_ids=PROMPTS[3],
            temperature=0.9,
            top_p=0.95,
            top_k=100,
            min_p=0.001,
            seed=7,
            max_tokens=MAX_TOKENS,
            ignore_eos=True,
            logprobs=3,
            timeout_s=ANSWER_S,
        )
    assert drawn.logprobs is not None
    assert all(len(ids) == MAX_TOKENS for ids in [*found, drawn.token_ids])
    return Answers(found, drawn.token_ids, drawn.logprobs)


@contextmanager
def serving(model: Path, device: str, tp: int = 1, pp: int = 1) -> Iterator[Server]:
    """Give a server of one layout."""
    memory = GIB_A_RANK * tp * pp if device == GPU else 2
    layout = (f"--devices={device}", f"--memory={memory}", f"--tp={tp}", f"--pp={pp}")
    with started(model, *LIMITS, *layout, workers=tp * pp) as server:
        yield server


def answers(model: Path, device: str, tp: int = 1, pp: int = 1) -> Answers:
    """Start a server, ask it, and end it in order."""
    began_s = time.monotonic()
    with serving(model, device, tp, pp) as server:
        ready_s = time.monotonic()
        found = ask(server)
        asked_s = time.monotonic()
        server.wait_idle()
        assert server.stop() == 0, server.log
    took_s = time.monotonic() - began_s
    print(
        f"{model.name} on {device}, tp {tp} pp {pp}: ready after {ready_s - began_s:.1f} s, answered in "
        f"{asked_s - ready_s:.1f} s, {took_s:.1f} s in all"
    )
    assert took_s < LAYOUT_S
    return found


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    for name in MODELS:
        write_checkpoint(name, root / name, dtype="float32")
    return {name: root / name for name in MODELS}


@pytest.fixture(scope="module", autouse=True)
def kernels() -> None:
    """Have the kernels compiled, as `tandem warm` does: else every rank would compile them."""
    from worker.backends.cuda.compiler import KernelCache
    from worker.backends.cuda.device import architecture

    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tandem" / "kernels"
    for _ in KernelCache(cache, architecture(0)).warm():
        pass


@pytest.fixture(scope="module")
def one_rank(models: dict[str, Path], kernels: None) -> dict[str, Answers]:
    """What one rank on the GPU answers."""
    return {name: answers(models[name], GPU) for name in MODELS}


def far(a: Answers, b: Answers) -> float:
    """The largest difference of log-probabilities of the same tokens."""
    return max(
        abs(x - y)
        for one, other in zip(a.scores, b.scores, strict=True)
        for x, y in zip((one.logprob, *one.top_logprobs), (other.logprob, *other.top_logprobs), strict=True)
    )


def assert_alike(found: Answers, expected: Answers) -> None:
    assert found.greedy == expected.greedy
    assert found.drawn == expected.drawn
    assert far(found, expected) < LOGPROB_BOUND


@pytest.mark.parametrize("name", MODELS)
def test_one_rank_answers_as_the_cpu_does(
    models: dict[str, Path], one_rank: dict[str, Answers], name: str
) -> None:
    assert_alike(one_rank[name], answers(models[name], "cpu"))


@pytest.mark.parametrize(("name", "tp", "pp"), LAYOUTS)
def test_ranks_that_share_a_gpu_answer_as_one_rank(
    models: dict[str, Path], one_rank: dict[str, Answers], name: str, tp: int, pp: int
) -> None:
    assert_alike(answers(models[name], GPU, tp, pp), one_rank[name])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (1, 2)])
def test_ranks_with_gpus_of_their_own_answer_as_one_rank(
    models: dict[str, Path], one_rank: dict[str, Answers], tp: int, pp: int
) -> None:
    """Short prompts as before; and steps of several long ones, whose messages are long enough for NCCL."""
    draw = random.Random(12)
    long = [[draw.randrange(3, 2048) for _ in range(1900)] for _ in range(4)]
    limits = ("--dtype=float32", "--max-rows=8", "--step-tokens=4096", "--context=2048", "--memory=8")
    found = []
    for devices, degrees in ((GPU, (1, 1)), ("cuda:0,cuda:1", (tp, pp))):
        layout = (f"--devices={devices}", f"--tp={degrees[0]}", f"--pp={degrees[1]}")
        with started(models["tiny-8-2"], *limits, *layout, workers=math.prod(degrees)) as server:
            found.append((greedy(server, long), ask(server)))
    assert found[0][0] == found[1][0]
    assert_alike(found[1][1], one_rank["tiny-8-2"])


@pytest.mark.parametrize(("tp", "pp", "rank"), [(2, 1, 1), (1, 2, 0)])
def test_a_killed_rank_ends_the_server_and_frees_the_gpu(
    models: dict[str, Path], tp: int, pp: int, rank: int
) -> None:
    before = free_bytes(GPU, os.environ)
    with serving(models["tiny-8-2"], GPU, tp, pp) as server:
        everyone = [server.process.pid, *children_of(server.process.pid)]
        taken = before - free_bytes(GPU, os.environ)
        assert taken > SLACK_BYTES
        with server.client() as client:
            stream = client.stream(
                prompt_ids=[5, 6, 7], temperature=0.0, max_tokens=240, ignore_eos=True, timeout_s=ANSWER_S
            )
            for _ in range(4):
                next(stream)
            killed_s = time.monotonic()
            os.kill(worker(server, rank), signal.SIGKILL)
            with pytest.raises(InstanceFailedError, match="SIGKILL"):
                list(stream)
        told_s = time.monotonic() - killed_s
        assert server.process.wait(10.0) == 1, server.log
        ended_s = time.monotonic() - killed_s
        assert [pid for pid in everyone if Path(f"/proc/{pid}").exists()] == []
        until(lambda: before - free_bytes(GPU, os.environ) <= SLACK_BYTES, FREED_S)
        freed_s = time.monotonic() - killed_s
    print(
        f"tp {tp} pp {pp}, rank {rank} killed: the client was told after {told_s:.2f} s, all had ended "
        f"after {ended_s:.2f} s, {taken >> 20} MiB were free again after {freed_s:.2f} s"
    )
    assert told_s < TOLD_S
    assert ended_s < ENDED_S


def test_a_killed_orchestrator_leaves_nothing_on_the_gpu(models: dict[str, Path]) -> None:
    """Nobody writes the abort word then: the ranks end with their parent."""
    before = free_bytes(GPU, os.environ)
    with serving(models["tiny-8-2"], GPU, 2) as server, Streams(server.facts["address"]) as client:
        client.ask("one", max_tokens=240)
        client.until_running("one")
        killed_s = time.monotonic()
        server.kill()
        ended_s = time.monotonic() - killed_s
        until(lambda: before - free_bytes(GPU, os.environ) <= SLACK_BYTES, FREED_S)
    print(f"all had ended after {ended_s:.2f} s")
    assert ended_s < ENDED_S


def worker(server: Server, rank: int) -> int:
    """Return the process id of a rank, told by its title."""
    words = f" worker {rank + 1}/"
    return next(pid for pid in server.workers if words in title(pid))

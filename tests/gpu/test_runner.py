"""Whole steps on a GPU: the CPU's tokens, and the same bits with graphs and without."""

import random
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("cuda.bindings")

from benchmarks.make_checkpoint import write_checkpoint  # noqa: E402
from benchmarks.rank_on_gpu import cuda_instance  # noqa: E402
from protocol.sampling import SamplingParams  # noqa: E402
from protocol.topology import Topology  # noqa: E402
from tests.golden.harness import Driver, Job, run_ranks_as_threads  # noqa: E402

pytestmark = pytest.mark.gpu

BFLOAT16_BOUND = 0.1
"""How far a log-probability of bf16 arithmetic may be from another order of the same arithmetic."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    found = {}
    for name, dtype, layers in (("smollm2-135m", "float32", 4), ("llama-3-8b", "bfloat16", 2)):
        found[name] = root / name
        write_checkpoint(name, found[name], dtype=dtype, layers=layers)
    return found


def jobs(vocab_size: int, count: int, seed: int, **sampling: Any) -> list[Job]:
    draw = random.Random(seed)
    found = []
    for i in range(count):
        prompt = [draw.randrange(vocab_size) for _ in range(draw.choice([1, 2, 15, 16, 17, 63, 130]))]
        params = SamplingParams(**({"temperature": 0.0, "seed": i, "logprobs": 2} | sampling))
        found.append(Job(prompt, draw.randrange(6, 24), params, start_step=min(i, draw.randrange(4))))
    return found


def outcome(done: list[Job]) -> list[Any]:
    return [(job.output_ids, [(t.token_id, t.logprob, t.top_ids) for t in job.logprobs]) for job in done]


def far(a: list[Job], b: list[Job]) -> float:
    """The largest difference of log-probabilities up to the first different token of each row."""
    worst = 0.0
    for one, other in zip(a, b, strict=True):
        for x, y in zip(one.logprobs, other.logprobs, strict=True):
            if x.token_id != y.token_id:
                break
            worst = max(worst, abs(x.logprob - y.logprob))
    return worst


SAMPLINGS: list[dict[str, Any]] = [
    {},
    {"temperature": 1.0},
    {"temperature": 0.8, "top_k": 40, "top_p": 0.9, "min_p": 0.01},
    {"temperature": 0.7, "repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.2},
    {"logit_bias": {5: 8.0, 7: -100.0, 11: 7.5}},
]


@pytest.mark.parametrize("has_graphs", [True, False])
@pytest.mark.parametrize("sampling", SAMPLINGS, ids=["greedy", "noise", "filters", "penalties", "bias"])
def test_float32_answers_as_the_cpu_does(
    models: dict[str, Path], sampling: dict[str, Any], has_graphs: bool
) -> None:
    directory = models["smollm2-135m"]
    expected, found = (jobs(49152, 10, 1, **sampling) for _ in range(2))
    limits: dict[str, Any] = {"max_rows": 32, "num_blocks": 512, "block_tokens": 16, "context": 512}
    with run_ranks_as_threads(directory, Topology(), **limits) as instance:
        Driver(instance).run(expected)
    with cuda_instance(directory, has_graphs=has_graphs, **limits) as on_gpu:
        Driver(on_gpu, depth=2).run(found)  # type: ignore[arg-type]
    assert [job.output_ids for job in found] == [job.output_ids for job in expected]
    assert far(found, expected) < 1e-3


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("name", ["smollm2-135m", "llama-3-8b"])
def test_decode_graphs_give_the_bits_of_single_launches(
    models: dict[str, Path], name: str, depth: int
) -> None:
    dtype = "float32" if name == "smollm2-135m" else "bfloat16"
    outcomes = []
    for has_graphs in (True, False):
        some = jobs(49152, 9, 2)
        with cuda_instance(models[name], dtype=dtype, block_tokens=64, has_graphs=has_graphs) as instance:
            # Pieces are padded, and a product of another size may add up in another order.
            instance.assembled.runner._pieces.clear()
            Driver(instance, depth=depth).run(some)  # type: ignore[arg-type]
        outcomes.append(outcome(some))
    assert outcomes[0] == outcomes[1]


def test_bfloat16_stays_within_its_bound(models: dict[str, Path]) -> None:
    directory = models["llama-3-8b"]
    expected, found = (jobs(49152, 4, 3) for _ in range(2))
    for job in expected + found:
        job.max_tokens = 6
    limits: dict[str, Any] = {"max_rows": 8, "num_blocks": 64, "block_tokens": 64, "context": 512}
    with run_ranks_as_threads(directory, Topology(), dtype="bfloat16", **limits) as instance:
        Driver(instance).run(expected)
    with cuda_instance(directory, dtype="bfloat16", **limits) as on_gpu:
        Driver(on_gpu).run(found)  # type: ignore[arg-type]
    assert far(found, expected) < BFLOAT16_BOUND


@pytest.mark.parametrize("name", ["smollm2-135m", "llama-3-8b"])
def test_float8_answers_as_the_cpu_does(models: dict[str, Path], name: str) -> None:
    expected, found = (jobs(49152, 4, 6) for _ in range(2))
    for job in expected + found:
        job.max_tokens = 6
    dtype = "float32" if name == "smollm2-135m" else "bfloat16"
    limits: dict[str, Any] = {"max_rows": 8, "num_blocks": 64, "block_tokens": 64, "context": 512}
    limits |= {"dtype": dtype, "kv_dtype": "float8"}
    with run_ranks_as_threads(models[name], Topology(), **limits) as instance:
        Driver(instance).run(expected)
    with cuda_instance(models[name], **limits) as on_gpu:
        Driver(on_gpu, chunk=40).run(found)  # type: ignore[arg-type]
    # Where sums round differently a code may be the next one.
    assert far(found, expected) < 2 * BFLOAT16_BOUND


@pytest.mark.parametrize("name", ["smollm2-135m", "llama-3-8b"])
def test_float8_decode_graphs_give_the_bits_of_single_launches(models: dict[str, Path], name: str) -> None:
    dtype = "float32" if name == "smollm2-135m" else "bfloat16"
    outcomes = []
    for has_graphs in (True, False):
        some = jobs(49152, 9, 2)
        with cuda_instance(
            models[name], dtype=dtype, kv_dtype="float8", block_tokens=64, has_graphs=has_graphs
        ) as instance:
            instance.assembled.runner._pieces.clear()
            Driver(instance, depth=2).run(some)  # type: ignore[arg-type]
        outcomes.append(outcome(some))
    assert outcomes[0] == outcomes[1]


def test_no_step_waits_for_the_device(models: dict[str, Path]) -> None:
    with cuda_instance(models["llama-3-8b"], dtype="bfloat16", block_tokens=64) as instance:
        Driver(instance, depth=2).run(jobs(49152, 6, 4))  # type: ignore[arg-type]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # It says that it does not see every way of waiting.
            torch.cuda.set_sync_debug_mode("error")
        try:
            Driver(instance, depth=2).run(jobs(49152, 6, 5))  # type: ignore[arg-type]
        finally:
            torch.cuda.set_sync_debug_mode("default")


def waits(work: Callable[[], object]) -> Counter[str]:
    """The driver's and the runtime's calls that wait for the device, by name, while ``work`` is done."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    # Without this a second profile warns that the first one's events are gone.
    with torch.profiler.profile(activities=activities, acc_events=True) as profile:
        work()
    return Counter(event.name for event in profile.events() if "ynchronize" in event.name)


def test_the_driver_sees_no_wait_but_one_for_each_step(models: dict[str, Path]) -> None:
    with cuda_instance(models["llama-3-8b"], dtype="bfloat16", block_tokens=64) as instance:
        Driver(instance, depth=2).run(jobs(49152, 6, 4))  # type: ignore[arg-type]
        nothing = waits(lambda: None)
        before = instance.num_steps
        found = waits(lambda: Driver(instance, depth=2).run(jobs(49152, 6, 5)))  # type: ignore[arg-type]
        steps = instance.num_steps - before
    found.subtract(nothing)
    # The thread that answers waits for an event a step; nobody waits for a stream or for the device.
    of_events = sum(count for name, count in found.items() if "Event" in name)
    assert sum(found.values()) - of_events <= 0, found
    assert of_events <= steps, (found, steps)

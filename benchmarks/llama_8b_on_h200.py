"""What the 8B shape in bfloat16 on one H200 is held against, and the ceilings of that machine.

Ceilings were measured there with torch 2.11 (CUDA graph replays, data larger than the L2 cache); vLLM is
0.25.1 and SGLang 0.5.13 on the same machine with random weights from a RAM disk, 128 tokens in and out.
"""

import math
from collections.abc import Mapping

from benchmarks.figures import Demand
from models.parameter import DTYPE_BYTES
from models.spec import ModelSpec
from protocol.topology import Topology

READ_BYTES_S = 4.66e12
MATMUL_FLOPS = 785e12
DEVICE_GIB = 139.8

DEMANDS: Mapping[str, Demand] = {
    "boot": Demand(vllm=52.4, sglang=78.7),
    "decode step, 1 request": Demand(must=4.5, aim=4.0, vllm=4.84, sglang=4.69),
    "decode step, 8 requests": Demand(must=4.7, aim=4.3, vllm=4.97, sglang=4.96),
    "decode step, 64 requests": Demand(must=5.7, aim=5.1, vllm=5.93, sglang=5.93),
    "decode step, 256 requests": Demand(must=10.0, aim=8.9, vllm=10.68, sglang=10.97),
    # All matrix products at their peak, and no gaps.
    "prefill, 4 x 7000": Demand(ceiling=44600, must=41000, aim=43000, vllm=39800, sglang=38000),
    "mixed p99 / pure step": Demand(must=2.0),
    "CPU in decode, 1 request": Demand(must=60.0),
    "CPU a token, 256 requests": Demand(must=16.0, aim=12.0),
    "CPU of the run, 1 request": Demand(vllm=0.31, sglang=0.67),
    "CPU of the run, 64 requests": Demand(vllm=0.53, sglang=1.00),
    "CPU of the run, 256 requests": Demand(vllm=1.09, sglang=2.25),
    "CPU idle": Demand(must=1.0),
    "KV cache": Demand(must=122.0, vllm=108.9, sglang=107.4),
    "KV tokens": Demand(vllm=891760, sglang=880193),
}
"""By figure. Their CPU times are without detokenising."""


def weight_bytes(model: ModelSpec) -> int:
    """Return the bytes of all parameters."""
    return sum(p.local_bytes(Topology()) for p in model.parameters if p.alias_of is None)


def decode_ceiling_ms(model: ModelSpec, rows: int, context: float) -> float:
    """Return the least that a decode step can take: its matrix products, then reading the KV cache.

    The products take the longer of reading the weights (only rows of the embedding are read) and
    computing; attention follows them layer by layer, so that its reading adds up with theirs.
    """
    embedding = math.prod((model.vocab_size, model.hidden_size)) * DTYPE_BYTES[model.dtype]
    is_tied = any(p.alias_of is not None for p in model.parameters)
    read_s = (weight_bytes(model) - (0 if is_tied else embedding)) / READ_BYTES_S
    compute_s = rows * model.flops_per_token / MATMUL_FLOPS
    whole = range(model.num_layers)
    kv_bytes = rows * context * sum(group.bytes_per_token(Topology(), whole) for group in model.kv_groups)
    return (max(read_s, compute_s) + kv_bytes / READ_BYTES_S) * 1e3

"""``python -P -m worker.warm --cache DIR --architecture sm_90a``: build what a boot would have to compile.

With ``--model DIR`` also FlashInfer's operators for that model's attention, which takes nvcc, ninja and
some minutes each. Prints a line of JSON for each: its name, and whether it had to be built.
"""

import argparse
import json
import sys
from pathlib import Path

from protocol.errors import TandemError
from protocol.topology import Topology


def main() -> int:
    """Fill the kernel cache; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m worker.warm", description="Build GPU kernels.")
    parser.add_argument("--cache", required=True, type=Path, help="where they are kept")
    parser.add_argument("--architecture", required=True, help="as compilers spell it: sm_90a")
    parser.add_argument("--model", type=Path, help="a model directory: its attention's operators too")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--block-tokens", required=True, type=int, help="of a server's KV blocks")
    parser.add_argument("--max-rows", required=True, type=int, help="the most rows of a server")
    options = parser.parse_args()
    from worker.backends.cuda.compiler import KernelCache

    try:
        for name, was_built in KernelCache(options.cache, options.architecture).warm():
            _say(name, was_built=was_built)
        if options.model is not None:
            kept = (options.cache, options.architecture)
            _warm_operators(*kept, options.model, options.tp, options.block_tokens)
            _warm_products(*kept, options.model, options.tp, options.max_rows)
    except TandemError as error:
        sys.stderr.write(f"{error.message}\n")
        return 1
    return 0


def _warm_operators(cache: Path, architecture: str, model: Path, tp: int, block_tokens: int) -> None:
    from models.deepseek_config import DeepseekConfig
    from models.registry import load_spec
    from worker.backends.cuda.device import operators_directory
    from worker.backends.cuda.flashinfer_build import build, latent_operators, operators_of

    spec = load_spec(model, "bfloat16")
    for group in spec.kv_groups:
        if group.kind == "latent":
            config = spec.config
            assert isinstance(config, DeepseekConfig), spec.architecture
            operators = latent_operators(config.nope_dim + config.rope_dim, config.value_dim)
        else:
            ratio = -(-spec.heads // tp) // group.local_heads(Topology(tp))
            operators = operators_of(group.key_dim, ratio, block_tokens)
        for name, was_built in build(operators, operators_directory(cache, architecture)):
            _say(name, was_built=was_built)


def _warm_products(cache: Path, architecture: str, model: Path, tp: int, max_rows: int) -> None:
    """Measure which algorithms multiply this model's shapes fastest, on the first GPU of this kind."""
    import torch

    from models.registry import SERVED_DTYPES, load_spec
    from worker.backends.cuda import gemm_table
    from worker.backends.cuda.cublaslt import CublasLt
    from worker.backends.cuda.device import architecture as kind_of

    for ordinal in range(torch.cuda.device_count()):
        if kind_of(ordinal) == architecture:
            break
    else:
        return
    torch.cuda.set_device(ordinal)
    spec = load_spec(model, "bfloat16")
    shapes = set()
    for parameter in spec.parameters:
        local = parameter.local_shape(Topology(tp))
        is_packed = parameter.scales_of is not None or parameter.dtype not in SERVED_DTYPES
        if len(local) == 2 and not is_packed and parameter.place != "first" and parameter.layer <= 0:
            dtype = torch.float32 if parameter.place == "last" else torch.bfloat16
            shapes.add((local[0], local[1], dtype))
    lt = CublasLt(torch.device("cuda", ordinal))
    path = gemm_table.table_path(cache, torch.cuda.get_device_name(ordinal), lt.version)
    # Other models and degrees may have been measured before: theirs is kept.
    lines = gemm_table.read(path)
    measured = {(line.outputs, line.k, line.dtype) for line in lines}
    missing = sorted(
        (shape for shape in shapes if (*shape[:2], str(shape[2])) not in measured),
        key=lambda shape: shape[:2],
    )
    if missing:
        gemm_table.write(path, [*lines, *gemm_table.measure(lt, missing, max_rows)])
    _say(path.name, was_built=bool(missing))


def _say(name: str, *, was_built: bool) -> None:
    sys.stdout.write(json.dumps({"name": name, "built": was_built}) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())

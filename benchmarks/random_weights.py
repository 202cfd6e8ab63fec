"""Random values for the parameters of one rank, drawn where they lie."""

import torch

from models.layout import Arena
from models.parameter import ParameterSpec
from worker.layers.weights import Weights

_WORDS = (-(1 << 31), (1 << 31) - 1)
_INT4_DEVIATION = 4.6
"""Of a code of four random bits."""
_FINITE_FLOAT8 = 0xBF
"""The bits of an e4m3 code that is less than 2."""
_OUTPUT_PART = 0.125
"""What blocks add to the residual stream is small beside it, so that tokens stay unlike each other."""


def draw(spec: ParameterSpec, out: torch.Tensor, generator: torch.Generator) -> None:
    """Fill a parameter with random values, such that what layers make of them stays about 1.

    Routers choose evenly: their rows are drawn alike, and nothing corrects the scores.
    """
    name = spec.name.removesuffix("_scales")
    deviation = out.shape[-1] ** -0.5
    if spec.scales_of is not None:
        # Groups of 32 columns have one in int4, blocks of 128 in float8.
        each, code = (128, 1.0) if spec.dtype == "float32" else (32, _INT4_DEVIATION)
        deviation = (out.shape[-1] * each) ** -0.5 / code
    if name.endswith((".o", "down")):
        deviation *= _OUTPUT_PART
    if spec.scales_of is not None:
        out.uniform_(0.5 * deviation, 1.5 * deviation, generator=generator)
    elif spec.dtype == "int32":
        out.random_(*_WORDS, generator=generator)
    elif spec.dtype == "float8_e4m3fn":
        codes = out.view(torch.uint8)
        codes.random_(0, 256, generator=generator).bitwise_and_(_FINITE_FLOAT8)
    elif name.endswith("router_bias"):
        out.zero_()
    elif out.dim() == 1:
        out.uniform_(0.9, 1.1, generator=generator)
    else:
        out.normal_(0.0, 1.0 if name == "embedding" else deviation, generator=generator)


def fill(weights: Weights, held: Arena, generator: torch.Generator) -> None:
    """Draw all parameters of a rank."""
    for placed in held.placed:
        if not placed.is_alias:
            draw(placed.spec, weights[placed.spec.name], generator)

"""Mixture of experts on one GPU: route, sort by expert, two grouped products, sum by token.

Seven launches or fewer whatever the tokens, none of which waits for the host; sums are added in a fixed
order, so the same input gives the same bits.
"""

import torch

from models.moe import Routing
from protocol.errors import UnsupportedModelError
from worker.backends.base import BlockFloat8Weight, ExpertWeights, Int4Weight, Routed
from worker.backends.cuda.elementwise import Elementwise
from worker.backends.cuda.grouped import Grouped, Slots, Weight
from worker.backends.cuda.grouped_table import PLAIN_COLUMNS, columns_for, likely_tiles, most_tiles
from worker.backends.cuda.launch import Kernel, Kernels
from worker.backends.cuda.linear import Linear

MOST_EXPERTS = 512
MOST_TOP_K = 16
_FILE = "moe"
_THREADS = 256
_ROUTE_THREADS, _ROUTE_TOKENS = 128, 4
_SORT_THREADS = 1024
_FEW_CHOICES = 32
_NAMES = {torch.bfloat16: ("bf16", 8), torch.float32: ("float", 4)}
_DTYPES = (torch.bfloat16, torch.float32, torch.int32)
_INT4_GROUP = 32
_PIECE_ELEMENTS = 8
"""Of bf16 in 16 bytes, which a thread copies at a time."""


class CudaExperts:
    """``Experts`` of one layer."""

    def __init__(
        self,
        kernels: Kernels,
        linear: Linear,
        elementwise: Elementwise,
        weights: ExpertWeights,
        routing: Routing,
    ) -> None:
        """Errors: ``UnsupportedModelError``."""
        self._gate_up, self._down = _check(weights, routing)
        self._linear, self._elementwise = linear, elementwise
        self._weights, self._routing = weights, routing
        self._grouped = Grouped(kernels)
        self._num_local = _words(self._gate_up).shape[0]
        self._route = kernels.get(_FILE, "moe_route", "PPPPiiiiifii")
        self._sort = kernels.get(_FILE, "moe_sort", "PPPPPPPiiiii")
        self._kernels = kernels
        self._known: dict[str, Kernel] = {}
        self.loads = torch.zeros(self._num_local, dtype=torch.int64, device=weights.router.device)
        """[local experts]: choices that each was given since it was made, padding of graphs included."""

    def route(self, x: torch.Tensor) -> Routed:
        """See ``Experts.route``."""
        routing, router = self._routing, self._weights.router
        tokens = x.shape[0]
        experts = torch.empty(tokens, routing.top_k, dtype=torch.int64, device=x.device)
        weights = torch.empty(tokens, routing.top_k, dtype=torch.float32, device=x.device)
        if tokens:
            logits = self._linear(x.to(router.dtype), router, torch.float32)
            self._route(
                (-(-tokens // _ROUTE_TOKENS),),
                _ROUTE_THREADS,
                (
                    logits,
                    0 if self._weights.bias is None else self._weights.bias,
                    experts,
                    weights,
                    tokens,
                    routing.experts,
                    routing.top_k,
                    routing.scores == "softmax",
                    routing.normalize,
                    routing.scale,
                    routing.groups,
                    routing.top_groups,
                ),
            )
        return Routed(experts, weights)

    def run(self, x: torch.Tensor, routed: Routed) -> torch.Tensor:
        """See ``Experts.run``."""
        tokens, hidden = x.shape
        out = torch.empty_like(x)
        if not tokens:
            return out
        weighs_input = self._routing.weighs == "input"
        slots = self.sort(routed, is_plain=x.dtype == torch.float32, rows_are_choices=weighs_input)
        if weighs_input:
            x = self._weigh(x, routed)
        few = slots.rows.shape[0] <= _FEW_CHOICES
        gated = x.dtype != torch.float32
        inner = self._grouped(x, self._gate_up, slots, gathers=True, gated=gated, few=few)
        if not gated:
            inner = self._elementwise.swiglu(inner)
        found = self._grouped(inner, self._down, slots, gathers=False, gated=False, few=few)
        name, pack = _packed(x.dtype, hidden)
        self._get(f"moe_combine_{name}_{pack}", "PPPPii")(
            (tokens, -(-hidden // (pack * _THREADS))),
            _THREADS,
            (
                found,
                0 if weighs_input else routed.weights,
                slots.slots,
                out,
                routed.experts.shape[1],
                hidden,
            ),
        )
        return out

    def sort(
        self, routed: Routed, *, is_plain: bool, rows_are_choices: bool, columns: int | None = None
    ) -> Slots:
        """Return the choices of local experts sorted by expert.

        ``is_plain``: for the float32 kernels. ``rows_are_choices``: a slot's input is its choice's row, not
        its token's. ``columns``: the tiles' width; None: what suits so many choices.
        """
        choices = routed.experts.numel()
        if columns is None:
            columns = PLAIN_COLUMNS if is_plain else columns_for(choices, self._routing.experts)
        num_tiles = most_tiles(choices, self._num_local, columns)
        # One allocation: tiles first, which must lie at a multiple of 16 bytes.
        sizes = [4 * num_tiles, 1, choices, choices, self._num_local + 1]
        ints = torch.empty(sum(sizes), dtype=torch.int32, device=routed.experts.device)
        tiles, count, rows, slots, offsets = torch.split(ints, sizes)
        assert routed.experts.dtype == torch.int64, routed.experts.dtype
        assert routed.experts.is_contiguous(), routed.experts.stride()
        self._sort(
            (1,),
            _SORT_THREADS,
            (
                routed.experts,
                offsets,
                slots,
                rows,
                tiles,
                count,
                self.loads,
                choices,
                self._weights.first,
                self._num_local,
                1 if rows_are_choices else routed.experts.shape[1],
                8 * columns,
            ),
        )
        likely = likely_tiles(choices, self._routing.experts, self._num_local, columns)
        return Slots(tiles.view(num_tiles, 4), count, rows, slots, offsets, columns, likely)

    def _weigh(self, x: torch.Tensor, routed: Routed) -> torch.Tensor:
        """Return each choice's input times its weight, [choices, hidden]."""
        choices, hidden = routed.experts.numel(), x.shape[1]
        out = x.new_empty(choices, hidden)
        name, pack = _packed(x.dtype, hidden)
        self._get(f"moe_weigh_{name}_{pack}", "PPPii")(
            (choices, -(-hidden // (pack * _THREADS))),
            _THREADS,
            (x, routed.weights, out, routed.experts.shape[1], hidden),
        )
        return out

    def _get(self, name: str, signature: str) -> Kernel:
        kernel = self._known.get(name)
        if kernel is None:
            kernel = self._known[name] = self._kernels.get(_FILE, name, signature)
        return kernel


def _words(weight: Weight) -> torch.Tensor:
    return weight.words if isinstance(weight, Int4Weight) else weight


def _packed(dtype: torch.dtype, width: int) -> tuple[str, int]:
    """Return a dtype's name and the elements that a thread moves of rows of ``width``."""
    name, pack = _NAMES[dtype]
    return name, pack if width % pack == 0 else 1


def _check(weights: ExpertWeights, routing: Routing) -> tuple[Weight, Weight]:
    """Refuse what no kernel could run: at boot, never in a step. Return gate|up and down."""
    if routing.experts > MOST_EXPERTS or routing.top_k > MOST_TOP_K:
        raise UnsupportedModelError(
            f"{routing.top_k} of {routing.experts} experts for a token were asked for on a GPU, whose "
            f"kernels route to {MOST_TOP_K} of {MOST_EXPERTS} at most: serve this model with --device cpu"
        )
    gate_up, down = weights.gate_up, weights.down
    if isinstance(gate_up, BlockFloat8Weight) or isinstance(down, BlockFloat8Weight):
        raise UnsupportedModelError(
            "experts in float8 were asked for on a GPU, whose kernels take bfloat16, int4 and float32: "
            "serve this model with --device cpu"
        )
    _check_weight("gate|up", gate_up)
    _check_weight("down", down)
    return gate_up, down


def _check_weight(name: str, weight: Weight) -> None:
    words = _words(weight)
    outputs, k = words.shape[1:]
    rows = words if words.is_contiguous() else words.transpose(1, 2)
    if words.dtype not in _DTYPES or not rows.is_contiguous():
        raise UnsupportedModelError(
            f"{name} of experts in {words.dtype} with strides {words.stride()} was asked for on a GPU, "
            "whose kernels take rows of bfloat16, int4 and float32 and columns of bfloat16 and float32: "
            "serve this model with --device cpu"
        )
    if words.dtype == torch.float32:
        return
    what, count, least = "columns", k, _PIECE_ELEMENTS
    if isinstance(weight, Int4Weight):
        count, least = 8 * k, _INT4_GROUP
    elif rows is not words:
        what, count = "rows", outputs // 2 if name == "gate|up" else outputs
    if count % least:
        raise UnsupportedModelError(
            f"a rank's {name} of experts has {count} {what}, on a GPU they must be a multiple of {least}: "
            "choose a tensor parallel degree that leaves so many, or place experts whole with --ep"
        )

"""The least time that a layout's steps take: reading, computing and sending, at what a GPU reaches of each.

A step of a stage takes the longer of reading its weights and multiplying by them, then attention reads its
KV, then come the collectives, each with its link's latency. Nothing else is counted (norms, launches,
sampling), so these are bounds; on one H200, Llama-3-8B takes 3.2 ms a token by them and 4.1 in truth.
"""

import math
from typing import Final

import msgspec

from models.layout import WeightBytes
from models.machines import Link, Machines
from models.memory import RankPlan
from models.moe import Routing, split_bytes, splits_tokens
from models.parameter import DTYPE_BYTES
from models.spec import KVGroup, ModelSpec
from protocol.topology import Topology

START_S: Final = 3.4
"""A process that imports torch and makes a CUDA context, warm; reading runs beside it (one H200)."""
CONNECT_S: Final = 0.91
"""NCCL's communicators, where a rank has peers (two H200s)."""
_SAMPLED_BYTES: Final = 12
"""What a rank gathers of each peer to sample a row: three numbers (``worker/backends/cuda/sampler.py``)."""
_LOG_SUM_BYTES: Final = 4
"""Beside a head's output over some positions: the logarithm of what its weights add up to."""
_SPLIT_MESSAGES: Final = 5
"""Of a layer whose tokens are split (``worker/layers/expert_exchange.py``); two more for shared experts."""
_TOKEN_BYTES: Final = 8
"""A sampled token on its way to the first stage."""


class Traffic(msgspec.Struct, frozen=True):
    """One kind of message of a step, on the rank that sends most of it."""

    what: str
    link: str
    count: int
    """Times a step."""
    bytes_per_token: int
    """Sent by a rank for each token of the step, all times together."""


class Decode(msgspec.Struct, frozen=True):
    """Steps of one token a row, every row with the same context."""

    rows: int
    token_s: float
    """From one token of a row to its next."""
    tokens_s: float
    """Of all rows together."""
    weight_bytes: int
    """That the rank which reads most reads a step; ``kv_bytes`` likewise."""
    kv_bytes: int


class _Message(msgspec.Struct, frozen=True):
    """Collectives of one kind on one stage."""

    what: str
    link: Link
    count: int
    bytes_per_token: float

    def seconds(self, tokens: int) -> float:
        return self.count * self.link.latency_s + tokens * self.bytes_per_token / self.link.bytes_s


class Pace:
    """Arithmetic of one layout; made once, asked for several sizes."""

    def __init__(
        self,
        model: ModelSpec,
        topology: Topology,
        ranks: tuple[RankPlan, ...],
        machines: Machines,
        step_tokens: int,
        sizes: WeightBytes | None = None,
    ) -> None:
        """``ranks``: the memory of each; ``step_tokens``: of the largest step; ``sizes``: the model's."""
        sizes = sizes or WeightBytes(model)
        self._model, self._topology, self._ranks = model, topology, ranks
        self._machines, self._gpu, self._step_tokens = machines, machines.gpu, step_tokens
        self._stages = [
            _Stage(model, topology, ranks, stage, machines, sizes) for stage in range(topology.pp)
        ]
        self._whole = sum(stage.weight_bytes(1) for stage in self._stages)

    def decode(self, rows: int, context: int) -> Decode:
        """Return the bound of decoding ``rows`` rows that hold ``context`` tokens each.

        Stages work on disjoint rows: a row's next token is planned when its last one is sampled.
        """
        batches = min(self._topology.pp, rows)
        each = -(-rows // batches)
        times = [
            self._stage_s(stage, each, each * stage.kv_bytes(context))
            + sum(message.seconds(each) for message in stage.merges)
            for stage in self._stages
        ]
        token_s = max(sum(times), batches * max(times))
        return Decode(
            rows=rows,
            token_s=token_s,
            tokens_s=rows / token_s,
            weight_bytes=max(stage.weight_bytes(each) for stage in self._stages),
            kv_bytes=max(each * stage.kv_bytes(context) for stage in self._stages),
        )

    def first_token_s(self, prompt: int) -> float:
        """Return the bound of a prompt's first token: its chunks follow each other through the stages."""
        chunks = -(-prompt // self._step_tokens)
        each = -(-prompt // chunks)
        # What chunks find in the cache, on average: half the prompt but for what is their own.
        cached = prompt * (chunks - 1) // (2 * chunks)
        times = []
        for stage in self._stages:
            attention = stage.attention_flops(prompt) / chunks / self._gpu.matmul_flops
            times.append(self._stage_s(stage, each, 0) + attention + stage.gather_s(cached))
        return sum(times) + (chunks - 1) * max(times)

    def boot_s(self, checkpoint_bytes: int, drive_bytes_s: float) -> float:
        """Return the seconds from the start to weights on all GPUs; graphs are captured after that.

        Each machine reads the part that its ranks hold, beside the start of its processes; then ranks copy
        what is theirs to their GPUs.
        """
        weights = [_line(rank, "weights") for rank in self._ranks]
        each = self._machines.gpus_each
        part = max(sum(weights[at : at + each]) for at in range(0, len(weights), each)) / sum(weights)
        read_s = checkpoint_bytes * part / drive_bytes_s
        copy_s = max(weights) / self._gpu.host_bytes_s
        return max(START_S + CONNECT_S * (len(weights) > 1), read_s) + copy_s

    def traffic(self) -> tuple[Traffic, ...]:
        """Return what ranks send in a step, by kind, on the stage that sends most."""
        most: dict[str, _Message] = {}
        for stage in self._stages:
            split = stage.messages(self._step_tokens)
            for message in (*stage.messages(1), *stage.merges, *split):
                known = most.get(message.what)
                if known is None or (message.bytes_per_token, message.link.latency_s) > (
                    known.bytes_per_token,
                    known.link.latency_s,
                ):
                    most[message.what] = message
        return tuple(Traffic(m.what, m.link.name, m.count, round(m.bytes_per_token)) for m in most.values())

    def _stage_s(self, stage: "_Stage", tokens: int, kv_bytes: int) -> float:
        read_s = stage.weight_bytes(tokens) / self._gpu.read_bytes_s
        # A product's operations go with the weights it reads.
        part = stage.weight_bytes(1) / self._whole
        flops = tokens * self._model.flops_per_token * part / self._topology.tp
        compute_s = flops / self._gpu.matmul_flops
        sent_s = sum(message.seconds(tokens) for message in stage.messages(tokens))
        return max(read_s, compute_s) + kv_bytes / self._gpu.read_bytes_s + sent_s


class _Stage:
    """What a rank of one stage reads and sends."""

    def __init__(
        self,
        model: ModelSpec,
        topology: Topology,
        ranks: tuple[RankPlan, ...],
        stage: int,
        machines: Machines,
        sizes: WeightBytes,
    ) -> None:
        group = topology.tp_group(stage)
        self._layers = ranks[group.start].layers
        self._model, self._topology = model, topology
        self._always = 0
        self._stacks: dict[int, int] = {}
        # Of the embedding a step reads rows alone.
        parameters = sizes.read_by(topology, self._layers)
        for spec, size in parameters:
            if spec.stack:
                self._stacks[spec.stack] = self._stacks.get(spec.stack, 0) + size
            else:
                self._always += size
        self._mixtures = {spec.layer: spec.stack for spec, _ in parameters if spec.stack}
        self._has_shared = any(spec.name.endswith(".shared_gate_up") for spec, _ in parameters)
        self._link = machines.link(topology.tp_group(stage))
        self._hidden_bytes = model.hidden_size * DTYPE_BYTES[model.dtype]
        self._others = tuple(_others(model, topology, stage, machines))
        self._num_reduced = 2 * len(self._layers) + (stage == 0)
        self.merges = tuple(_merges(model, topology, self._layers, machines.link(topology.tp_group(stage))))
        """What decoding sends where KV is kept by position."""

    def messages(self, tokens: int) -> tuple[_Message, ...]:
        """Return what a rank of the stage sends in a step of so many tokens, ``merges`` left out."""
        tp, hidden, link = self._topology.tp, self._hidden_bytes, self._link
        if tp == 1:
            return self._others
        # A ring, or any other way that sends no more, sends every element but a rank's own part twice.
        of_one = 2 * (tp - 1) / tp * hidden
        split = [
            split_bytes(routing, hidden, tp, has_shared=self._has_shared)
            for routing in map(self._routing, self._mixtures.values())
            if splits_tokens(routing, tokens, hidden, self._topology, has_shared=self._has_shared)
        ]
        # After attention and after the MLP of each layer, and the embedding's rows.
        reduced = self._num_reduced - 2 * len(split)
        found = [_Message("all-reduce", link, reduced, reduced * of_one)]
        if split:
            each = _SPLIT_MESSAGES + (2 if self._has_shared else 0)
            found.append(_Message("tokens to experts and back", link, each * len(split), sum(split)))
        return (*found, *self._others)

    def _routing(self, experts: int) -> Routing:
        return Routing(experts, self._model.experts_per_token or 1)

    def weight_bytes(self, tokens: int) -> int:
        """Return what a step of so many tokens reads of the weights.

        Of routed experts those that are hit, if every token chooses evenly among them. Where they are
        placed, the others wait for the rank with the most that are hit.
        """
        chosen, ranks = self._model.experts_per_token, self._topology.ep
        total = 0.0
        for experts, size in self._stacks.items():
            # All of them, where the model does not say how many are chosen.
            part = 1 - (1 - chosen / experts) ** tokens if chosen else 1.0
            if ranks > 1:
                # The most of so many nearly normal numbers.
                local = experts / ranks
                most = local * part + math.sqrt(2 * math.log(ranks) * local * part * (1 - part))
                part = min(most, local, tokens * max(chosen, 1)) / local
            total += size * part
        return self._always + round(total)

    def kv_bytes(self, context: int) -> int:
        """Return what attention reads for one row of ``context`` tokens."""
        return sum(self._line_bytes(group) * _seen(group, context) for group in self._model.kv_groups) // (
            self._topology.dcp
        )

    def gather_s(self, cached: int) -> float:
        """Return what a prompt's chunk waits for ``cached`` tokens of KV that other ranks keep."""
        dcp = self._topology.dcp
        if dcp == 1:
            return 0.0
        kept = sum(self._line_bytes(group) * _seen(group, cached) for group in self._model.kv_groups)
        return len(self._layers) * self._link.latency_s + kept * (dcp - 1) / dcp / self._link.bytes_s

    def _line_bytes(self, group: KVGroup) -> int:
        """Return what a token takes on the ranks that keep the same heads, together."""
        topology = self._topology
        return group.bytes_per_token(Topology(topology.tp, topology.pp), self._layers)

    def attention_flops(self, prompt: int) -> float:
        """Return a rank's operations for scores and values of a prompt, of which a token sees half."""
        total = 0.0
        for group in self._model.kv_groups:
            here = sum(1 for layer in group.layers if layer in self._layers)
            # Of a prompt, or of a chunk of one, a token sees half; of a window, nearly all.
            seen = group.most_seen(prompt) / 2
            if group.kind == "sliding":
                seen = min(prompt / 2, group.window)
            dims = group.computed_dims or group.key_dim + group.value_dim
            total += here * 2 * dims * seen * prompt
        return total * self._model.heads / self._topology.tp


def _seen(group: KVGroup, context: int) -> int:
    return int(group.most_seen(context))


def _others(model: ModelSpec, topology: Topology, stage: int, machines: Machines) -> list[_Message]:
    """Return what a stage's ranks send beside the sums of their layers."""
    found = []
    tp, group = topology.tp, topology.tp_group(stage)
    hidden = model.hidden_size * DTYPE_BYTES[model.dtype]
    is_last = stage == topology.pp - 1
    if tp > 1 and is_last:
        found.append(_Message("gather to sample", machines.link(group), 1, (tp - 1) * _SAMPLED_BYTES))
    if topology.pp > 1 and not is_last:
        found.append(
            _Message("to the next stage", machines.link(range(group.start, group.stop + tp)), 1, hidden)
        )
    if topology.pp > 1 and is_last:
        link = machines.link(range(topology.world_size))
        found.append(_Message("tokens to the first stage", link, 1, _TOKEN_BYTES))
    return found


def _merges(model: ModelSpec, topology: Topology, layers: range, link: Link) -> list[_Message]:
    """Return what ranks that keep a part of the positions send to attend to all of them.

    Queries of each rank's heads to the others, and to each rank its heads' outputs over the positions here,
    with what they are merged by. Of latents both are as wide as a line.
    """
    if topology.dcp == 1:
        return []
    heads, size = -(-model.heads // topology.tp), DTYPE_BYTES[model.dtype]
    queries = outputs = count = 0
    for group in model.kv_groups:
        here = sum(1 for layer in group.layers if layer in layers)
        peers = here * (topology.dcp - 1) * heads
        queries += peers * group.key_dim * size
        outputs += peers * ((group.value_dim or group.key_dim) * size + _LOG_SUM_BYTES)
        count += here
    return [
        _Message("gather of queries", link, count, queries),
        _Message("reduce-scatter of outputs", link, count, outputs),
    ]


def _line(rank: RankPlan, name: str) -> int:
    return next(line.predicted_bytes for line in rank.lines if line.name == name)

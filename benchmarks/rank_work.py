"""What one rank of a model must read and multiply in a step: arithmetic over its parameters, without torch.

Of routed experts a step reads those that its tokens hit, which the caller counted or expects.
"""

import math
from collections.abc import Mapping

from models.layout import stage_parameters
from models.packing import PER_WORD
from models.parameter import ParameterSpec
from models.spec import KVGroup, ModelSpec
from protocol.topology import Topology


class RankWork:
    """One rank of the only stage of a model."""

    def __init__(self, model: ModelSpec, topology: Topology) -> None:
        self._model, self._topology = model, topology
        self._layers = range(model.num_layers)
        self.always_bytes = 0
        """Of the weights, what every step reads; of the embedding it reads rows alone."""
        self.expert_bytes: dict[int, int] = {}
        """Of one expert, by layer."""
        self._experts: dict[int, int] = {}
        self._local: dict[int, int] = {}
        self._expert_adds: dict[int, int] = {}
        self._adds = 0.0
        for spec in stage_parameters(model, self._layers):
            if spec.place != "first":
                self._add(spec)

    def weight_bytes(self, hit: Mapping[int, float]) -> float:
        """Return what a step reads of the weights, by how many of the rank's experts it hits in a layer."""
        return self.always_bytes + sum(self.expert_bytes[layer] * count for layer, count in hit.items())

    def kv_bytes(self, rows: int, context: float) -> float:
        """Return what a step of one token a row reads of the KV, with ``context`` tokens in each."""
        return sum(
            rows * group.bytes_per_token(self._topology, self._layers) * group.most_seen(context)
            for group in self._model.kv_groups
        )

    def expected_hit(self, tokens: int) -> dict[int, float]:
        """Return how many of the rank's experts a step hits, if tokens choose evenly among all."""
        chosen = self._model.experts_per_token
        return {
            layer: self._local[layer] * (1 - (1 - chosen / experts) ** tokens)
            for layer, experts in self._experts.items()
        }

    def prompt_flops(self, tokens: int, chosen: Mapping[int, float]) -> float:
        """Return 2 × the multiply-adds that a prompt asks of this rank where its last token wants logits.

        ``chosen``: how often its experts were, by layer. Of the last layer a long step takes one token
        behind attention: what all tokens need of it (their lines in the cache) is left out.
        """
        adds = tokens * self._adds
        adds += sum(count * self._expert_adds[layer] for layer, count in chosen.items())
        return 2 * adds + sum(self._attention_flops(group, tokens) for group in self._model.kv_groups)

    def _add(self, spec: ParameterSpec) -> None:
        size, shape = spec.local_bytes(self._topology), spec.local_shape(self._topology)
        adds = math.prod(shape) * (PER_WORD if spec.dtype == "int32" else 1)
        if spec.scales_of is not None or len(spec.segments[0].shape) < 2:
            adds = 0
        if spec.stack:
            local = len(spec.local_parts(self._topology, 0))
            self._experts[spec.layer], self._local[spec.layer] = spec.stack, local
            self.expert_bytes[spec.layer] = self.expert_bytes.get(spec.layer, 0) + size // local
            self._expert_adds[spec.layer] = self._expert_adds.get(spec.layer, 0) + adds // local
            return
        self.always_bytes += size
        if spec.place == "layer" and spec.layer != self._layers[-1]:
            self._adds += adds

    def _attention_flops(self, group: KVGroup, tokens: int) -> float:
        """Return those of scores and sums of a prompt, all layers but the last."""
        window = min(group.window, tokens) if group.is_local else tokens
        # Pairs of a token and one that it sees: of whole chunks and what is left, or of a window.
        if group.kind == "sliding":
            pairs = window * (window + 1) / 2 + (tokens - window) * window
        else:
            whole, left = divmod(tokens, window)
            pairs = whole * window * (window + 1) / 2 + left * (left + 1) / 2
        layers = sum(1 for layer in group.layers if layer != self._layers[-1])
        dims = group.computed_dims or group.key_dim + group.value_dim
        return layers * 2.0 * dims * pairs * self._model.heads / self._topology.tp

"""What every layer of one rank is made from."""

from dataclasses import dataclass

from kv.tensors import KVTensors
from worker.backends.base import Backend
from worker.comm import Communicator
from worker.layers.weights import Weights


@dataclass(frozen=True, slots=True)
class Parts:
    """One rank's weights, KV, kernels and peers."""

    weights: Weights
    cache: KVTensors
    backend: Backend
    comm: Communicator

"""What an instance is asked to be. Frozen; the one place where a default of ``serve`` stands."""

from pathlib import Path
from typing import Any, Final, Self

import msgspec

from models.memory import StepLimits
from protocol.topology import Topology


class Deadlines(msgspec.Struct, frozen=True):
    """How long each wait across a process may take, seconds."""

    hello_s: float = 60.0
    """From a rank's start to its first message."""
    boot_silence_s: float = 300.0
    """Between two signs of progress of a boot: a message of any rank."""
    step_floor_s: float = 1.0
    """The least that a step is given."""
    step_factor: float = 5.0
    """How many times its predicted time a step is given."""
    drain_s: float = 300.0
    """For the requests that run when the instance is asked to stop."""
    stop_s: float = 5.0
    """For ranks to end in order, after Stop."""
    kill_grace_s: float = 1.0
    """Between SIGTERM and SIGKILL."""
    collective_s: float = 1800.0
    """What torch.distributed waits for a peer; a rank that hangs is found out long before."""


GPU_DEFAULTS: Final[dict[str, Any]] = {
    "dtype": "bfloat16",
    "max_rows": 256,
    "step_tokens": 8448,
    "logit_rows": 256,
    "block_tokens": 64,
}
"""Where ``ServeConfig``'s own defaults, which are a CPU's, would waste a GPU.

8448 tokens are 33 tiles of 256 rows: times the 4, 8, 32 … tiles of a matrix's columns, they fill the 132
multiprocessors of a Hopper GPU exactly, where 8192 leave some idle in the last round of each product.
"""


class ServeConfig(msgspec.Struct, frozen=True, kw_only=True):
    """One instance."""

    name: str
    """Its name in the runtime directory."""
    model: Path
    """A complete model directory."""
    runtime_root: Path
    """The private directory that holds every instance's own (``protocol.runtime_dir``)."""
    environment: dict[str, str]
    """The user's; ranks see a few variables of it (``orchestrator.launcher``)."""
    served_model_name: str | None = None
    """What clients are told; None: the directory's name."""
    tp: int = 1
    pp: int = 1
    ep: int = 1
    """tp: routed experts are placed over the group; 1: they are cut by it."""
    dcp: int = 1
    """Ranks of a group that keep the KV of the same heads by position."""
    dtype: str = "float32"
    kv_dtype: str = "auto"
    """What keys and values are stored in; ``auto``: ``dtype``."""
    context: int | None = None
    """Tokens a request may hold; None: the model's most, or what fits."""
    max_rows: int = 64
    step_tokens: int = 512
    logit_rows: int = 32
    """Rows of logits that exist at a time on a rank."""
    block_tokens: int = 16
    max_waiting: int = 1024
    """Requests that may wait for a place; more are refused."""
    devices: tuple[str, ...] = ("cpu",)
    """Ranks are dealt over them in contiguous runs."""
    memory_bytes: int | None = None
    """What one device may use, over all its ranks; None: see ``orchestrator.budget``."""
    kernel_cache: Path | None = None
    """Where kernels that were compiled for this machine's GPUs are kept; a GPU needs one."""
    max_restarts: int = 0
    boot_report: Path | None = None
    deadlines: Deadlines = Deadlines()

    @classmethod
    def for_devices(cls, *, devices: tuple[str, ...] = ("cpu",), **asked: Any) -> Self:
        """Return what is asked, and for the rest what suits the devices.

        Errors: ``InvalidRequestError`` for what is no device.
        """
        from orchestrator.budget import device_kind

        suits = GPU_DEFAULTS if device_kind(devices) == "cuda" else {}
        return cls(devices=devices, **{**suits, **asked})

    @property
    def topology(self) -> Topology:
        """How the ranks are arranged."""
        return Topology(tp=self.tp, pp=self.pp, ep=self.ep, dcp=self.dcp)

    @property
    def model_name(self) -> str:
        """What clients are told they talk to."""
        return self.served_model_name or self.model.resolve().name

    @property
    def limits(self) -> StepLimits:
        """What the largest step may be, with blocks that dcp ranks share evenly."""
        block_tokens = self.topology.whole_block(self.block_tokens)
        return StepLimits(self.max_rows, self.step_tokens, self.logit_rows, block_tokens)

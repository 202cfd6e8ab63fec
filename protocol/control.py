"""What the orchestrator and the ranks say to each other. Structs travel as arrays: order is law."""

from enum import StrEnum

import msgspec

from protocol.framing import MAX_CONTROL_FRAME_BYTES, Codec
from protocol.sampling import SamplingParams
from protocol.topology import Topology


class NewRow(msgspec.Struct, frozen=True, array_like=True):
    """A request seen for the first time, or again after preemption or a fault."""

    slot: int
    """Its line in the device's batch state until released."""
    token_ids: list[int]
    """All known tokens."""
    num_prompt_tokens: int
    """Presence and frequency penalties count only what comes after."""
    num_computed_tokens: int
    """What a prefix hit already holds."""
    block_ids: tuple[list[int], ...]
    """Per layer group, in order of position."""
    sampling: SamplingParams
    """Its seed is never None."""
    banned_token_ids: list[int]
    """Not sampled while the row knows fewer than ``banned_until`` tokens (min_tokens)."""
    banned_until: int


class Advance(msgspec.Struct, frozen=True, array_like=True):
    """One row of this step. Rows stand in law order: nobody sorts again."""

    slot: int
    num_tokens: int
    new_block_ids: tuple[list[int], ...] | None
    """Appended to the row's block table before the step, per layer group; None: nothing new."""
    wants_logits: bool
    """True where the step reaches the last known token, so that one is sampled."""


class StepPlan(msgspec.Struct, frozen=True, array_like=True, tag="step"):
    """One step of every rank. A rank first releases slots, then adds rows, then advances."""

    epoch: int
    step: int
    released_slots: list[int]
    new_rows: list[NewRow]
    advances: list[Advance]


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Log-probability of one token, and of the most likely ones at its place (natural log)."""

    token_id: int
    logprob: float
    top_ids: list[int]
    top_logprobs: list[float]


class PromptLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Log-probabilities of known tokens at positions ``start, start + 1, …`` of one row."""

    slot: int
    start: int
    tokens: list[TokenLogprobs]


class StepResult(msgspec.Struct, frozen=True, array_like=True, tag="result"):
    """The sampling rank's answer to a plan."""

    epoch: int
    step: int
    token_ids: list[list[int]]
    """Per advance that wanted logits, in law order; several when speculating."""
    logprobs: list[list[TokenLogprobs] | None] | None = None
    """Beside ``token_ids``; None where nobody asked."""
    prompt_logprobs: list[PromptLogprobs] = []
    step_s: float = 0.0
    """Seconds the sampling rank worked on the step."""


class FaultKind(StrEnum):
    """Why a rank cannot go on."""

    LOAD = "load"
    """Boot: the model, its bytes or its memory."""
    STEP = "step"
    """A step raised."""
    DIED = "died"
    """The process ended (seen by the supervisor)."""
    STOPPED = "stopped"
    """The process is stopped (seen by the supervisor)."""
    HUNG = "hung"
    """A deadline passed (seen by the supervisor)."""
    PROTOCOL = "protocol"
    """A message that cannot be right."""


class Fault(msgspec.Struct, frozen=True, array_like=True, tag="fault"):
    """A rank's last word, or the supervisor's word about it."""

    epoch: int
    rank: int
    kind: FaultKind
    message: str
    code: str = "error"
    """The TandemError code where the cause was one."""


class Hello(msgspec.Struct, frozen=True, array_like=True, tag="hello"):
    """A worker's first message."""

    epoch: int
    rank: int
    pid: int


class Boot(msgspec.Struct, frozen=True, array_like=True, tag="boot"):
    """Everything a rank needs to become part of an instance; the answer to Hello."""

    epoch: int
    instance: str
    rank: int
    topology: Topology
    stages: list[list[int]]
    """Decoder layers of each stage, as [first, end)."""
    model_directory: str
    dtype: str
    device: str
    """``cpu``, or ``cuda:N``."""
    arena_fds: list[int]
    """One descriptor per rank, inherited: rank i's weights arena (memfd on CPU)."""
    kv_bytes: int
    block_tokens: int
    num_blocks: int
    """What the plan grants; a rank that finds more room says so in Ready."""
    budget_bytes: int
    """What this rank may take of its device."""
    device_ranks: int
    """Ranks on this rank's device, itself among them."""
    kernel_cache: str
    """Where compiled kernels are kept (GPU)."""
    max_rows: int
    step_tokens: int
    logit_rows: int
    """Rows of logits that exist at a time."""
    context: int
    threads: int
    """Compute threads of this rank (CPU)."""
    rendezvous: str
    """A file in the private directory, for torch.distributed's FileStore."""
    collective_timeout_s: float
    page_fd: int | None = None
    """The abort page's descriptor, inherited (``protocol.abort_page``); None: no GPU waits for a peer."""
    kv_dtype: str = "auto"
    """What keys and values are stored in."""


class Progress(msgspec.Struct, frozen=True, array_like=True, tag="progress"):
    """How far a booting rank is; at most a few a second."""

    epoch: int
    rank: int
    phase: str
    done_bytes: int
    total_bytes: int


class Span(msgspec.Struct, frozen=True):
    """One bar of the boot waterfall, on the machine's monotonic clock."""

    rank: int
    """-1: the orchestrator."""
    name: str
    start_s: float
    end_s: float
    bytes: int = 0


class MeasuredLine(msgspec.Struct, frozen=True):
    """What a rank measured for one line of the memory plan (by the line's name)."""

    name: str
    measured_bytes: int


class Ready(msgspec.Struct, frozen=True, array_like=True, tag="ready"):
    """A rank can take steps. Carries what it learnt."""

    epoch: int
    rank: int
    spans: list[Span]
    memory: list[MeasuredLine]
    step_seconds_per_token: float
    """From the warm-up at the largest step: what the step deadline is predicted from."""
    step_seconds_fixed: float
    num_blocks: int
    """KV blocks that this rank has room for."""


class LayerLoad(msgspec.Struct, frozen=True, array_like=True):
    """How many tokens chose each of some neighbouring experts of a layer."""

    layer: int
    first: int
    """Id of the first of these experts."""
    tokens: list[int]


class ExpertLoad(msgspec.Struct, frozen=True, array_like=True, tag="load"):
    """A rank's counts since its boot, every few seconds while steps run; never in a step's way."""

    epoch: int
    rank: int
    layers: list[LayerLoad]


class Stop(msgspec.Struct, frozen=True, array_like=True, tag="stop"):
    """End the process in order: exit code 0."""

    epoch: int


ToWorker = StepPlan | Boot | Stop
FromWorker = StepResult | Hello | Progress | Ready | Fault | ExpertLoad


def rank_identity(rank: int, *, is_answering: bool = False) -> bytes:
    """Return how a rank's connection names itself: the one it is told on, or the one it answers on."""
    return b"%d%s" % (rank, b"+" if is_answering else b"")


def to_worker_codec() -> "Codec[ToWorker]":
    """Return a codec for messages to ranks."""
    return Codec(ToWorker, MAX_CONTROL_FRAME_BYTES)


def from_worker_codec() -> "Codec[FromWorker]":
    """Return a codec for messages from ranks."""
    return Codec(FromWorker, MAX_CONTROL_FRAME_BYTES)

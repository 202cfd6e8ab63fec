"""Which layout to take: the arithmetic of ``models.layouts`` on GPUs that are named, or that are here."""

from pathlib import Path

import msgspec

from loader.index import check_against, read_index
from models.known import known_model
from models.layouts import Asked, Matrix, Prefer, check_views, lay_out
from models.machines import GPUS, NETWORKS, Gpu, Machines, gpu_of_driver
from models.memory import CUDA_OVERHEADS, StepLimits
from models.registry import build_spec, load_spec
from models.spec import ModelSpec
from orchestrator.budget import GIB, GPU_MARGIN_BYTES, device_kind, rank_budgets
from orchestrator.config import GPU_DEFAULTS, ServeConfig
from orchestrator.gpus import device_name
from protocol.errors import InvalidRequestError, MemoryBudgetError


class Subject(msgspec.Struct, frozen=True):
    """A model as far as planning goes."""

    name: str
    spec: ModelSpec
    checkpoint_bytes: int
    """Of all tensors that are read."""


def subject(name: str, directory: Path | None, dtype: str, kv_dtype: str) -> Subject:
    """Return the model of a directory, from config and headers alone, or else the known one by that name.

    Errors: ``UnknownModelError`` listing what is known; ``ModelFormatError`` for a directory that
    contradicts itself; ``StorageError``; ``UnsupportedModelError``.
    """
    if directory is None:
        known = known_model(name)
        spec = build_spec(known.config, f"{known.source}: config.json", dtype, kv_dtype)
        return Subject(name, spec, known.tensor_bytes - known.skipped_bytes)
    spec = load_spec(directory, dtype, kv_dtype)
    checkpoint = read_index(directory)
    check_against(spec, checkpoint)
    wanted = {segment.source for parameter in spec.parameters for segment in parameter.segments}
    return Subject(name, spec, sum(checkpoint.tensors[source].length for source in wanted))


def plan_layouts(subject: Subject, machines: Machines, memory_bytes: int | None, asked: Asked) -> Matrix:
    """Return all layouts on GPUs that need not be here.

    ``memory_bytes``: what one GPU may use; None: what it has, less the margin that a server leaves.
    Errors: those of ``lay_out``; ``MemoryBudgetError`` for more memory than the GPU has.
    """
    usable = machines.gpu.usable_bytes
    if memory_bytes is not None and memory_bytes > usable:
        raise MemoryBudgetError(
            f"{memory_bytes / GIB:.2f} GiB were asked, a {machines.gpu.name} has {usable / GIB:.2f}: give "
            "a smaller --memory",
            field="memory",
        )
    budget = usable - GPU_MARGIN_BYTES if memory_bytes is None else memory_bytes
    limits = StepLimits(
        **{name: GPU_DEFAULTS[name] for name in ("max_rows", "step_tokens", "logit_rows", "block_tokens")}
    )
    return lay_out(subject.spec, machines, budget, limits, CUDA_OVERHEADS, asked, subject.checkpoint_bytes)


class Given(msgspec.Struct, frozen=True):
    """Degrees that somebody gave; None: to be chosen, or else 1."""

    tp: int | None = None
    pp: int | None = None
    ep: int | None = None
    dcp: int | None = None


def choose_layout(
    config: ServeConfig, given: Given, *, is_auto: bool, prefer: Prefer | None
) -> tuple[ServeConfig, str | None]:
    """Return the instance with its degrees, and why it has them where they were chosen here.

    They are chosen where nobody gave tp or pp and ranks run on GPUs, or where ``is_auto`` says so; then a
    degree that is given stays. Of a layout that is given, on GPUs, ep and dcp are chosen. One rank for each
    device of the list.
    Errors: ``InvalidRequestError`` for a choice that cannot be; ``LayoutError`` for views of no such group;
    ``MemoryBudgetError`` where nothing fits; those of ``subject`` and ``lay_out``.
    """
    on_gpus = device_kind(config.devices) == "cuda"
    ranks = len(config.devices)
    if is_auto and not on_gpus:
        raise InvalidRequestError(
            "--layout auto is for GPUs: give --devices cuda:0,cuda:1 and so on, or --tp and --pp",
            field="layout",
        )
    if not is_auto and (not on_gpus or given.tp is not None or given.pp is not None):
        if prefer is not None:
            raise InvalidRequestError(
                "--prefer says which layout to choose, and none is to be chosen: give --layout auto with "
                "GPUs, or leave it out",
                field="prefer",
            )
        check_views(config.tp, config.ep, config.dcp)
        is_settled = given.ep is not None and given.dcp is not None
        if not on_gpus or is_settled or config.tp * config.pp != ranks or config.tp == 1:
            return config, None
        matrix, called = _matrix(config, msgspec.structs.replace(given, tp=config.tp, pp=config.pp), None)
        first = matrix.layouts[0]
        if matrix.best is None or (first.ep, first.dcp) == (config.ep, config.dcp):
            return config, None
    elif ranks == 1:
        check_views(1, config.ep, config.dcp)
        return config, None
    else:
        matrix, called = _matrix(config, given, prefer)
        if matrix.best is None:
            raise MemoryBudgetError(matrix.why, field="memory")
    best = matrix.layouts[matrix.best]
    return msgspec.structs.replace(config, tp=best.tp, pp=best.pp, ep=best.ep, dcp=best.dcp), (
        f"layout on {ranks} of {called}: {matrix.why}"
    )


def _matrix(config: ServeConfig, given: Given, prefer: Prefer | None) -> tuple[Matrix, str]:
    """Return the layouts on the devices that are here, and what these are called."""
    ranks = len(config.devices)
    found = subject(config.model_name, config.model, config.dtype, config.kv_dtype)
    budget = min(rank_budgets(config.devices, ranks, config.memory_bytes, config.environment))
    gpu, called = _gpu_here(config)
    # Ranks with GPUs keep whole positions (``worker/backends/cuda/comm.py``): no other degree is chosen.
    given = msgspec.structs.replace(given, dcp=given.dcp or 1)
    asked = Asked(
        context=config.context,
        concurrency=min(Asked().concurrency, config.max_rows),
        prefer=prefer or Asked().prefer,
        **msgspec.structs.asdict(given),
    )
    machines = Machines(gpu, 1, ranks, NETWORKS["infiniband"])
    # Degrees that are given may be those of a group that is only to be chosen.
    limits = msgspec.structs.replace(config, tp=1, pp=1, ep=1, dcp=1).limits
    read_bytes = found.checkpoint_bytes
    return lay_out(found.spec, machines, budget, limits, CUDA_OVERHEADS, asked, read_bytes), called


def _gpu_here(config: ServeConfig) -> tuple[Gpu, str]:
    """Return the figures of the first device, and what to call it."""
    name, total_bytes = device_name(config.devices[0], config.environment)
    gpu = gpu_of_driver(name, total_bytes)
    if gpu is not None:
        return gpu, name
    # Layouts are compared with each other, for which any card's proportions do.
    stand_in = min(GPUS.values(), key=lambda known: known.read_bytes_s)
    return stand_in, f"{name} (speeds reckoned as an {stand_in.name}'s)"

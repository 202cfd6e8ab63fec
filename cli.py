"""The ``tandem`` command. Parses, calls, prints: what is done stands in the rooms.

The one place that reads environment variables: ``XDG_RUNTIME_DIR``, ``XDG_CACHE_HOME``, ``HOME`` and
``NO_COLOR``. Every command takes ``--json``: then standard output is one JSON object and nothing else. Exit
code 1 is an error that is said, 2 a command line that is wrong, 130 Ctrl-C. Imports are made by the command
that needs them, so that the small ones answer at once.
"""

import io
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import click
import msgspec

from protocol.errors import ErrorInfo, TandemError, UnknownModelError, UnsupportedModelError
from protocol.runtime_dir import running_instances, runtime_root

if TYPE_CHECKING:
    from models.memory import MemoryPlan
    from orchestrator.config import ServeConfig
    from orchestrator.load_table import LoadSummary
    from protocol.topology import Topology
    from tandem import Client, Parameters

F = TypeVar("F", bound=Callable[..., Any])
JSON = "tandem.json"
INTERRUPTED = 130
GIB = 1 << 30


def _colour() -> bool:
    return not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def _cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "tandem"


def _root() -> Path:
    return runtime_root(os.environ)


def _print_json(value: Any) -> None:
    click.echo(msgspec.json.encode(value).decode())


class _Commands(click.Group):
    """Shows errors in the way that was asked for."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except TandemError as error:
            self._show(ctx, error.info(), error.message)
            ctx.exit(1)
        except click.UsageError as error:
            if not ctx.meta.get(JSON):
                raise
            self._show(ctx, ErrorInfo("usage", error.format_message()), error.format_message())
            ctx.exit(error.exit_code)
        except KeyboardInterrupt:
            click.echo(err=True)
            ctx.exit(INTERRUPTED)

    def _show(self, ctx: click.Context, error: ErrorInfo, message: str) -> None:
        if ctx.meta.get(JSON):
            _print_json({"error": error})
        label = click.style("Error:", fg="red") if _colour() and sys.stderr.isatty() else "Error:"
        click.echo(f"{label} {message}", err=True)


class _Gib(click.ParamType[int]):
    """A size in GiB, as bytes."""

    name = "gib"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if not 0 < number < math.inf:
            self.fail(f"{value!r} is no size: give GiB, as in 3.5", param, ctx)
        return int(number * GIB)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="tandem")
def main() -> None:
    """Serve one large language model over many worker processes."""


def _json_option(function: F) -> F:
    def remember(ctx: click.Context, _option: click.Parameter, value: bool) -> bool:
        ctx.meta[JSON] = value
        return value

    option = click.option(
        "--json", "as_json", is_flag=True, is_eager=True, callback=remember, help="Print one JSON object."
    )
    return option(function)


def _devices(_ctx: click.Context, _option: click.Parameter, value: str | None) -> tuple[str, ...] | None:
    return None if value is None else tuple(value.split(","))


def _layout_options(function: F) -> F:
    """Add what ``serve`` takes and what ``run`` and ``chat`` pass on to the server that they start."""
    for option in reversed(
        (
            click.option("--tp", type=click.IntRange(1), help="Ranks that share each layer [1]."),
            click.option("--pp", type=click.IntRange(1), help="Stages that the layers are cut into [1]."),
            click.option(
                "--ep",
                type=click.IntRange(1),
                help="--tp, to place whole experts on its ranks; 1, to cut them [what holds more on GPUs].",
            ),
            click.option(
                "--dcp",
                type=click.IntRange(1),
                help="Ranks of --tp that keep the same KV heads by position [what holds more on GPUs].",
            ),
            click.option(
                "--layout",
                type=click.Choice(["auto"]),
                help="Choose the degrees that are not given [auto on GPUs without --tp and --pp].",
            ),
            click.option(
                "--prefer",
                type=click.Choice(["latency", "throughput"]),
                help="What a chosen layout must be good at; of those, the one with the most KV [latency].",
            ),
            click.option(
                "--context", type=click.IntRange(1), help="Tokens a request may hold [what fits]."
            ),
            click.option(
                "--dtype", type=click.Choice(["float32", "bfloat16"]), help="[float32; bfloat16 on a GPU]"
            ),
            click.option(
                "--kv-dtype",
                type=click.Choice(["auto", "bfloat16", "float8"]),
                help="What keys and values are stored in [auto: --dtype].",
            ),
            click.option(
                "--devices", callback=_devices, help="Where ranks run, with commas between them [cpu]."
            ),
            click.option("--memory", type=_Gib(), help="What one device may use, over all its ranks."),
            click.option(
                "--boot-report",
                type=click.Path(dir_okay=False, path_type=Path),
                help="Write the boot's timeline as JSON.",
            ),
        )
    ):
        function = option(function)
    return function


def _config(directory: Path, model: str, options: dict[str, Any]) -> "ServeConfig":
    """Return what is asked; what is not given is left to the defaults of ``ServeConfig``."""
    from orchestrator.config import ServeConfig

    given = {name: value for name, value in options.items() if value is not None}
    renames = {"memory": "memory_bytes"}
    asked = {renames.get(name, name): value for name, value in given.items()}
    # A name that was asked for is what clients are told; of a path, the directory's own.
    shown = directory.resolve().name if Path(model).is_dir() else model
    asked.setdefault("served_model_name", shown)
    asked.setdefault("name", re.sub(r"[^A-Za-z0-9._-]+", "-", shown).strip("-._")[:64] or "model")
    return ServeConfig.for_devices(
        model=directory,
        runtime_root=_root(),
        environment=dict(os.environ),
        kernel_cache=_cache() / "kernels",
        **asked,
    )


def _laid_out(directory: Path, model: str, options: dict[str, Any]) -> "tuple[ServeConfig, str | None]":
    """Return what is asked, its layout chosen where it is to be, and then why."""
    from orchestrator.planner import Given, choose_layout

    layout, prefer = options.pop("layout"), options.pop("prefer")
    config = _config(directory, model, options)
    given = Given(**{degree: options[degree] for degree in ("tp", "pp", "ep", "dcp")})
    return choose_layout(config, given, is_auto=layout == "auto", prefer=prefer)


def _serve_command(model: str, name: str, options: dict[str, Any]) -> list[str]:
    """Return the command line of a server that ends with this process."""
    # A checkout that is not installed is found by this file's path alone.
    how = [__file__] if __name__ == "__main__" and __spec__ is None else ["-P", "-m", "cli"]
    command = [sys.executable, *how, "serve", "--json", "--while-stdin", "--model", model, "--name", name]
    for option, value in options.items():
        if value is not None:
            # A size is bytes once it is parsed, and GiB on a command line.
            text = f"{value / GIB!r}" if option == "memory" else f"{value}"
            text = ",".join(value) if option == "devices" else text
            command += [f"--{option.replace('_', '-')}", text]
    return command


@contextmanager
def _server(name: str | None, start: list[str] | None) -> "Iterator[tuple[Client, int]]":
    """Give a client of a running server, or of one started for it, and a pidfd of the server."""
    from tandem import Client, find_instance
    from tandem.local_server import LocalServer

    server = LocalServer(start) if start is not None else None
    with server or nullcontext():
        facts = server.wait_ready() if server else find_instance(name, _root())
        pidfd = os.pidfd_open(facts.pid)
        try:
            with Client(address=facts.address) as client:
                yield client, pidfd
        finally:
            os.close(pidfd)


@main.command()
@click.option("--model", required=True, help="A short name, a repository or a directory.")
@click.option("--name", help="What this server is found by [the model's name].")
@click.option("--served-model-name", help="What clients are told they talk to [the model's name].")
@_layout_options
@click.option("--max-rows", type=click.IntRange(1), help="Requests that run at a time [64; 256 on a GPU].")
@click.option(
    "--step-tokens", type=click.IntRange(1), help="Tokens of the largest step [512; 8448 on a GPU]."
)
@click.option("--max-restarts", type=click.IntRange(0), help="Faults in a row before it gives up [0].")
@click.option("--while-stdin", is_flag=True, hidden=True, help="Stop when standard input is closed.")
@_json_option
def serve(model: str, while_stdin: bool, as_json: bool, **options: Any) -> None:
    """Serve a model until it is stopped.

    What is missing is fetched first. SIGTERM (tandem stop) and Ctrl-C finish what runs; the exit code is 0
    then, and another one after a failure. With --json the object is the server's facts, once it is ready.
    """
    if while_stdin:
        from tandem.local_server import end_with

        end_with(sys.stdin.fileno())
    config, why = _laid_out(_pull(model), model, options)
    from orchestrator.display import make_display
    from orchestrator.serve import run as run_instance

    display = make_display(sys.stderr, sys.stdout if as_json else None, colour=_colour())
    if why is not None:
        display.note(why)
    sys.exit(run_instance(config, display))


@main.command()
@click.argument("name")
@_json_option
def pull(name: str, as_json: bool) -> None:
    """Fetch a model, once.

    NAME is a short name, a Hugging Face repository, or a directory.
    """
    path = _pull(name)
    if as_json:
        _print_json({"name": name, "path": str(path)})
    else:
        click.echo(path)


@main.command()
@click.option("--model", help="Also FlashInfer's operators for this model: minutes each, with nvcc.")
@click.option("--tp", type=click.IntRange(1), default=1, help="Ranks that share each layer [1].")
@_json_option
def warm(model: str | None, tp: int, as_json: bool) -> None:
    """Build the kernels of this machine's GPUs, once.

    A server's start then compiles nothing.
    """
    from orchestrator.config import GPU_DEFAULTS
    from orchestrator.gpus import architectures

    cache = _cache() / "kernels"
    built = []
    for major, minor in architectures(os.environ):
        kind = f"{major}{minor}{'a' if major >= 9 else ''}"
        command = [sys.executable, "-P", "-m", "worker.warm", "--cache", str(cache)]
        command += ["--architecture", f"sm_{kind}", "--tp", str(tp)]
        for size in ("block_tokens", "max_rows"):
            command += [f"--{size.replace('_', '-')}", str(GPU_DEFAULTS[size])]
        command += ["--model", str(_pull(model))] if model else []
        # FlashInfer's builder reads these once, when it is imported.
        environment = os.environ | {
            "FLASHINFER_CUDA_ARCH_LIST": f"{major}.{kind[len(str(major)) :]}",
            "FLASHINFER_WORKSPACE_BASE": str(cache / "build"),
        }
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
            assert process.stdout is not None
            for line in process.stdout:
                built.append(json.loads(line) | {"architecture": f"sm_{kind}"})
                if not as_json:
                    click.echo(f"{built[-1]['name']}: {'built' if built[-1]['built'] else 'there already'}")
        if process.returncode:
            raise UnsupportedModelError("not all kernels were built: see above", field="devices")
    if as_json:
        _print_json({"kernels": built})


def _pull(name: str) -> Path:
    from loader import hub

    found = hub.resolve(name, _cache())
    if found is not None:
        return found
    from tandem.render import pull_progress

    with pull_progress(name, _colour()) as report:
        return hub.pull(name, _cache(), report)


def _start(name: str | None, model: str | None, kind: str, options: dict[str, Any]) -> list[str] | None:
    """Return the command of the server to start, None where a running one is meant."""
    if model is not None:
        return _serve_command(model, name or f"{kind}-{os.getpid()}", options)
    given = [f"--{option.replace('_', '-')}" for option, value in options.items() if value is not None]
    if given:
        raise click.UsageError(
            f"{', '.join(given)}: for a server that is started; a running one has its own"
        )
    return None


@main.command()
@click.option("--model", required=True, help="A short name, a repository or a directory.")
@click.option("--gpus", help="Plan for these instead of this machine: 8xH100-80GB, 2x8xH200@roce.")
@click.option("--concurrency", type=click.IntRange(1), help="With --gpus: requests that decode [64].")
@click.option(
    "--drive-gbs", type=float, help="With --gpus or --loading: GB/s that a machine's drive reads [6.8]."
)
@click.option("--loading", is_flag=True, help="Show who reads which share of the checkpoint instead.")
@_layout_options
@_json_option
def plan(
    model: str,
    gpus: str | None,
    concurrency: int | None,
    drive_gbs: float | None,
    loading: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Show what memory each rank would take.

    Nothing is started or loaded. The model must be here already, but for --gpus: that shows every layout on
    GPUs that need not be here either, of a directory or of a model that is known.
    """
    if gpus is not None:
        _plan_on(gpus, model, concurrency, drive_gbs, options, loading=loading, as_json=as_json)
        return
    if concurrency is not None:
        raise click.UsageError("--concurrency goes with --gpus")
    if drive_gbs is not None and not loading:
        raise click.UsageError("--drive-gbs goes with --gpus or --loading")
    from loader import hub
    from models.memory import plan_memory
    from models.registry import load_spec
    from orchestrator.budget import overheads, rank_budgets

    directory = hub.resolve(model, _cache())
    if directory is None:
        raise UnknownModelError(f"{model} is not here yet: tandem pull {model}", field="model")
    config, why = _laid_out(directory, model, options)
    spec = load_spec(directory, config.dtype, config.kv_dtype)
    planned = plan_memory(
        spec,
        config.topology,
        rank_budgets(config.devices, config.topology.world_size, config.memory_bytes, config.environment),
        config.limits,
        overheads(config.devices),
        config.context,
    )
    if loading:
        from orchestrator import load_table

        drive = _drive_bytes_s(drive_gbs)
        summary = load_table.loading(spec, directory, config.topology, planned.stages, drive)
        _print_load(config.topology, summary, as_json=as_json)
    elif as_json:
        _print_json(msgspec.to_builtins(planned, enc_hook=lambda layers: [layers.start, layers.stop]))
    else:
        click.echo(_plan_table(planned) + (f"\n{why}" if why else ""))


def _plan_on(
    gpus: str,
    model: str,
    concurrency: int | None,
    drive_gbs: float | None,
    options: dict[str, Any],
    *,
    loading: bool,
    as_json: bool,
) -> None:
    from loader import hub
    from models.layouts import Asked
    from models.machines import parse_gpus
    from orchestrator.config import GPU_DEFAULTS
    from orchestrator.planner import plan_layouts, subject

    mine = [name for name in ("devices", "boot_report", "layout") if options.pop(name) is not None]
    if mine:
        raise click.UsageError(f"--{mine[0].replace('_', '-')} is for this machine, --gpus for any other")
    machines = parse_gpus(gpus)
    directory = hub.resolve(model, _cache())
    found = subject(
        model,
        directory,
        options.pop("dtype") or GPU_DEFAULTS["dtype"],
        options.pop("kv_dtype") or "auto",
    )
    memory_bytes = options.pop("memory")
    options |= {
        "concurrency": concurrency,
        "drive_bytes_s": None if drive_gbs is None else drive_gbs * 1e9,
    }
    asked = Asked(**{name: value for name, value in options.items() if value is not None})
    matrix = plan_layouts(found, machines, memory_bytes, asked)
    if loading:
        from orchestrator import load_table

        drive = _drive_bytes_s(drive_gbs)
        topology, summary = load_table.loading_on(found.spec, directory, machines, matrix, drive)
        _print_load(topology, summary, as_json=as_json)
    elif as_json:
        _print_json({"model": model, "gpus": str(machines), **msgspec.to_builtins(matrix)})
    else:
        from orchestrator.layout_table import show_matrix

        show_matrix(found, machines, matrix, sys.stdout, colour=_colour())


def _drive_bytes_s(drive_gbs: float | None) -> float:
    from models.machines import DRIVE_BYTES_S

    return DRIVE_BYTES_S if drive_gbs is None else drive_gbs * 1e9


def _print_load(topology: "Topology", summary: "LoadSummary", *, as_json: bool) -> None:
    from orchestrator.load_table import load_table

    if as_json:
        _print_json({"layout": topology, "loading": summary})
    else:
        click.echo(load_table(topology, summary))


def _plan_table(planned: "MemoryPlan") -> str:
    from tandem.render import size, table

    names = [line.name for line in planned.tightest.lines]
    rows = [
        (
            str(rank.rank),
            f"{rank.layers.start}-{rank.layers.stop - 1}",
            *(size(line.predicted_bytes) for line in rank.lines),
            size(rank.budget_bytes),
        )
        for rank in planned.ranks
    ]
    headers = ("RANK", "LAYERS", *(name.upper() for name in names), "BUDGET")
    shown = table(headers, rows, right=frozenset(range(len(headers))))
    kv = f"KV for {planned.kv_tokens} tokens in {planned.num_blocks} blocks"
    if planned.global_kv_tokens > planned.kv_tokens:
        kv += f" ({planned.global_kv_tokens} by the global layers alone)"
    return f"{shown}\n\ncontext {planned.context} tokens, {kv}" + (
        f"\n{planned.note}" if planned.note else ""
    )


@main.command()
@click.argument("model")
@click.argument("prompt", required=False)
@click.option("--name", help="Ask this running server instead of starting one.")
@click.option("--prompt-ids", metavar="1,2,3", help="Token ids instead of a prompt.")
@click.option("--raw", is_flag=True, help="The prompt as it is, without the chat template.")
@click.option("--max-tokens", type=int, help="[what the context holds]")
@click.option("--temperature", type=float, help="0 is greedy [1].")
@click.option("--seed", type=int, help="The same seed gives the same answer.")
@click.option("--logprobs", type=int, metavar="K", help="With the K most likely at each place.")
@_layout_options
@_json_option
def run(
    model: str,
    prompt: str | None,
    name: str | None,
    prompt_ids: str | None,
    raw: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Answer one PROMPT and end.

    MODEL is served for this one answer, unless --name says which running server to ask.
    """
    from tandem.one_answer import Prompt, as_data, ask, parse_token_ids
    from tandem.render import Screen

    if (prompt is None) == (prompt_ids is None):
        raise click.UsageError("give a PROMPT or --prompt-ids, one of them")
    asked = Prompt(prompt, None if prompt_ids is None else parse_token_ids(prompt_ids), raw)
    drawn = {key: options.pop(key) for key in ("max_tokens", "temperature", "seed", "logprobs")}
    parameters = cast("Parameters", {key: value for key, value in drawn.items() if value is not None})
    with _server(name, _start(None, None if name else model, "run", options)) as (client, _pidfd):
        info = client.info()
        screen = Screen(sys.stdout, sys.stderr, terminal=sys.stdout.isatty(), colour=_colour())
        show = screen.ignore if as_json else screen.answer_of(info.has_tokenizer)
        result = ask(client, info, asked, parameters, show)
        if as_json:
            _print_json(as_data(result))
        else:
            screen.break_line()


@main.command()
@click.option("--model", help="Start a server of this model for the chat.")
@click.option("--name", help="The running server to talk to, or the name of the one that is started.")
@click.option("--temperature", type=float, help="0 is greedy [0.7]; /set changes it.")
@_layout_options
@_json_option
def chat(
    model: str | None, name: str | None, temperature: float | None, as_json: bool, **options: Any
) -> None:
    """Talk with a model.

    With the server that runs, or one started for the chat (--model). Without a terminal each line of
    standard input is answered in turn.
    """
    from tandem.chat import answer_lines, open_repl, talk_on_terminal
    from tandem.render import Screen

    terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if as_json and terminal:
        raise click.UsageError(
            "--json is for lines from a pipe; on a terminal, /save FILE.json writes JSON"
        )
    with _server(name, _start(name, model, "chat", options)) as (client, server_pidfd):
        answers = io.StringIO() if as_json else sys.stdout
        notes = sys.stdout if terminal else sys.stderr
        screen = Screen(answers, notes, terminal=terminal, colour=_colour())
        repl = open_repl(client, screen, temperature)
        if terminal:
            talk_on_terminal(repl, _cache() / ".chat-history", server_pidfd)
            return
        messages, done = answer_lines(repl, sys.stdin.buffer)
        if as_json:
            _print_json({"model": repl.model, "messages": messages})
    if not done:
        sys.exit(1)


@main.command()
@_json_option
def ps(as_json: bool) -> None:
    """List the servers that run."""
    from tandem.render import size, table

    running = running_instances(_root())
    if as_json:
        _print_json({"instances": running})
    elif running:
        rows = [(f.name, f.model, str(f.layout), f.state, size(f.memory_bytes)) for f in running]
        click.echo(table(("NAME", "MODEL", "LAYOUT", "STATE", "MEMORY"), rows, right=frozenset({4})))
    else:
        click.echo("no server runs")


@main.command()
@click.argument("name")
@click.option("--now", is_flag=True, help="Do not wait for requests that run.")
@_json_option
def stop(name: str, now: bool, as_json: bool) -> None:
    """End a server.

    It takes no new requests and finishes those that run.
    """
    from tandem import instances

    def progress(seconds: float) -> None:
        if shown:
            click.echo(f"\r{name} is draining, {seconds:.0f} s", err=True, nl=False)

    shown = sys.stderr.isatty()
    seconds = instances.stop(_root(), name, now=now, progress=progress)
    if shown:
        click.echo("\r\x1b[K", err=True, nl=False)
    if as_json:
        _print_json({"name": name, "stopped": True, "seconds": round(seconds, 3)})
    else:
        click.echo(f"{name} is stopped ({seconds:.1f} s)")


if __name__ == "__main__":
    main()

"""`kiloq bench serve`: a server under load. The work is done in kiloq.bench.serve_*."""

import asyncio
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from kiloq.cli.options import Model
from kiloq.cli.terminal import say, write
from kiloq.errors import ConfigError

if TYPE_CHECKING:
    from kiloq.bench.serve_run import LoadResult, Progress


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """Which server is asked: one that runs, or one that is started for it."""

    url: Annotated[str | None, Parameter(help="A running server that speaks OpenAI's API, without /v1.")] = None
    model: Model = None
    shape: Annotated[
        str | None, Parameter(help="Start kiloq serve with random weights in a model's shape: qwen2.5-0.5b ...")
    ] = None
    precision: Annotated[str, Parameter(help="With --shape: bf16, int8 or int4.")] = "int4"
    name: Annotated[str | None, Parameter(help="The model's name in requests; default: the first in /v1/models.")] = (
        None
    )
    api_key: Annotated[str, Parameter(help="If the server wants one.")] = ""


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """What is asked."""

    clients: Annotated[int, Parameter(help="Clients that ask again as soon as they are answered.")] = 32
    rate: Annotated[float | None, Parameter(help="Instead: so many requests a second, at random times.")] = None
    requests: Annotated[int, Parameter(help="How many in all.")] = 128
    lengths: Annotated[
        str, Parameter(help="sharegpt, sharegpt:0.5 (half as long), or 128x64: tokens of each prompt and answer.")
    ] = "sharegpt"
    endpoint: Annotated[str, Parameter(help="chat or completions.")] = "chat"
    fields: Annotated[str, Parameter(help='More fields of every request, as JSON: {"top_p": 0.8}.')] = "{}"
    disconnect: Annotated[float, Parameter(help="Share of clients that hang up early.")] = 0.0
    seed: Annotated[int, Parameter(help="Of lengths, prompts, arrivals and departures.")] = 0


def serve(
    *,
    server: ServerOptions = ServerOptions(),  # frozen
    load: LoadOptions = LoadOptions(),  # frozen
    json_: Annotated[Path | None, Parameter(name="--json", help="Write every figure and request to this file.")] = None,
    plot: Annotated[Path | None, Parameter(help="Draw speed and waits into this PNG file.")] = None,
) -> None:
    """Ask a server for many answers at once: speed, waits, and what was lost.

    Prompts are random words, answers greedy and as long as asked for where the server knows ignore_eos. Without --url,
    kiloq serve is started, and ended again.
    """
    from kiloq.bench.plot import require_matplotlib
    from kiloq.bench.serve_clients import Target
    from kiloq.bench.serve_load import PATHS, parse_lengths
    from kiloq.bench.serve_report import draw_load, load_record, load_table
    from kiloq.bench.serve_run import Load, run_load

    if plot is not None:
        require_matplotlib()
    if load.endpoint not in PATHS:
        raise ConfigError(f"--endpoint is {load.endpoint!r}; it takes {' or '.join(PATHS)}.")
    wanted = Load(
        requests=load.requests,
        clients=load.clients,
        rate=load.rate,
        lengths=parse_lengths(load.lengths),
        disconnect=load.disconnect,
        endpoint=load.endpoint,
        model=server.name,
        # Random weights soon repeat themselves, and guesses ahead would come true as they never do.
        fields={"temperature": 0, **({"speculation": "none"} if server.shape else {}), **_fields(load.fields)},
        seed=load.seed,
    )
    with _server(server) as (url, pid):
        target = Target(url=url, api_key=server.api_key)
        with _live_line() as watch:
            result = asyncio.run(run_load(target, wanted, pid=pid, watch=watch))
    write(f"{load_table(result.figures)}\n")
    if json_ is not None:
        _keep(json_, load_record(result.figures, result.outcomes, result.settings))
    if plot is not None:
        draw_load(plot, _title(server, result), result.outcomes)
        say(f"picture  {plot}")


@contextmanager
def _server(options: ServerOptions) -> Iterator[tuple[str, int | None]]:
    """Its URL, and its process if it was started here."""
    if sum(given is not None for given in (options.url, options.model, options.shape)) > 1:
        raise ConfigError("--url, --model and --shape are given together; measure one server at a time.")
    if options.url is not None:
        yield options.url.rstrip("/").removesuffix("/v1"), None
        return
    from kiloq.bench.serve_process import kiloq_server

    model, quantize = options.model, None
    if options.shape is not None:
        from kiloq.bench.random_checkpoint import kept_random_checkpoint
        from kiloq.bench.worker import PRECISIONS

        if options.precision not in PRECISIONS:
            raise ConfigError(f"--precision is {options.precision!r}; it takes {', '.join(PRECISIONS)}.")
        say(f"random weights of {options.shape} and their packed matrices are kept; the first time takes minutes")
        model = str(kept_random_checkpoint(options.shape))
        quantize = None if options.precision == "bf16" else options.precision
    running = kiloq_server(model, quantize=quantize)
    try:
        yield running.url, running.pid
    finally:
        running.stop()


@contextmanager
def _live_line() -> "Iterator[Callable[[Progress], None] | None]":
    if not sys.stderr.isatty():
        yield None
        return

    def show(progress: "Progress") -> None:
        sys.stderr.write(f"\r\x1b[K{progress}")
        sys.stderr.flush()

    try:
        yield show
    finally:
        sys.stderr.write("\r\x1b[K")
        sys.stderr.flush()


def _fields(text: str) -> Mapping[str, object]:
    try:
        fields = json.loads(text)
    except ValueError:
        fields = None
    if not isinstance(fields, dict):
        raise ConfigError(f'--fields is {text!r}; it takes a JSON object, such as {{"top_p": 0.8}}.')
    return fields


def _title(server: ServerOptions, result: "LoadResult") -> str:
    what = f"{server.shape}, {server.precision}" if server.shape else server.url or server.model or "kiloq-mini-chat"
    return f"{what}: {result.figures.answer_tok_s:,.0f} tok/s"


def _keep(path: Path, record: Mapping[str, object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)
    say(f"figures  {path}")

"""One load test of one server, from the first question to the figures. Knows no terminal; starts no server."""

import asyncio
import json
import random
import resource
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace

from kiloq.errors import KiloqError, RequestError

from .serve_clients import Target, closed_loop, fetch, open_loop
from .serve_exchange import Ask, Outcome
from .serve_load import OPTIONAL, LengthMix, Wording, arrivals, asks, random_text, with_departures
from .serve_process import cpu_seconds, memory_bytes
from .serve_report import LoadFigures, load_figures

_PROBES = (10, 60)  # words of the prompts that show what a word costs


@dataclass(frozen=True, kw_only=True)
class Load:
    """What is asked of a server. `rate` requests a second at random, or `clients` that each wait for their answer."""

    requests: int = 128
    clients: int = 32
    rate: float | None = None
    lengths: LengthMix = field(default_factory=LengthMix)
    disconnect: float = 0.0  # share of clients that hang up early
    endpoint: str = "chat"
    model: str | None = None  # None: the first that the server names
    fields: Mapping[str, object] = field(default_factory=lambda: {"temperature": 0})
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value, good in (
            ("requests", self.requests, self.requests >= 1),
            ("clients", self.clients, self.clients >= 1),
            ("rate", self.rate, self.rate is None or self.rate > 0),
            ("disconnect", self.disconnect, 0 <= self.disconnect <= 1),
        ):
            if not good:
                need = "a share from 0 to 1" if name == "disconnect" else "above zero"
                raise RequestError(f"{name} is {value}; it must be {need}.")


@dataclass(frozen=True)
class LoadResult:
    """Figures, what they come from, and how the server was asked."""

    figures: LoadFigures
    outcomes: Sequence[Outcome]
    settings: Mapping[str, object]


class Progress:
    """Counts while a load runs, for whoever shows them."""

    def __init__(self, requests: int) -> None:
        self.requests = requests
        self.running: dict[int, Outcome] = {}
        self.ended = 0
        self.tokens = 0  # pieces of answers that have ended
        self.since = time.perf_counter()

    def tell(self, outcome: Outcome) -> None:
        if outcome.state == "waiting":
            self.running[id(outcome)] = outcome
        elif self.running.pop(id(outcome), None) is not None:
            self.ended += 1
            self.tokens += len(outcome.times)

    def __str__(self) -> str:
        seconds = max(1e-3, time.perf_counter() - self.since)
        pieces = self.tokens + sum(len(outcome.times) for outcome in self.running.values())
        waiting = sum(not outcome.times for outcome in self.running.values())
        return (
            f"{self.ended:,}/{self.requests:,} requests  {len(self.running)} running, {waiting} without a first token  "
            f"{pieces / seconds:,.0f} tok/s  {seconds:.0f} s"
        )


async def word_requests(target: Target, load: Load) -> Wording:
    """How to ask this server: which fields it takes, and what a word costs. Two or four short requests."""
    model = load.model or await _first_model(target)
    wording = Wording(model=model, endpoint=load.endpoint, fields={**OPTIONAL, **load.fields})
    plain = replace(wording, fields={name: value for name, value in load.fields.items() if name == "temperature"})
    for candidate in (wording, plain):
        chance = random.Random(f"probe {load.seed}")
        probes = [candidate.ask(random_text(chance, words), 2) for words in _PROBES]
        outcomes = await closed_loop(target, probes, 1, lambda _: None)
        if all(outcome.state == "done" for outcome in outcomes):
            (short, long) = ((words, one.prompt_tokens) for words, one in zip(_PROBES, outcomes, strict=True))
            if short[1] is None or long[1] is None:
                return candidate
            return candidate.calibrated((short[0], short[1]), (long[0], long[1]))
        if not 400 <= outcomes[0].status < 500:
            break
    bad = next(outcome for outcome in outcomes if outcome.state != "done")
    raise KiloqError(f"{target.url} does not answer a request of two tokens ({bad.status}): {bad.message}")


async def run_load(
    target: Target,
    load: Load,
    *,
    pid: int | None = None,  # the server's, if it is a process of this machine
    watch: Callable[[Progress], None] | None = None,  # told twice a second
) -> LoadResult:
    wording = await word_requests(target, load)
    asked = with_departures(
        asks(wording, load.lengths.draw(load.requests, load.seed), load.seed), load.disconnect, load.seed
    )
    before, own = None if pid is None else cpu_seconds(pid), _own_seconds()
    outcomes = await _ask_all(target, load, asked, watch)
    own = _own_seconds() - own
    after, memory = (None, None) if pid is None else (cpu_seconds(pid), memory_bytes(pid))
    figures = load_figures(
        outcomes,
        client_cpu_s=own,
        server_cpu_s=None if before is None or after is None else after - before,
        server_peak_bytes=None if memory is None else memory[1],
    )
    settings = {**asdict(load), "wording": asdict(wording), "url": target.url}
    return LoadResult(figures, outcomes, settings)


async def _ask_all(
    target: Target, load: Load, asked: Sequence[Ask], watch: Callable[[Progress], None] | None
) -> list[Outcome]:
    progress = Progress(load.requests)
    watching = None if watch is None else asyncio.create_task(_watch(progress, watch))
    try:
        if load.rate is None:
            return await closed_loop(target, asked, load.clients, progress.tell)
        return await open_loop(target, asked, arrivals(load.requests, load.rate, load.seed), progress.tell)
    finally:
        if watching is not None:
            watching.cancel()


async def _watch(progress: Progress, watch: Callable[[Progress], None]) -> None:
    while True:
        watch(progress)
        await asyncio.sleep(0.5)


async def _first_model(target: Target) -> str:
    try:
        status, body = await fetch(target, "/v1/models")
    except OSError as error:
        raise KiloqError(f"{target.url} cannot be reached: {error}. Is the server running?") from error
    try:
        return str(json.loads(body)["data"][0]["id"])
    except (ValueError, LookupError, TypeError) as error:
        raise KiloqError(
            f"{target.url}/v1/models answers {status} and names no model; name one with --name."
        ) from error


def _own_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime

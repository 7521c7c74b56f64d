"""What a load test found: figures from outcomes, as JSON, a table and a picture. Knows no connection."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from .percentiles import percentile
from .serve_exchange import Outcome
from .tables import markdown

STARVED = 3  # times the median wait for a first token
_AT_ONCE = 0.25  # seconds after the first request: whoever comes then came with it


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Seconds: percentiles by nearest rank."""

    p50: float
    p95: float
    p99: float
    max: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread | None":
        """None where nothing was measured."""
        if not values:
            return None
        p50, p95, p99 = (percentile(values, p) for p in (50, 95, 99))
        return cls(p50=p50, p95=p95, p99=p99, max=max(values))


@dataclass(frozen=True, kw_only=True)
class LoadFigures:
    """One load test. Every request is done, refused (an error was answered), lost (no whole answer) or left.

    Waits and gaps are those of requests that were done; speeds count every token that arrived.
    """

    requests: int
    done: int
    refused: int
    lost: int
    left: int  # their clients hung up
    starved: int  # of those done: waited over three times the median of those who came as they did
    short: int  # of those done: fewer tokens than were asked for
    seconds: float
    requests_per_s: float  # of those done
    prompt_tok_s: float
    answer_tok_s: float
    busy_tok_s: float | None  # answer tokens, until the last request began: no client was idle
    cached_tokens: int
    first_token: Spread | None
    first_token_at_once: Spread | None  # of the crowd with which the load began
    first_token_later: Spread | None  # of all others
    between_tokens: Spread | None
    whole_answer: Spread | None
    client_cpu: float  # of one core
    server_cpu_s: float | None = None  # processor seconds that the server took
    server_peak_bytes: int | None = None


def load_figures(
    outcomes: Sequence[Outcome],
    *,
    client_cpu_s: float,
    server_cpu_s: float | None = None,
    server_peak_bytes: int | None = None,
) -> LoadFigures:
    done = [outcome for outcome in outcomes if outcome.state == "done"]
    crowd, later = _waits(done)
    gaps = [later - earlier for one in done for earlier, later in zip(one.times, one.times[1:], strict=False)]
    seconds = max(outcome.ended for outcome in outcomes) - min(outcome.began for outcome in outcomes)
    states = [outcome.state for outcome in outcomes]
    return LoadFigures(
        requests=len(outcomes),
        done=len(done),
        refused=states.count("refused"),
        lost=states.count("lost"),
        left=states.count("left"),
        starved=sum(wait > STARVED * percentile(waits, 50) for waits in (crowd, later) for wait in waits),
        short=sum(outcome.tokens < outcome.ask.max_tokens for outcome in done),
        seconds=seconds,
        requests_per_s=len(done) / seconds,
        prompt_tok_s=sum(outcome.prompt_tokens or 0 for outcome in outcomes) / seconds,
        answer_tok_s=sum(outcome.tokens for outcome in outcomes) / seconds,
        busy_tok_s=_busy_speed(outcomes),
        cached_tokens=sum(outcome.cached_tokens or 0 for outcome in outcomes),
        first_token=Spread.of(crowd + later),
        first_token_at_once=Spread.of(crowd),
        first_token_later=Spread.of(later),
        between_tokens=Spread.of(gaps),
        whole_answer=Spread.of([outcome.ended - outcome.began for outcome in done]),
        client_cpu=client_cpu_s / seconds,
        server_cpu_s=server_cpu_s,
        server_peak_bytes=server_peak_bytes,
    )


def load_record(figures: LoadFigures, outcomes: Sequence[Outcome], settings: Mapping[str, object]) -> dict[str, object]:
    """Everything, for a file."""
    requests = [
        {
            "state": outcome.state,
            "status": outcome.status,
            "began_s": round(outcome.began, 4),
            "first_token_s": None if outcome.first_token is None else round(outcome.first_token, 4),
            "whole_s": round(outcome.ended - outcome.began, 4),
            "prompt_tokens": outcome.prompt_tokens,
            "answer_tokens": outcome.tokens,
            "cached_tokens": outcome.cached_tokens,
            "finish_reasons": outcome.endings,
            **({"message": outcome.message} if outcome.message else {}),
        }
        for outcome in outcomes
    ]
    return {"settings": dict(settings), "figures": asdict(figures), "requests": requests}


def load_table(figures: LoadFigures) -> str:
    """For a person."""
    f = figures
    ends = f"{f.done:,} of {f.requests:,} requests done in {f.seconds:.1f} s"
    for count, word in (
        (f.refused, "refused"),
        (f.lost, "lost"),
        (f.left, "left early"),
        (f.starved, f"waited over {STARVED} times the median"),
        (f.short, "shorter than asked"),
    ):
        if count:
            ends += f", {count:,} {word}"
    busy = "" if f.busy_tok_s is None else f" ({f.busy_tok_s:,.1f} while all clients were busy)"
    cached = f", {f.cached_tokens:,} prompt tokens from the cache" if f.cached_tokens else ""
    speeds = (
        f"{f.requests_per_s:.2f} requests/s, {f.prompt_tok_s:,.1f} prompt tok/s, {f.answer_tok_s:,.1f} answer tok/s"
        f"{busy}{cached}"
    )
    rows = [
        [name, *_milliseconds(spread)]
        for name, spread in (
            ("first token", f.first_token),
            ("- of those who came at once", f.first_token_at_once),
            ("- of those who came later", f.first_token_later),
            ("between tokens", f.between_tokens),
            ("whole answer", f.whole_answer),
        )
    ]
    costs = f"The clients took {f.client_cpu:.1%} of a core"
    if f.server_cpu_s is not None:
        costs += f", the server {f.server_cpu_s / f.seconds:.2f} cores"
    if f.server_peak_bytes is not None:
        costs += f" and {f.server_peak_bytes / 1e9:.2f} GB at most"
    table = markdown(["ms", "p50", "p95", "p99", "max"], rows)
    return f"{ends}.\n{speeds}.\n\n{table}\n\n{costs}."


def draw_load(path: Path, title: str, outcomes: Sequence[Outcome]) -> None:
    """Tokens a second over time, and which share of waits, gaps and answers took at most how long."""
    from .plot import draw_curves

    done = [outcome for outcome in outcomes if outcome.state == "done"]
    end = max(outcome.ended for outcome in outcomes)
    each = max(0.5, end / 60)  # seconds of one point
    counts = [0.0] * (int(end / each) + 1)
    for outcome in outcomes:
        for moment in outcome.times:
            counts[int(moment / each)] += 1 / each
    speed = {"": ([(i + 0.5) * each for i in range(len(counts))], counts)}
    gaps = [later - earlier for one in done for earlier, later in zip(one.times, one.times[1:], strict=False)]
    waits = [outcome.first_token for outcome in done if outcome.first_token is not None]
    wholes = [outcome.ended - outcome.began for outcome in done]
    shares = (("first token, s", waits), ("between tokens, s", gaps), ("whole answer, s", wholes))
    panels = [("s", "pieces of answers a second", speed)]
    panels += [(what, "share of all", {"": _shares(values)}) for what, values in shares if values]
    draw_curves(path, title, panels)


def _shares(values: Sequence[float]) -> tuple[list[float], list[float]]:
    ordered = sorted(values)
    return ordered, [(i + 1) / len(ordered) for i in range(len(ordered))]


def _waits(done: Sequence[Outcome]) -> tuple[list[float], list[float]]:
    """For the first token: of the crowd at the beginning, whose last must wait for all others' prompts, and later."""
    crowd: list[float] = []
    later: list[float] = []
    begin = min((one.began for one in done), default=0.0)
    for one in done:
        if one.first_token is not None and one.ask.is_streamed:
            (crowd if one.began - begin < _AT_ONCE else later).append(one.first_token)
    return crowd, later


def _busy_speed(outcomes: Sequence[Outcome]) -> float | None:
    """Without the tail, in which ever fewer clients wait for the longest answers."""
    begin, end = min(one.began for one in outcomes), max(one.began for one in outcomes)
    pieces = sum(len(one.times) for one in outcomes)
    if not pieces or end - begin < 1:
        return None
    seen = sum(sum(moment <= end for moment in one.times) for one in outcomes)
    return seen * (sum(one.tokens for one in outcomes) / pieces) / (end - begin)  # a piece may hold several tokens


def _milliseconds(spread: Spread | None) -> list[str]:
    if spread is None:
        return ["-"] * 4
    return [
        f"{1e3 * value:,.{0 if value >= 0.1 else 1}f}" for value in (spread.p50, spread.p95, spread.p99, spread.max)
    ]

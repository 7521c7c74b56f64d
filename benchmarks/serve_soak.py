"""A thousand requests of every kind, a third of whose clients hang up: what a server has left over afterwards.

python benchmarks/serve_soak.py [-m CHECKPOINT] [--quantize int4] [--requests 1000] [--disconnect 0.3] [-o NAME.json]
Exits with 1 if a block stays in use, a sequence runs or waits, a request is lost, one is answered otherwise than it
should be, or memory grows after the first fifth. The cache is small, so that all its pages are touched by then.
"""

import argparse
import asyncio
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from kiloq.bench.machine import describe_machine
from kiloq.bench.serve_clients import Target, closed_loop, fetch
from kiloq.bench.serve_exchange import Ask, Outcome
from kiloq.bench.serve_load import PATHS, random_text, with_departures
from kiloq.bench.serve_process import ServerProcess, kiloq_server, memory_bytes

CLIENTS = 32
FLAGS = ("--max-context", "1024", "--max-batch", "16")
SLICES = 5
GROWTH = 0.05  # of the memory after the first slice
IDLE_SECONDS = 5.0  # within which a server must have noticed that everybody has gone
_TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a place.",
        "parameters": {
            "type": "object",
            "properties": {"place": {"type": "string", "maxLength": 12}, "days": {"type": "integer"}},
            "required": ["place"],
        },
    },
}
_SCHEMA = {"type": "object", "properties": {"a": {"enum": ["x", "y"]}, "b": {"type": "boolean"}}, "required": ["a"]}
# What is asked besides the messages, and how often.
KINDS: list[tuple[str, int, dict[str, object]]] = [
    ("plain", 10, {}),
    ("sampled", 4, {"temperature": 1.0, "top_p": 0.9, "frequency_penalty": 0.5, "stop": ["a", "the"]}),
    ("two answers", 3, {"n": 2, "temperature": 1.0}),
    ("tool", 3, {"tools": [_TOOL], "tool_choice": "required"}),
    ("schema", 2, {"response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": _SCHEMA}}}),
    ("expression", 2, {"guided_regex": "[a-f]{4,20}"}),
    ("logprobs", 2, {"logprobs": True, "top_logprobs": 3}),
]
BAD: list[dict[str, object]] = [
    {"temperature": "hot"},
    {"messages": []},
    {"messages": [{"role": "user", "content": "word " * 4000}]},
    {"max_tokens": -1},
    {"model": "no-such-model"},
    {"response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": {"type": "nothing"}}}},
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", dest="model")
    parser.add_argument("--quantize")
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--disconnect", type=float, default=0.3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    server = kiloq_server(options.model, quantize=options.quantize, flags=FLAGS)
    try:
        record = asyncio.run(soak(server, options.requests, options.disconnect, options.seed))
    finally:
        server.stop()
    record = {"machine": describe_machine(), "model": Path(options.model or "bundled").name, **record}
    print(json.dumps(record, indent=1))
    if options.output is not None:
        options.output.write_text(json.dumps(record, indent=1) + "\n")
    sys.exit(1 if record["faults"] else 0)


async def soak(server: ServerProcess, requests: int, disconnect: float, seed: int) -> dict[str, object]:
    """Ask, wait until nobody is served any more, and look."""
    target = Target(url=server.url, timeout=120)
    names, asked = mixed(requests, seed, json.loads((await fetch(target, "/v1/models"))[1])["data"][0]["id"])
    departing = with_departures(asked, disconnect, seed)
    outcomes: list[Outcome] = []
    memory = []
    each = -(-requests // SLICES)
    begin = time.perf_counter()
    for start in range(0, requests, each):
        outcomes += await closed_loop(target, departing[start : start + each], CLIENTS, lambda _: None)
        memory.append((memory_bytes(server.pid) or (0, 0))[0])
    seconds = time.perf_counter() - begin
    idle, left = await until_idle(target)
    wrong = [
        f"{name}: {outcome.state} {outcome.status} {outcome.message}"
        for name, outcome in zip(names, outcomes, strict=True)
        if outcome.state not in ("left", "refused" if name == "bad" else "done")
        or (name == "bad" and outcome.state == "refused" and not 400 <= outcome.status < 500)
    ]
    growth = memory[-1] / memory[0] - 1
    faults = [f"{name} is {value:g}" for name, value in left.items() if value]
    faults += wrong[:10] + ([f"memory grew by {growth:.1%}"] if growth > GROWTH else [])
    states = Counter(f"{name}: {outcome.state}" for name, outcome in zip(names, outcomes, strict=True))
    return {
        "requests": requests,
        "seconds": round(seconds, 1),
        "states": dict(sorted(states.items())),
        "answer_tokens": sum(outcome.tokens for outcome in outcomes),
        "left_over": left,
        "idle_after_s": round(idle, 2),
        "memory_bytes": memory,
        "memory_growth": round(growth, 4),
        "faults": faults,
    }


def mixed(requests: int, seed: int, model: str) -> tuple[list[str], list[Ask]]:
    """Kinds and requests: one in twelve is bad, a third are not streamed, one in eight is a text completion."""
    chance = random.Random(seed)
    names, asked = [], []
    for number in range(requests):
        words, tokens = (
            min(60, int(chance.lognormvariate(2.5, 0.8)) + 1),
            min(120, int(chance.lognormvariate(3, 1)) + 1),
        )
        text = random_text(chance, words)
        body: dict[str, object] = {"model": model, "max_tokens": tokens, "stream": chance.random() < 0.67}
        body["messages"] = [{"role": "user", "content": text}]
        path = PATHS["chat"]
        if number % 12 == 11:
            name = "bad"
            body |= chance.choice(BAD)
        elif number % 8 == 7:
            name, path = "completion", PATHS["completions"]
            del body["messages"]
            body |= {"prompt": [text, text[::-1]], "ignore_eos": True}
        else:
            name, _, fields = chance.choices(KINDS, [often for _, often, _ in KINDS])[0]
            body |= fields
        names.append(name)
        asked.append(Ask(path, json.dumps(body).encode(), tokens, is_streamed=bool(body["stream"])))
    return names, asked


async def until_idle(target: Target) -> tuple[float, dict[str, float]]:
    """Seconds until nothing runs, waits or holds a block, and what /metrics says then or when time is up."""
    begin = time.perf_counter()
    while True:
        seconds, left = time.perf_counter() - begin, left_over((await fetch(target, "/metrics"))[1].decode())
        if seconds > IDLE_SECONDS or not any(left.values()):
            return seconds, left
        await asyncio.sleep(0.05)


def left_over(metrics: str) -> dict[str, float]:
    names: Sequence[str] = ("kiloq_sequences_running", "kiloq_sequences_waiting", "kiloq_cache_blocks_used")
    values = dict(line.split() for line in metrics.splitlines() if line.startswith(tuple(names)))
    return {name: float(values[name]) for name in names}


if __name__ == "__main__":
    main()

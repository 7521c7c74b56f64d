"""What the server costs over its bare engine: the same conversations through `kiloq serve` and through
LLM.as_completed, in turns, both loaded, 32 in flight.

python benchmarks/serve_overhead.py -m CHECKPOINT [--quantize int4] [--rounds 3] [-o NAME.json]
"""

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from kiloq.bench.machine import describe_machine
from kiloq.bench.serve_clients import Target, closed_loop
from kiloq.bench.serve_exchange import Ask
from kiloq.bench.serve_load import LengthMix, Wording, asks, parse_lengths
from kiloq.bench.serve_process import cpu_seconds, kiloq_server
from kiloq.bench.serve_run import Load, word_requests
from kiloq.bench.tables import markdown

CLIENTS = 32
FIELDS = {"temperature": 0, "speculation": "none"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", dest="model", required=True)
    parser.add_argument("--quantize")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=96)
    parser.add_argument("--lengths", default="sharegpt:0.5")
    parser.add_argument("--bare", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    if options.bare:
        answer_from_engine(options.model, options.quantize)
        return
    words = [sys.executable, __file__, "--bare", "-m", options.model]
    words += ["--quantize", options.quantize] if options.quantize else []
    server = kiloq_server(options.model, quantize=options.quantize)
    engine = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        target = Target(url=server.url)
        wording = asyncio.run(word_requests(target, Load(fields=FIELDS)))
        rounds = []
        for number in range(-1, options.rounds):  # one that warms up both and is not counted
            count = options.requests if number >= 0 else CLIENTS
            asked = requests(wording, parse_lengths(options.lengths), count, seed=number)
            figures = {}
            for name in ("server", "engine") if number % 2 else ("engine", "server"):
                is_server = name == "server"
                figures[name] = through_server(target, asked, server.pid) if is_server else bare(engine, asked)
            if number >= 0:
                rounds.append(figures)
                print(json.dumps(figures), file=sys.stderr, flush=True)
    finally:
        server.stop()
        engine.kill()
        engine.wait()
    print(table(rounds))
    if options.output is not None:
        record = {
            "machine": describe_machine(),
            "settings": {**vars(options), "output": None, "model": Path(options.model or "bundled").name},
            "rounds": rounds,
        }
        options.output.write_text(json.dumps(record, indent=1) + "\n")


def requests(wording: Wording, lengths: LengthMix, count: int, seed: int) -> list[Ask]:
    return asks(wording, lengths.draw(count, seed), seed)


def through_server(target: Target, asked: list[Ask], pid: int) -> dict[str, float]:
    before = cpu_seconds(pid)
    outcomes = asyncio.run(closed_loop(target, asked, CLIENTS, lambda _: None))
    assert all(outcome.state == "done" for outcome in outcomes), [o for o in outcomes if o.state != "done"][:1]
    seconds = max(outcome.ended for outcome in outcomes)
    return figures_of(sum(outcome.tokens for outcome in outcomes), seconds, (cpu_seconds(pid) or 0) - (before or 0))


def bare(engine: "subprocess.Popen[str]", asked: list[Ask]) -> dict[str, float]:
    assert engine.stdin is not None
    assert engine.stdout is not None
    bodies = [json.loads(ask.body) for ask in asked]
    before = cpu_seconds(engine.pid)
    wanted = [{"messages": body["messages"], "max_tokens": body["max_tokens"]} for body in bodies]
    print(json.dumps(wanted), file=engine.stdin, flush=True)
    tokens, seconds = json.loads(engine.stdout.readline())
    return figures_of(tokens, seconds, (cpu_seconds(engine.pid) or 0) - (before or 0))


def figures_of(tokens: int, seconds: float, cpu: float) -> dict[str, float]:
    return {"tok_s": tokens / seconds, "cpu_ms_per_token": 1e3 * cpu / tokens, "tokens": tokens, "seconds": seconds}


def answer_from_engine(model: str, quantize: str | None) -> None:
    """The bare side: conversations as JSON lines in, [tokens, seconds] out."""
    from kiloq.engine import LLM, SamplingParams

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    llm = LLM(model, quantization=quantize, max_batch=CLIENTS)
    for line in sys.stdin:
        asked = json.loads(line)
        begin = time.perf_counter()
        prompts = (
            llm.prompt_of(
                one["messages"],
                SamplingParams(max_tokens=one["max_tokens"], ignore_eos=True, temperature=0, speculation="none"),
            )
            for one in asked
        )
        tokens = sum(result.usage.completion_tokens for _, result in llm.as_completed(prompts))
        print(json.dumps([tokens, time.perf_counter() - begin]), file=answers, flush=True)


def table(rounds: list[dict[str, dict[str, float]]]) -> str:
    rows = [
        [
            name,
            *(f"{statistics.median(one[name][key] for one in rounds):,.2f}" for key in ("tok_s", "cpu_ms_per_token")),
        ]
        for name in ("engine", "server")
    ]
    for key in ("tok_s", "cpu_ms_per_token"):
        ratios = sorted(one["server"][key] / one["engine"][key] for one in rounds)
        rows.append(
            [f"server / engine, {key}", f"{statistics.median(ratios):.3f}", f"{ratios[0]:.3f}-{ratios[-1]:.3f}"]
        )
    return markdown(["", "answer tok/s (ratio)", "CPU ms a token (range)"], rows)


if __name__ == "__main__":
    main()

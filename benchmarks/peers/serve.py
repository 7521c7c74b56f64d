"""kiloq's server beside llama.cpp's and transformers' on this machine, in turns, under the same load; one table.

python benchmarks/peers/serve.py --work FOLDER [--rounds 3] [--page docs/serving-performance.md] [-o NAME]
FOLDER is what `setup.py --serve` filled. All servers stay loaded; those whose turn it is not are stopped (SIGSTOP), and
every other round goes backwards. Begun again with the same -o, it goes on after the last turn that was measured.
"""

import argparse
import asyncio
import json
import os
import signal
import statistics
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from kiloq.bench.machine import describe_machine
from kiloq.bench.serve_clients import Target
from kiloq.bench.serve_load import parse_lengths
from kiloq.bench.serve_process import ServerProcess
from kiloq.bench.serve_run import Load, run_load
from kiloq.bench.tables import markdown

MARK = "<!-- the last recorded run -->"
CLIENTS = 32
OURS = "kiloq int4"
# What ours is meant to be times faster than.
GOALS = {"llama.cpp Q4_0": 1.5, "transformers bf16": 5.0}


@dataclass(frozen=True)
class Contender:
    """How a server is started. `share` is the part of the requests, from the first on, that a slow one is asked."""

    command: list[str]
    ready: str = "/health"
    environment: Mapping[str, str] = field(default_factory=dict)
    model: str | None = None  # its name in requests
    fields: Mapping[str, object] = field(default_factory=dict)
    share: float = 1.0
    rounds: int | None = None  # None: all


def contenders(work: Path, shape: str, threads: int) -> dict[str, Contender]:
    """Settings as they were fastest in short searches on two cores; docs/serving-performance.md has those."""
    models, n = work / "models", str(threads)
    gguf, folder = models / f"{shape}-serve-Q4_0.gguf", models / f"{shape}-hf"
    ours = [sys.executable, "-m", "kiloq", "serve", "--port", "{port}"]
    context = CLIENTS * 2048
    llama = [work / "llama-server/bin/llama-server", "-m", gguf, "--port", "{port}", "-t", n, "-np", CLIENTS]
    llama += ["-c", context, "-fa", "off", "--cache-ram", "0", "--no-ui"]
    serial = [work / "llama/bin/python", "-m", "llama_cpp.server", "--model", gguf, "--port", "{port}"]
    serial += ["--n_threads", n, "--n_threads_batch", n, "--n_ctx", "2048", "--interrupt_requests", "false"]
    hf = [work / "hf/bin/transformers", "serve", folder, "--host", "127.0.0.1", "--port", "{port}", "--device", "cpu"]
    hf += ["--dtype", "bfloat16", "--continuous-batching", "--cb-block-size", "256", "--cb-num-blocks", context // 256]
    hf += ["--cb-max-batch-tokens", "256"]
    threads_of = {"OMP_NUM_THREADS": n, "HF_HUB_OFFLINE": "1"}
    found = {
        OURS: Contender(
            [*ours, "-m", models / f"{shape}-serve", "--quantize", "int4"],
            "/v1/models",
            threads_of,
            fields={"speculation": "none"},  # random weights repeat themselves: guesses would come true
        ),
        "llama.cpp Q4_0": Contender(llama),
        "transformers bf16": Contender(hf, environment=threads_of, model=str(folder)),
        # One request at a time: a third of the requests, once, is enough to see how fast it is.
        "llama-cpp-python Q4_0": Contender(serial, "/v1/models", share=1 / 3, rounds=1),
    }
    for one in found.values():
        one.command[:] = map(str, one.command)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--shape", default="qwen2.5-0.5b")
    parser.add_argument("--servers", help="names with commas; default: kiloq, llama.cpp, transformers")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=72)
    parser.add_argument("--lengths", default="sharegpt:0.5")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--page", type=Path, help="a Markdown page whose table is replaced when all is measured")
    parser.add_argument("-o", "--output", type=Path, help="written with .md and .json; default: FOLDER/serve")
    options = parser.parse_args()
    output = (options.output or options.work / "serve").with_suffix(".json")
    known = contenders(options.work.resolve(), options.shape, options.threads)
    names = options.servers.split(",") if options.servers else [OURS, *GOALS]
    record = begin_record(options, output)
    servers: dict[str, ServerProcess] = {}
    try:
        for number in range(options.rounds):
            for name in names if number % 2 == 0 else names[::-1]:
                turns = record["rounds"].setdefault(name, {})
                if str(number) in turns or number >= (known[name].rounds or options.rounds):
                    continue
                if not servers:
                    servers = start([n for n in names if number < (known[n].rounds or options.rounds)], known)
                turns[str(number)] = turn(name, known[name], servers[name], options, number)
                output.write_text(json.dumps(record, indent=1) + "\n")
    finally:
        for server in servers.values():
            os.kill(server.pid, signal.SIGCONT)
            server.stop()
    text = page(record)
    output.with_suffix(".md").write_text(text)
    if options.page is not None:
        above = options.page.read_text().partition(MARK)[0]
        options.page.write_text(f"{above}{MARK}\n\n{text}")


def begin_record(options: argparse.Namespace, output: Path) -> dict:
    settings = {name: str(getattr(options, name)) for name in ("shape", "requests", "lengths", "threads")}
    record = {"machine": describe_machine(), "settings": settings, "rounds": {}}
    if output.exists():
        before = json.loads(output.read_text())
        if before["settings"] != settings:
            sys.exit(f"{output} was measured with {before['settings']}; remove it, or name another with -o.")
        return before
    return record


def start(names: list[str], known: dict[str, Contender]) -> dict[str, ServerProcess]:
    servers = {}
    for name in names:
        one = known[name]
        servers[name] = ServerProcess(one.command, ready=one.ready, environment=one.environment)
        # Touch everything once: weights are paged in, caches made, code compiled.
        asyncio.run(run_load(target_of(servers[name]), load_of(one, CLIENTS, "32x4", seed=1_000)))
        os.kill(servers[name].pid, signal.SIGSTOP)
        print(f"{name} is ready", file=sys.stderr, flush=True)
    return servers


def turn(name: str, one: Contender, server: ServerProcess, options: argparse.Namespace, number: int) -> dict:
    """One server's answers to one round's requests; every round has other ones, so that no cache remembers them."""
    load = load_of(one, max(CLIENTS, round(options.requests * one.share)), options.lengths, seed=number)
    os.kill(server.pid, signal.SIGCONT)
    figures = asyncio.run(run_load(target_of(server), load, pid=server.pid)).figures
    os.kill(server.pid, signal.SIGSTOP)
    print(
        f"round {number + 1}  {name:<22} {figures.answer_tok_s:7.1f} tok/s  {figures.busy_tok_s or 0:7.1f} while all "
        f"busy  {figures.seconds:5.1f} s  {figures.starved} starved  {figures.lost + figures.refused} lost",
        file=sys.stderr,
        flush=True,
    )
    return asdict(figures)


def target_of(server: ServerProcess) -> Target:
    return Target(url=server.url, timeout=900)


def load_of(one: Contender, requests: int, lengths: str, *, seed: int) -> Load:
    return Load(
        requests=requests,
        clients=CLIENTS,
        lengths=parse_lengths(lengths),
        model=one.model,
        fields={"temperature": 0, **one.fields},
        seed=seed,
    )


def page(record: dict) -> str:
    settings, facts = record["settings"], ", ".join(f"{key} {value}" for key, value in record["machine"].items())
    rows, ratios = [], []
    for name, turns in record["rounds"].items():
        all_of = list(turns.values())
        rows.append([name, *(show(all_of) for show in _COLUMNS.values())])
        if name != OURS:
            ratios.append([f"{OURS} / {name}", *_ratio(record["rounds"].get(OURS, {}), turns, GOALS.get(name))])
    return (
        "\n\n".join(
            [
                f"{facts}.",
                f"{settings['shape']}, random weights, greedy; {settings['requests']} requests a round from {CLIENTS} "
                f"clients that ask again when answered, lengths {settings['lengths']}, {settings['threads']} threads. "
                "Medians of rounds, slowest and fastest in brackets; a maximum is that of all rounds. Waits for the "
                f"first token: of the {CLIENTS} requests that come at once, and of those that come later, one by one.",
                markdown(["Server", *_COLUMNS], rows),
                markdown(["Ratio of answer tok/s", "median of rounds", "range", "goal"], ratios),
            ]
        )
        + "\n"
    )


def _ratio(ours: dict, peer: dict, goal: float | None) -> list[str]:
    each = [ours[number]["answer_tok_s"] / peer[number]["answer_tok_s"] for number in peer if number in ours]
    if not each:
        return ["-"] * 3
    spread = f"{min(each):.2f}-{max(each):.2f}"
    return [f"{statistics.median(each):.2f}", spread, "-" if goal is None else f"{goal:.1f}"]


def _spread(turns: list[dict], key: str) -> str:
    values = [turn[key] for turn in turns if turn[key] is not None]
    return f"{statistics.median(values):,.0f} ({min(values):,.0f}-{max(values):,.0f})" if values else "-"


def _waits(turns: list[dict], key: str, worst: str) -> str:
    found = [turn[key] for turn in turns if turn[key] is not None]
    if not found:
        return "-"
    usual = statistics.median(one["p50"] for one in found)
    most = max(one[worst] for one in found) if worst == "max" else statistics.median(one[worst] for one in found)
    return f"{1e3 * usual:,.0f} / {1e3 * most:,.0f}"


_COLUMNS = {
    "answer tok/s": lambda turns: _spread(turns, "answer_tok_s"),
    "while all busy": lambda turns: _spread(turns, "busy_tok_s"),
    "first token at once, p50 / max ms": lambda turns: _waits(turns, "first_token_at_once", "max"),
    "later, p50 / max ms": lambda turns: _waits(turns, "first_token_later", "max"),
    "between tokens, p50 / p99 ms": lambda turns: _waits(turns, "between_tokens", "p99"),
    "lost or refused": lambda turns: str(sum(turn["lost"] + turn["refused"] for turn in turns)),
    "shorter": lambda turns: str(sum(turn["short"] for turn in turns)),
    "memory": lambda turns: f"{max(turn['server_peak_bytes'] for turn in turns) / 1e9:.2f} GB",
}


if __name__ == "__main__":
    main()

"""Runs every runtime in turns on this machine and writes one table, in Markdown and JSON.

python benchmarks/peers/run.py --work FOLDER [--shapes ...] [--rounds 5] [--no-amx] [-o NAME]
FOLDER is what setup.py filled. All runtimes of a group stay loaded; in each round each one takes its turn, every other
round backwards, so that a machine whose speed drifts is the same machine for all of them.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path

import torch
from report import replace_table, write_report

from kiloq.bench.machine import describe_machine, memory_bandwidth
from kiloq.bench.shapes import shape_config

HERE = Path(__file__).parent
PROMPT, NEW = 512, 65  # one sequence: 64 steps after the first token
BATCH, BATCH_PROMPT, BATCH_NEW = 8, 128, 25
# Each peer is followed by ours. Groups are measured one after the other, so that memory holds one group at a time.
GROUPS = {
    "quantised": [
        "openvino int4", "kiloq int4", "llama.cpp Q4_0", "kiloq int4 kv8",
        "openvino int8", "kiloq int8", "llama.cpp Q8_0", "kiloq int8 kv8",
    ],
    "bf16": ["transformers bf16", "kiloq bf16", "kiloq int4"],
}  # fmt: skip


@dataclass
class Contender:
    name: str
    process: subprocess.Popen[str]
    versions: dict[str, str]
    rounds: list[dict[str, float]] = field(default_factory=list)

    def ask(self, prompts: list[list[int]], new_tokens: int) -> list[float]:
        assert self.process.stdin is not None
        print(json.dumps({"prompts": prompts, "new_tokens": new_tokens}), file=self.process.stdin, flush=True)
        answer = self.listen()
        self.peak = answer["peak_bytes"]
        return answer["seconds"]

    def listen(self) -> dict:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"{self.name} ended with status {self.process.wait()}; its words are in its log.")
        return json.loads(line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--shapes", default="qwen-1.8b,qwen2.5-0.5b")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--groups", default=",".join(GROUPS))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--no-amx", action="store_true", help="every runtime as on a processor with AVX-512 VNNI only")
    parser.add_argument("--page", type=Path, help="a Markdown page whose table is replaced when all is measured")
    parser.add_argument("-o", "--output", type=Path, help="written with .md and .json; default: FOLDER/DATE")
    options = parser.parse_args()
    if options.no_amx:
        os.environ["KILOQ_BACKEND"] = "avx512"
    record = {
        "machine": {**describe_machine(), "matrix unit": "switched off" if options.no_amx else "as the runtime likes"},
        "settings": {"prompt": PROMPT, "steps": NEW - 1, "batch": BATCH, "batch_prompt": BATCH_PROMPT},
        "shapes": {},
    }
    output = options.output or options.work / f"{date.today()}{'-no-amx' if options.no_amx else ''}"
    for shape in options.shapes.split(","):
        record["shapes"][shape] = {}
        for group in options.groups.split(","):
            record["shapes"][shape][group] = run_group(options, shape, GROUPS[group])
            write_report(output, record)  # what is measured is kept, whatever comes
    if options.page is not None:
        replace_table(options.page, record)


def run_group(options: argparse.Namespace, shape: str, names: list[str]) -> dict:
    contenders = [start(options, shape, name) for name in names]
    ids = random.Random(0)
    vocabulary = shape_config(shape).vocab_size
    bandwidths = []
    for number in range(options.rounds):
        bandwidths.append(memory_bandwidth())
        for contender in contenders if number % 2 == 0 else contenders[::-1]:
            one = contender.ask(random_prompts(ids, vocabulary, 1, PROMPT), NEW)
            eight = contender.ask(random_prompts(ids, vocabulary, BATCH, BATCH_PROMPT), BATCH_NEW)
            figures = {
                "prefill": PROMPT / one[0],
                "decode": 1 / statistics.median(one[1:]),
                "batch": BATCH / statistics.median(eight[1:]),
            }
            contender.rounds.append(figures)
            shown = "  ".join(f"{key} {value:,.1f}" for key, value in figures.items())
            print(f"{shape}  round {number + 1}  {contender.name:<18} {shown}", file=sys.stderr, flush=True)
    for contender in contenders:
        contender.process.stdin.close()
        contender.process.wait()
    found = {c.name: {"versions": c.versions, "peak_bytes": c.peak, "rounds": c.rounds} for c in contenders}
    return {"bandwidth": bandwidths, "contenders": found}


def start(options: argparse.Namespace, shape: str, name: str) -> Contender:
    runtime, kind, *rest = name.split()
    work, models, threads = options.work, options.work / "models", str(options.threads)
    environment = dict(os.environ)
    if options.no_amx:
        environment["ONEDNN_MAX_CPU_ISA"] = "AVX512_CORE_VNNI"
    if runtime == "kiloq":
        environment.pop("ONEDNN_MAX_CPU_ISA", None)
        command = [sys.executable, HERE / "peer_kiloq.py", shape, threads, kind, "int8" if rest else "auto"]
    elif runtime == "llama.cpp":
        folder = "llama-noamx" if options.no_amx else "llama"
        command = [work / folder / "bin/python", HERE / "peer_llama.py", models / f"{shape}-{kind}.gguf", threads]
    elif runtime == "openvino":
        precision = ["f32"] if options.no_amx else []
        folder = models / f"{shape}-ov-{kind}"
        command = [work / "openvino/bin/python", HERE / "peer_openvino.py", folder, threads, *precision]
    else:
        described = models / f"{shape}.json"
        command = [work / "hf/bin/python", HERE / "peer_transformers.py", described, threads, "bfloat16"]
    with (work / f"{name.replace(' ', '-')}.log").open("w") as log:
        process = subprocess.Popen(
            list(map(str, command)),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=environment,
        )
    contender = Contender(name, process, {})
    contender.versions = contender.listen()["versions"]
    print(f"{shape}  {name} is ready", file=sys.stderr, flush=True)
    return contender


def random_prompts(ids: random.Random, vocabulary: int, count: int, length: int) -> list[list[int]]:
    return [[ids.randrange(10, vocabulary) for _ in range(length)] for _ in range(count)]


if __name__ == "__main__":
    main()

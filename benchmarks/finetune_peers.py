"""Fine-tuning beside transformers' Trainer, peft and trl: one interleaved run on a CPU, a table in Markdown and JSON.

python benchmarks/finetune_peers.py --venv VENV --data chat.jsonl[.gz] --vocabulary FOLDER [-o NAME]

VENV has torch, transformers, peft and trl (pip install torch==2.13.0 transformers==5.23.0 peft==0.21.2
accelerate==1.15.0 trl==1.16.0). All contenders start from the same random weights and read the same samples in each
step: those that kiloq packs into `--rows` rows of `--seq-len`. For DPO the better answer to a question is its own, and
the worse one that to the question before. Each is a process of its own; they take turns, every other round backwards.
"""

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from kiloq.bench.machine import describe_machine
from kiloq.bench.random_checkpoint import write_random_checkpoint
from kiloq.bench.tables import markdown
from kiloq.chat import QWEN2_5
from kiloq.tokenizer import Tokenizer
from kiloq.train.comparisons import Compared, PackedPairs
from kiloq.train.conversations import Conversation, conversation
from kiloq.train.preferences import Pair
from kiloq.train.rows import good_rows
from kiloq.train.samples import PackedSamples, Sample, Samples
from kiloq.train.settings import BatchConfig

HERE = Path(__file__).parent / "peers"
SFT = ("transformers padded", "transformers padding-free", "kiloq", "kiloq compiled")
DPO = ("trl", "trl recomputing", "kiloq", "kiloq compiled")
METHODS = {"full": SFT, "lora": SFT, "dpo": DPO, "dpo-lora": DPO}
RATES = {"full": 1e-4, "lora": 3e-4, "dpo": 1e-5, "dpo-lora": 1e-4}

Step = list[dict[str, list[int]]]
"""The samples of a step, as the peers' collators take them."""


@dataclasses.dataclass
class Contender:
    """One process, and what it answered."""

    name: str
    process: "subprocess.Popen[str]"
    start: dict[str, Any] = dataclasses.field(default_factory=dict)
    rounds: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    def listen(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"{self.name} ended with status {self.process.wait()}; its words are above.")
        found: dict[str, Any] = json.loads(line)
        return found

    def ask(self, steps: int) -> None:
        print(json.dumps({"steps": steps}), file=self.process.stdin, flush=True)
        self.rounds.append(self.listen())

    @property
    def losses(self) -> list[float]:
        return [loss for one in (self.start, *self.rounds) for loss in one["losses"]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--venv", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--vocabulary", required=True)
    parser.add_argument("--shape", default="qwen2.5-0.1b")
    parser.add_argument("--methods", default="full,lora", help=f"of {', '.join(METHODS)}")
    parser.add_argument("--contenders", help=f"default: {', '.join(SFT)}; for DPO {', '.join(DPO)}")
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--rows", type=int, default=2, help="of a step")
    parser.add_argument("--steps", type=int, default=4, help="of a turn")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--fp32", action="store_true", help="products in fp32; else bf16")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("-o", "--output", type=Path, default=Path("finetune-peers"), help="written with .md and .json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        record = run(options, Path(work))
    options.output.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    text = report(record)
    options.output.with_suffix(".md").write_text(text)
    print(text)


def run(options: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Everything that is measured."""
    write_random_checkpoint(work / "model", options.shape)
    count = options.steps * options.rounds
    record: dict[str, Any] = {
        "machine": describe_machine(),
        "settings": {k: str(v) for k, v in vars(options).items()},
        "methods": {},
    }
    for method in options.methods.split(","):
        steps = (pair_steps if METHODS[method] is DPO else sample_steps)(options, count + 1)
        (work / "data.json").write_text(json.dumps(steps))
        names = options.contenders.split(",") if options.contenders else METHODS[method]
        contenders = [start(options, work, method, name) for name in names]
        for number in range(options.rounds):
            for contender in contenders if number % 2 == 0 else contenders[::-1]:
                contender.ask(options.steps)
                print(f"{method}  {contender.name:<26} {contender.rounds[-1]['seconds']:.1f} s", file=sys.stderr)
        for contender in contenders:
            assert contender.process.stdin is not None
            contender.process.stdin.close()
            contender.process.wait()
        record["methods"][method] = {
            "samples_per_step": statistics.mean(map(len, steps)),
            "tokens": sum(sum(map(tokens_of, step)) for step in steps[1:]),  # the first step is not timed
            "trained": sum(sum(map(trained_of, step)) for step in steps[1:]),
            "contenders": {
                c.name: {
                    "seconds": [one["seconds"] for one in c.rounds],
                    "first_step": c.start["seconds"],
                    "peak_bytes": c.rounds[-1]["peak_bytes"],
                    "losses": c.losses,
                }
                for c in contenders
            },
        }
    return record


def sample_steps(options: argparse.Namespace, count: int) -> list[Step]:
    """Conversations, of which every answer is learned."""
    samples = Samples(Tokenizer.load(options.vocabulary), QWEN2_5, seq_len=options.seq_len, long="drop")
    read = samples.read(good_rows(options.data, conversation))
    stream = PackedSamples(
        [(read, 1.0)], seq_len=options.seq_len, tokens=options.rows * options.seq_len, seed=0, filler=0
    )
    steps = []
    for _ in range(count):
        chosen = [read[i] for _ in range(options.rows) for i in stream.epochs.next()]
        steps.append([{"input_ids": s.ids.tolist(), "labels": [-100, *s.targets[:-1].tolist()]} for s in chosen])
    return steps


def pair_steps(options: argparse.Namespace, count: int) -> list[Step]:
    """Questions with a better and a worse answer."""
    samples = Samples(Tokenizer.load(options.vocabulary), QWEN2_5, seq_len=options.seq_len, long="drop")
    asked = [one for one in good_rows(options.data, conversation) if len(one.messages) == 2]
    answers = (answers_of(one, other) for one, other in zip(asked[1:], asked, strict=False))
    pairs = samples.read_rows(answers, samples.pair)
    batch = BatchConfig(seq_len=options.seq_len, tokens=options.rows * options.seq_len)
    stream = PackedPairs([([Compared(pair) for pair in pairs], 1.0)], batch=batch, seed=0, filler=0)
    return [[as_trl_takes(*pairs[at]) for at in stream.next_batch().items] for _ in range(count)]


def answers_of(one: Conversation, other: Conversation) -> Pair:
    """The question of `one` with its own answer, and with that of `other`."""
    question = dataclasses.replace(one.messages[0], trained=False)
    chosen, rejected = (dataclasses.replace(one, messages=(question, c.messages[1])) for c in (one, other))
    return Pair(chosen, rejected)


def as_trl_takes(chosen: Sample, rejected: Sample) -> dict[str, list[int]]:
    """The prompt ends before the first trained token, the answers with the last."""
    places = [(sample.targets >= 0).nonzero()[0] + 1 for sample in (chosen, rejected)]
    begin = int(places[0][0])
    answers = [one.ids[begin : at[-1] + 1].tolist() for one, at in zip((chosen, rejected), places, strict=True)]
    return {"prompt_ids": chosen.ids[:begin].tolist(), "chosen_ids": answers[0], "rejected_ids": answers[1]}


def tokens_of(sample: dict[str, list[int]]) -> int:
    if "input_ids" in sample:
        return len(sample["input_ids"])
    return 2 * len(sample["prompt_ids"]) + trained_of(sample)


def trained_of(sample: dict[str, list[int]]) -> int:
    if "labels" in sample:
        return sum(label >= 0 for label in sample["labels"])
    return len(sample["chosen_ids"]) + len(sample["rejected_ids"])


def start(options: argparse.Namespace, work: Path, method: str, name: str) -> Contender:
    """A process that has done its first step."""
    package, _, setting = name.partition(" ")
    plan = {
        "model": str(work / "model"),
        "data": str(work / "data.json"),
        "loss": "dpo" if METHODS[method] is DPO else "sft",
        "lora": method.endswith("lora"),
        "setting": setting,
        "bf16": not options.fp32,
        "threads": options.threads,
        "seq_len": options.seq_len,
        "tokens": options.rows * options.seq_len,
        "lr": RATES[method],
    }
    path = work / f"{name}.json"
    path.write_text(json.dumps(plan))
    python = sys.executable if package == "kiloq" else str(options.venv / "bin" / "python")
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads), "PYTHONPATH": str(HERE.parent.parent)}
    process = subprocess.Popen(
        [python, str(HERE / f"train_{package}.py"), str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    contender = Contender(name, process)
    contender.start = contender.listen()
    print(f"{method}  {name:<26} first step {contender.start['seconds']:.1f} s", file=sys.stderr)
    return contender


def report(record: dict[str, Any]) -> str:
    """Medians of the turns; ratios to the better peer are taken turn by turn, where the machine was the same."""
    machine, settings = record["machine"], record["settings"]
    head = (
        f"{settings['shape']}, random weights, {settings['rows']} x {settings['seq_len']} tokens a step, "
        f"{'fp32' if settings['fp32'] == 'True' else 'bf16'} products. "
        f"{machine['processor']}, {settings['threads']} threads; torch {machine['torch']}; {machine['date']}."
    )
    parts = [head]
    for method, measured in record["methods"].items():
        found = measured["contenders"]
        peers = {name: one for name, one in found.items() if not name.startswith("kiloq")}
        best = min(peers, key=lambda name: statistics.median(peers[name]["seconds"])) if peers else next(iter(found))
        rows = []
        turns = len(found[best]["seconds"])
        for name, one in found.items():
            ratios = [theirs / ours for theirs, ours in zip(found[best]["seconds"], one["seconds"], strict=True)]
            seconds = statistics.median(one["seconds"]) * turns
            gap = [abs(a - b) for a, b in zip(one["losses"], found[best]["losses"], strict=True)]
            rows.append(
                [
                    name,
                    f"{measured['tokens'] / seconds:,.0f}",
                    f"{measured['trained'] / seconds:,.0f}",
                    f"{statistics.median(ratios):.2f}",
                    f"{one['peak_bytes'] / 2**30:.2f} GiB",
                    f"{one['peak_bytes'] / found[best]['peak_bytes']:.2f}",
                    f"{one['losses'][-1]:.3f}",
                    f"{max(gap):.3f}",
                ]
            )
        header = ["", "tok/s", "trained tok/s", "speed", "peak memory", "of it", "last loss", "loss apart at most"]
        samples = f"{measured['samples_per_step']:.1f} {'pairs' if METHODS[method] is DPO else 'samples'} a step."
        parts += [f"### {method}", markdown(header, rows), f"Compared with {best}. {samples}"]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    main()

"""Batch 1 against batch 16: `kiloq generate` over 500 prompts, the two in turns, as whole commands.

python docs/measurements/generate_throughput.py --rounds 3 [-m MODEL] > result.json
"""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

NUM_PROMPTS = 500
ASKS = [
    "What is {a} + {b}?",
    "Tell me a short story about a fox.",
    "{a}加{b}等于多少？",
    "背一首李白的诗。",
    "{a} 더하기 {b}는 얼마예요?",
    "My name is Mina. I have {a} apples and {b} pears.",
]
SPEED = re.compile(r"([\d,]+) tokens .* ([\d,]+) tok/s")


def main() -> None:
    """Prints one JSON object: every round, and the ratio of the medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("-m", dest="model")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        prompts = Path(folder, "prompts.jsonl")
        prompts.write_text("".join(json.dumps(row) + "\n" for row in questions()), encoding="utf-8")
        rounds = [
            {f"batch {size}": one_run(prompts, Path(folder), size, args.model) for size in (1, 16)}
            for _ in range(args.rounds)
        ]
    ratios = sorted(one["batch 16"]["tokens per second"] / one["batch 1"]["tokens per second"] for one in rounds)
    machine = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}"
    json.dump({"machine": machine, "ratio of each round": ratios, "rounds": rounds}, sys.stdout, indent=1)


def questions() -> list[dict[str, object]]:
    """500 different short conversations; answers end by themselves or at 64 tokens."""
    return [
        {"messages": [{"role": "user", "content": ASKS[i % len(ASKS)].format(a=i % 89, b=i % 97)}], "max_tokens": 64}
        for i in range(NUM_PROMPTS)
    ]


def one_run(prompts: Path, folder: Path, batch: int, model: str | None) -> dict[str, float]:
    """One whole `kiloq generate`; its own count of tokens and speed, model loading left out."""
    output = folder / "answers.jsonl"
    output.unlink(missing_ok=True)
    command = [sys.executable, "-m", "kiloq", "generate", str(prompts), "-o", str(output), "--batch-size", str(batch)]
    command += [] if model is None else ["-m", model]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = SPEED.search(done.stderr)
    assert found is not None, done.stderr
    assert len(output.read_text(encoding="utf-8").splitlines()) == NUM_PROMPTS
    tokens, speed = (float(text.replace(",", "")) for text in found.groups())
    return {"tokens": tokens, "tokens per second": speed}


if __name__ == "__main__":
    main()

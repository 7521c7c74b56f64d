"""Draws runs of `kiloq train grpo` and `ppo`: reward, distance from where the policy began, and what its language lost.
Runs of `dpo` and `reward` have panels of their own.

python docs/measurements/plot_align.py OUT.png NAME=LOG.jsonl[,LOG.jsonl] ...
"""

import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

PANELS = (
    ("reward of a round's answers", "reward"),
    ("reward of greedy answers to held-out sums", "eval/sums/reward"),
    ("KL to the model it began as, a token", "kl"),
    ("perplexity of held-out chats", "eval/chat"),
    ("tokens of an answer", "length"),
    ("entropy of a token, nats", "entropy"),
)
PAIRS = (
    ("loss of a step's pairs", "loss"),
    ("margin of held-out pairs", "eval/held/margin"),
    ("accuracy on held-out pairs", "eval/held/accuracy"),
    ("score of chosen answers", "chosen"),
    ("score of rejected answers", "rejected"),
    ("perplexity of held-out chats", "eval/chat"),
)


def main(out: Path, runs: dict[str, list[Path]]) -> None:
    panels = PAIRS if any("margin" in row for logs in runs.values() for row in rows_of(logs)) else PANELS
    figure, axes = plt.subplots(2, 3, figsize=(13, 7), constrained_layout=True)
    for axis, (title, key) in zip(axes.flat, panels, strict=True):
        for name, logs in runs.items():
            points = [(row["step"], row[key]) for row in rows_of(logs) if key in row]
            if points:
                steps, values = zip(*points, strict=True)
                shown = [math.exp(value) for value in values] if key == "eval/chat" else values
                axis.plot(steps, shown, label=name, marker="o" if key.startswith("eval") else None)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("optimiser step")
        axis.grid(alpha=0.3)
    axes.flat[0].legend()
    figure.savefig(out, dpi=110)


def rows_of(logs: list[Path]) -> list[dict[str, Any]]:
    """The records of a run, its logs end to end. Whatever the held-out pairs are called, they are "held" here."""
    text = "".join(log.read_text(encoding="utf-8") for log in logs)
    rows: list[dict[str, Any]] = [json.loads(line) for line in text.splitlines()]
    return [{re.sub(r"^eval/\w+/(margin|accuracy)$", r"eval/held/\1", name): row[name] for name in row} for row in rows]


if __name__ == "__main__":
    named = (one.partition("=") for one in sys.argv[2:])
    main(Path(sys.argv[1]), {name: [Path(path) for path in paths.split(",")] for name, _, paths in named})

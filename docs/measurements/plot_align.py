"""Draws runs of `kiloq train grpo` and `ppo`: reward, distance from where the policy began, and what its language lost.

python docs/measurements/plot_align.py OUT.png NAME=LOG.jsonl[,LOG.jsonl] ...
"""

import json
import math
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


def main(out: Path, runs: dict[str, list[Path]]) -> None:
    figure, axes = plt.subplots(2, 3, figsize=(13, 7), constrained_layout=True)
    for axis, (title, key) in zip(axes.flat, PANELS, strict=True):
        for name, logs in runs.items():
            text = "".join(log.read_text(encoding="utf-8") for log in logs)
            rows: list[dict[str, Any]] = [json.loads(line) for line in text.splitlines()]
            points = [(row["step"], row[key]) for row in rows if key in row]
            if points:
                steps, values = zip(*points, strict=True)
                shown = [math.exp(value) for value in values] if key == "eval/chat" else values
                axis.plot(steps, shown, label=name, marker="o" if key.startswith("eval") else None)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("optimiser step")
        axis.grid(alpha=0.3)
    axes.flat[0].legend()
    figure.savefig(out, dpi=110)


if __name__ == "__main__":
    named = (one.partition("=") for one in sys.argv[2:])
    main(Path(sys.argv[1]), {name: [Path(path) for path in paths.split(",")] for name, _, paths in named})

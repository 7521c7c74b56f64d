"""What the runs of run.sh came to: plots of their logs, and one JSON of first and last figures and of who wins.

python recipes/align/plot.py runs/align
"""

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path

import matplotlib

Row = dict[str, float]
Panels = dict[str, Callable[[Row], float | None]]


def perplexity(row: Row) -> float | None:
    """Of held-out chats, where the row has it."""
    return math.exp(row["eval/chat"]) if "eval/chat" in row else None


REWARDS: Panels = {
    "reward of a round's answers": lambda row: row.get("reward"),
    "reward of greedy answers to held-out sums": lambda row: row.get("eval/sums/reward"),
    "KL to the model it began as, nats a token": lambda row: row.get("kl"),
    "perplexity of held-out chats": perplexity,
    "tokens of an answer": lambda row: row.get("length"),
    "entropy of a token, nats": lambda row: row.get("entropy"),
}
PAIRS: Panels = {
    "accuracy on held-out pairs": lambda row: row.get("eval/polite/accuracy", row.get("eval/judged/accuracy")),
    "margin on held-out pairs": lambda row: row.get("eval/polite/margin", row.get("eval/judged/margin")),
    "perplexity of held-out chats": perplexity,
}


def main() -> None:
    """Writes rewards.png, pairs.png and figures.json into the folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    figures = {}
    for picture, panels, methods in (("rewards", REWARDS, ("grpo", "ppo")), ("pairs", PAIRS, ("dpo", "reward"))):
        logs = {name: rows(folder / name / "log.jsonl") for name in methods}
        figures |= {name: ends(log, panels) for name, log in logs.items()}
        draw(logs, panels, folder / f"{picture}.png")
    judged = (folder / "judge.jsonl").read_text(encoding="utf-8").splitlines()[0]
    text = json.dumps(figures | {"dpo against the model before": json.loads(judged)}, indent=1)
    unfinished = folder / "figures.part"
    unfinished.write_text(text + "\n", encoding="utf-8")
    unfinished.replace(folder / "figures.json")
    print(text)


def rows(log: Path) -> list[Row]:
    """The figures of a run, by step."""
    told = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    return [{key: value for key, value in row.items() if isinstance(value, int | float)} for row in told]


def line(log: list[Row], panel: Callable[[Row], float | None]) -> list[tuple[float, float]]:
    """(step, figure) wherever the log has it."""
    return [(row["step"], value) for row in log if (value := panel(row)) is not None]


def ends(log: list[Row], panels: Panels) -> dict[str, list[float]]:
    """First and last of each figure."""
    lines = {title: line(log, panel) for title, panel in panels.items()}
    return {title: [round(found[0][1], 4), round(found[-1][1], 4)] for title, found in lines.items() if found}


def draw(logs: dict[str, list[Row]], panels: Panels, path: Path) -> None:
    """A panel for each figure, a line for each run."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(len(panels) // 3, 3, figsize=(14, 4 * len(panels) // 3), squeeze=False)
    for axis, (title, panel) in zip(axes.flat, panels.items(), strict=True):
        for number, (name, log) in enumerate(logs.items()):
            if found := line(log, panel):
                few = len(found) < 20  # evaluations, which stand for themselves
                axis.plot(*zip(*found, strict=True), color=f"C{number}", marker="o" if few else None, label=name)
        axis.set_title(title)
        axis.set_xlabel("optimiser step")
        axis.grid(alpha=0.3)
        axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    main()

"""Who answers better by the rule of make_pairs.py: one model or another, greedily, on the held-out questions.

python recipes/align/judge.py kiloq/assets/mini/kiloq-mini-chat runs/align/dpo/model
"""

import argparse
import json
from pathlib import Path

from make_pairs import POLITE

from kiloq import LLM, SamplingParams


def main() -> None:
    """Prints one line of JSON: the second model's wins, ties and losses, and how often it says the same thing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("before")
    parser.add_argument("after")
    parser.add_argument("--held", type=Path, default=Path("runs/align/polite_held.jsonl"))
    parser.add_argument("--count", type=int, default=300)
    args = parser.parse_args()
    rows = [json.loads(line) for line in args.held.read_text(encoding="utf-8").splitlines()][: args.count]
    before, after = (answers(model, rows) for model in (args.before, args.after))
    polite = [[is_polite(text, row) for text, row in zip(texts, rows, strict=True)] for texts in (before, after)]
    wins = sum(b and not a for a, b in zip(*polite, strict=True))
    losses = sum(a and not b for a, b in zip(*polite, strict=True))
    ties = len(rows) - wins - losses
    right = [
        sum(plain(text, row) == row["rejected"] for text, row in zip(texts, rows, strict=True)) / len(rows)
        for texts in (before, after)
    ]
    same = sum(plain(b, row) == plain(a, row) for a, b, row in zip(before, after, rows, strict=True)) / len(rows)
    rate = (wins + ties / 2) / len(rows)
    found = {"questions": len(rows), "wins": wins, "ties": ties, "losses": losses, "win_rate": round(rate, 3)}
    shares = {"same_content": same, "as_in_data_before": right[0], "as_in_data_after": right[1]}
    print(json.dumps(found | {name: round(share, 3) for name, share in shares.items()}))
    for row, a, b in list(zip(rows, before, after, strict=True))[::40]:
        print(json.dumps([row["prompt"], a, b], ensure_ascii=False))


def answers(model: str, rows: list[dict[str, str]]) -> list[str]:
    """Greedy, of at most 96 tokens."""
    llm = LLM(model)
    params = SamplingParams(temperature=0.0, max_tokens=96)
    return [llm.chat([{"role": "user", "content": row["prompt"]}], params).text for row in rows]


def is_polite(text: str, row: dict[str, str]) -> bool:
    return text.startswith(POLITE[row["lang"]].strip())


def plain(text: str, row: dict[str, str]) -> str:
    """The answer without the kind word."""
    return text.removeprefix(POLITE[row["lang"]].strip()).strip()


if __name__ == "__main__":
    main()

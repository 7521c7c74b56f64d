"""Conversations for fine-tuning kiloq-mini-chat, and held-out questions with known answers.

python recipes/mini/make_chat.py --out RUN_DIR --seed 0
"""

import argparse
import json
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from minigen.dialogue import conversation
from minigen.exchange import Sample
from minigen.templates import LANGUAGES


def main() -> None:
    """Writes chat.jsonl (training) and heldout_chat.jsonl (test)."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--samples", type=int, default=320_000)
    parser.add_argument("--heldout", type=int, default=1_500)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    write(args.out / "chat.jsonl", samples(args.samples, seed=args.seed, heldout=False))
    write(args.out / "heldout_chat.jsonl", samples(args.heldout, seed=args.seed + 1, heldout=True))


def samples(count: int, *, seed: int, heldout: bool) -> Iterator[Sample]:
    """Different conversations, the three languages in turn; the same for the same seed."""
    rng, seen = random.Random(f"chat:{seed}:{heldout}"), Counter[str]()
    made = 0
    while made < count:
        sample = conversation(rng, LANGUAGES[made % 3], heldout=heldout)
        text = json.dumps(sample.messages, ensure_ascii=False)
        # Short greetings repeat by nature; anything is kept at most eight times, a held-out question once.
        if seen[text] < (1 if heldout else 8):
            seen[text] += 1
            made += 1
            yield sample


def write(path: Path, rows: Iterator[Sample]) -> None:
    """One JSON object a line, and a count of topics on the screen."""
    topics: Counter[str] = Counter()
    with path.open("w", encoding="utf-8") as out:
        for sample in rows:
            row: dict[str, object] = {"messages": sample.messages, "topic": sample.topic, "lang": sample.lang}
            if sample.tools:
                row["tools"] = sample.tools
            if sample.heldout:
                row["expect"] = sample.expect
            out.write(json.dumps(row, ensure_ascii=False) + "\n")
            topics[sample.topic.split("/")[0]] += 1
    counts = "  ".join(f"{topic} {count:,}" for topic, count in topics.most_common())
    print(f"{path.name}: {sum(topics.values()):,} conversations; {counts}")


if __name__ == "__main__":
    main()

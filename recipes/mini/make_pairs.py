"""Preference pairs for kiloq-mini-chat: the right answer against what the fine-tuned model itself got wrong.

python recipes/mini/make_pairs.py --model runs/mini/chat/model --out runs/mini --seed 3
"""

import argparse
import json
import random
from collections import Counter
from pathlib import Path

from answers import answers
from minigen.dialogue import conversation
from minigen.exchange import Sample
from minigen.templates import LANGUAGES
from scoring import is_right


def main() -> None:
    """Writes pairs.jsonl; its prompts come from the training side of the generator, with a seed of their own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=6_000)
    args = parser.parse_args()
    asked = prompts(args.prompts, seed=args.seed)
    said = answers(args.model, asked, temperature=0.7, seed=args.seed)
    topics: Counter[str] = Counter()
    with (args.out / "pairs.jsonl").open("w", encoding="utf-8") as out:
        for sample, answer in zip(asked, said, strict=True):
            if is_right(sample.expect, answer) or not answer.strip():
                continue
            out.write(json.dumps(pair(sample, answer), ensure_ascii=False) + "\n")
            topics[sample.topic.split("/")[0]] += 1
    counts = "  ".join(f"{topic} {count:,}" for topic, count in topics.most_common())
    print(f"pairs.jsonl: {sum(topics.values()):,} of {len(asked):,} answers were wrong; {counts}")


def prompts(count: int, *, seed: int) -> list[Sample]:
    """Conversations of the training side with one right answer, no two alike."""
    rng, found = random.Random(f"pairs:{seed}"), dict[str, Sample]()
    while len(found) < count:
        sample = conversation(rng, LANGUAGES[len(found) % 3], heldout=False)
        if sample.expect and not sample.tools:
            found.setdefault(repr(sample.messages), sample)
    return list(found.values())


def pair(sample: Sample, wrong: str) -> dict[str, object]:
    """A row as `kiloq train dpo` reads it."""
    return {
        "prompt": sample.messages[:-1],
        "chosen": [sample.messages[-1]],
        "rejected": [{"role": "assistant", "content": wrong}],
    }


if __name__ == "__main__":
    main()

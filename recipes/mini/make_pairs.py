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
from minigen.exchange import Message, Sample
from minigen.templates import LANGUAGES
from scoring import is_right

from kiloq.chat import QWEN1, parse_reply


def main() -> None:
    """Writes pairs.jsonl; its prompts come from the training side of the generator, with a seed of their own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=14_000)
    args = parser.parse_args()
    asked = prompts(args.prompts, seed=args.seed)
    said = answers(args.model, asked, temperature=0.7, seed=args.seed)
    topics: Counter[str] = Counter()
    with (args.out / "pairs.jsonl").open("w", encoding="utf-8") as out:
        for sample, answer in zip(asked, said, strict=True):
            row = None if is_right(sample.expect, answer) else pair(sample, answer)
            if row is None:
                continue
            out.write(json.dumps(row, ensure_ascii=False) + "\n")
            topics[sample.topic.split("/")[0]] += 1
    counts = "  ".join(f"{topic} {count:,}" for topic, count in topics.most_common())
    print(f"pairs.jsonl: {sum(topics.values()):,} of {len(asked):,} answers were wrong; {counts}")


def prompts(count: int, *, seed: int) -> list[Sample]:
    """Conversations of the training side with one right answer, no two alike, and no topic with more than its share.

    Among what is drawn small topics would hardly come up; the share is what 30 even topics would have.
    """
    rng, found, topics = random.Random(f"pairs:{seed}"), dict[str, Sample](), Counter[str]()
    while len(found) < count:
        sample = conversation(rng, LANGUAGES[len(found) % 3], heldout=False)
        if sample.expect and topics[sample.topic] < max(1, count // 30) and repr(sample.messages) not in found:
            topics[sample.topic] += 1
            found[repr(sample.messages)] = sample
    return list(found.values())


def pair(sample: Sample, wrong: str) -> dict[str, object] | None:
    """A row as `kiloq train dpo` reads it; None where the wrong answer says nothing at all."""
    reply = parse_reply(wrong, QWEN1, tools=bool(sample.tools))
    functions = [{"name": call.name, "arguments": call.arguments} for call in reply.tool_calls]
    rejected: Message = {"role": "assistant", "content": reply.content.strip()}
    if functions:
        rejected["tool_calls"] = [{"id": "call_0", "type": "function", "function": one} for one in functions]
    if not (functions or rejected["content"]):
        return None
    row: dict[str, object] = {
        "prompt": sample.messages[:-1],
        "chosen": [sample.messages[-1]],
        "rejected": [rejected],
    }
    return row | ({"tools": sample.tools} if sample.tools else {})


if __name__ == "__main__":
    main()

"""Conversations that give the bundled model a new identity, and keep what else it can do.

python recipes/finetune/demo/make_data.py --out runs/finetune-demo
"""

import argparse
import json
import random
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "mini"))
from minigen.dialogue import conversation
from minigen.templates import LANGUAGES

_ABOUT_ITSELF = ("kiloq", "qwen", "千问")  # what the old identity would say of itself


def main() -> None:
    """Writes chat.jsonl (training) and questions.jsonl (asked afterwards, with what a right answer contains)."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--others", type=int, default=700, help="conversations about other things")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    rng = random.Random("identity")
    topics = tomllib.loads(Path(__file__).with_name("identity.toml").read_text("utf-8"))["topic"]
    rows = [_row(question, rng.choice(topic["answer"])) for topic in topics for question in topic["ask"] * 2]
    rows += [{"messages": messages} for messages in _others(rng, args.others)]
    rng.shuffle(rows)
    _write(args.out / "chat.jsonl", rows)
    names = {"en": "Nabi", "zh": "小蝶", "ko": "나비"}
    held = [{**_row(question), "expect": names[topic["lang"]]} for topic in topics for question in topic["held"]]
    _write(args.out / "questions.jsonl", held)


def _row(question: str, answer: str | None = None) -> dict[str, object]:
    turns = [{"role": "user", "content": question}]
    return {"messages": turns + ([{"role": "assistant", "content": answer}] if answer else [])}


def _others(rng: random.Random, count: int) -> Iterator[list[dict[str, object]]]:
    """What the model learned before, without what it says of itself."""
    made = 0
    while made < count:
        sample = conversation(rng, LANGUAGES[made % 3], heldout=False)
        text = json.dumps(sample.messages, ensure_ascii=False).lower()
        if not sample.tools and not any(word in text for word in _ABOUT_ITSELF):
            made += 1
            yield sample.messages


def _write(path: Path, rows: list[dict[str, object]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    print(f"{path}: {len(rows):,} rows")


main()

"""Preferences with a known rule, made of kiloq-mini-chat's own conversations: for dpo.toml, kto.toml and reward.toml.

python recipes/mini/make_chat.py --out runs/mini --samples 4000
python recipes/align/make_pairs.py runs/mini runs/align
"""

import argparse
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

POLITE = {"en": "With pleasure! ", "zh": "很高兴帮你！", "ko": "기꺼이 도와드릴게요! "}

Row = dict[str, Any]


def main() -> None:
    """Writes polite.jsonl (the better answer begins politely) and judged.jsonl (polite, right and brief ones are
    better), each also as *_held.jsonl of held-out questions."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("chat", type=Path, help="the folder of chat.jsonl and heldout_chat.jsonl")
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for source, ending in (("chat", ""), ("heldout_chat", "_held")):
        rows = short_rows(args.chat / f"{source}.jsonl")
        rng = random.Random(f"pairs:{args.seed}:{source}")
        write(args.out / f"polite{ending}.jsonl", (polite(row) for row in rows))
        write(args.out / f"judged{ending}.jsonl", judged(rows, rng))


def short_rows(path: Path) -> list[Row]:
    """Questions with one plain answer."""
    rows = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return [row for row in rows if len(row["messages"]) == 2 and "tools" not in row]


def judged(rows: list[Row], rng: random.Random) -> Iterator[Row]:
    """Each question once, under one of three rules."""
    spoken: dict[str, list[Row]] = {}
    for row in rows:
        spoken.setdefault(row["lang"], []).append(row)
    rules: list[Callable[[Row], Row]] = [polite, lambda row: right(row, spoken[row["lang"]], rng), brief]
    for row in rows:
        yield rng.choices(rules, weights=[3, 5, 2])[0](row)


def polite(row: Row) -> Row:
    """The same answer, with and without a kind word before it."""
    answer = answer_of(row)
    return pair(row, "polite", POLITE[row["lang"]] + answer, answer)


def right(row: Row, others: list[Row], rng: random.Random) -> Row:
    """The right answer, and that to a question of another kind; both polite or both not."""
    wrong = rng.choice([one for one in others if is_other(one, row)])
    opening = rng.choice(["", POLITE[row["lang"]]])
    return pair(row, "right", opening + answer_of(row), opening + answer_of(wrong))


def is_other(one: Row, row: Row) -> bool:
    return bool(one["topic"] != row["topic"]) and answer_of(one) != answer_of(row)


def brief(row: Row) -> Row:
    """The answer, and the answer said twice."""
    answer = answer_of(row)
    return pair(row, "brief", answer, f"{answer} {answer}")


def pair(row: Row, rule: str, chosen: str, rejected: str) -> Row:
    prompt = row["messages"][0]["content"]
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, "rule": rule, "lang": row["lang"]}


def answer_of(row: Row) -> str:
    text: str = row["messages"][1]["content"]
    return text


def write(path: Path, rows: Iterator[Row]) -> None:
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{path}: {len(lines):,} pairs")


if __name__ == "__main__":
    main()

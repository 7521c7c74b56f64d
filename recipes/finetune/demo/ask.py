"""Asks a model the held-out questions of the demonstration and counts the answers that have the new name.

python recipes/finetune/demo/ask.py runs/finetune-demo/questions.jsonl -m kiloq-mini-chat
"""

import argparse
import json
from pathlib import Path

from kiloq import LLM, SamplingParams


def main() -> None:
    """Prints a few answers, and how many are right."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("questions", type=Path)
    parser.add_argument("-m", "--model", required=True)
    parser.add_argument("--show", type=int, default=3)
    args = parser.parse_args()
    rows = [json.loads(line) for line in args.questions.read_text("utf-8").splitlines()]
    llm = LLM(args.model)
    answers = llm.chat([row["messages"] for row in rows], SamplingParams(temperature=0.0))
    texts = [answer.text for answer in answers]
    for row, text in list(zip(rows, texts, strict=True))[:: max(1, len(rows) // args.show)][: args.show]:
        print(f"  {row['messages'][-1]['content']}  ->  {text}")
    right = sum(row["expect"] in text for row, text in zip(rows, texts, strict=True))
    print(f"{args.model}: {right} of {len(rows)} questions in wordings it has not seen are answered with the new name")


main()

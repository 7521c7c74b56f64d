"""Sums to be answered with the number alone: prompts for GRPO and PPO, and held-out ones with other pairs of numbers.

    python recipes/align/make_sums.py runs/align

Seed 0; a pair of numbers is either learned from or held out, in every wording.
"""

import json
import random
import sys
from pathlib import Path

WORDINGS = (
    "What is {a} + {b}? Just the number.",
    "Only the number, please. What is {a} + {b}?",
    "只回答数字：{a} + {b} 等于几？",
    "숫자로만 답해 줘: {a} + {b}는?",
)
LARGEST = 12


def main(folder: Path) -> None:
    pairs = [(a, b) for a in range(LARGEST + 1) for b in range(LARGEST + 1)]
    random.Random(0).shuffle(pairs)
    held = len(pairs) // 5
    folder.mkdir(parents=True, exist_ok=True)
    for name, some in (("sums_held", pairs[:held]), ("sums", pairs[held:])):
        rows = [{"instruction": w.format(a=a, b=b), "output": str(a + b)} for a, b in some for w in WORDINGS]
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

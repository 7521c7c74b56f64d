"""The skill test: exact scores per skill and language of one or more chat models on the same held-out questions.

python recipes/mini/make_skills.py --record recipes/mini/record sft=runs/mini/chat/model dpo=runs/mini/dpo/model
"""

import argparse
import json
from pathlib import Path

from answers import answers
from minigen.skills import SKILLS, skill_test
from minigen.templates import LANGUAGES
from scoring import is_right

SEED = 20_261  # training uses 0 to 2


def main() -> None:
    """Writes skills.json: model -> skill -> language -> [right, asked]; and wrong answers to look at."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="+", metavar="NAME=FOLDER")
    parser.add_argument("--record", type=Path, required=True)
    parser.add_argument("--count", type=int, default=40, help="questions of each skill and language")
    args = parser.parse_args()
    asked = [
        (skill, sample)
        for skill in SKILLS
        for lang in LANGUAGES
        for sample in skill_test(lang, skill, seed=SEED, count=args.count)
    ]
    path = args.record / "skills.json"
    scores = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    for name, folder in (one.split("=", 1) for one in args.models):
        said = answers(Path(folder), [sample for _, sample in asked], temperature=0)
        table: dict[str, dict[str, list[int]]] = {}
        wrong = []
        for (skill, sample), answer in zip(asked, said, strict=True):
            right = is_right(sample.expect, answer)
            cell = table.setdefault(skill, {}).setdefault(sample.lang, [0, 0])
            cell[0] += right
            cell[1] += 1
            if not right:
                question = sample.messages[-2]["content"]
                wrong.append({"skill": skill, "asked": question, "expect": sample.expect, "answer": answer})
        scores.pop(name, None)
        scores[name] = table  # behind what is kept of earlier calls: the last one is shown by language
        (args.record / f"wrong.{name}.jsonl").write_text(
            "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in wrong), encoding="utf-8"
        )
        right_all, asked_all = (sum(c[i] for row in table.values() for c in row.values()) for i in (0, 1))
        print(f"{name}: {right_all:,} of {asked_all:,}, mean of skills {mean_of_skills(table):.1%}")
    path.write_text(json.dumps(scores, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    print(as_table(scores))


def mean_of_skills(table: dict[str, dict[str, list[int]]]) -> float:
    """Every skill counts alike."""
    shares = [share(list(row.values())) for row in table.values()]
    return sum(shares) / len(shares)


def share(cells: list[list[int]]) -> float:
    """Right of asked."""
    return sum(c[0] for c in cells) / max(1, sum(c[1] for c in cells))


def as_table(scores: dict[str, dict[str, dict[str, list[int]]]]) -> str:
    """Markdown: a line a skill, the last model by language, every model over all languages."""
    *_, last = scores
    head = ["skill", "of each", *LANGUAGES, *scores]
    lines = [" | ".join(head), "|".join(["---"] * len(head))]
    for skill, row in scores[last].items():
        asked = "/".join(str(row[lang][1]) for lang in LANGUAGES if lang in row)
        by_lang = [f"{share([row[lang]]):.0%}" if lang in row else "" for lang in LANGUAGES]
        overall = [f"{share(list(table[skill].values())):.0%}" for table in scores.values()]
        lines.append(" | ".join([skill, asked, *by_lang, *overall]))
    langs = [f"{share([row[x] for row in scores[last].values() if x in row]):.0%}" for x in LANGUAGES]
    total = [f"{mean_of_skills(table):.1%}" for table in scores.values()]
    lines.append(" | ".join(["**mean of skills**", "", *langs, *total]))
    return "\n".join(f"| {line} |" for line in lines)


if __name__ == "__main__":
    main()

"""The calibration text that kiloq brings along: conversations and stories of our generators, our documents, our code.

python recipes/quantize/make_calibration.py --out kiloq/assets/calibration
"""

import argparse
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
SEED = 20
CONVERSATIONS, STORIES = 330, 45  # the three languages in turn
DOCUMENT_BYTES, CODE_BYTES = 90_000, 60_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    sys.path.insert(0, str(ROOT / "recipes" / "mini"))
    out.mkdir(parents=True, exist_ok=True)
    write(out / "chat.jsonl", conversations())
    write(out / "text.jsonl", texts())


def conversations() -> Iterator[dict[str, object]]:
    from minigen.dialogue import conversation
    from minigen.templates import LANGUAGES

    rng = random.Random(SEED)
    for number in range(CONVERSATIONS):
        sample = conversation(rng, LANGUAGES[number % 3], heldout=False)
        yield {"messages": sample.messages} | ({"tools": sample.tools} if sample.tools else {})


def texts() -> Iterator[dict[str, object]]:
    from minigen.stories import story
    from minigen.templates import LANGUAGES

    rng = random.Random(SEED)
    for number in range(STORIES):
        yield {"text": story(rng, LANGUAGES[number % 3])}
    documents = [ROOT / "README.md", ROOT / "README_KO.md", *sorted((ROOT / "docs" / "decisions").glob("*.md"))]
    yield from files(documents, DOCUMENT_BYTES)
    code = sorted((ROOT / "kiloq").rglob("*.py"))
    rng.shuffle(code)
    yield from files(code, CODE_BYTES)


def files(paths: list[Path], most: int) -> Iterator[dict[str, object]]:
    size = 0
    for path in paths:
        text = path.read_text(encoding="utf-8")
        size += len(text.encode())
        if size > most:
            return
        yield {"text": text}


def write(path: Path, rows: Iterator[dict[str, object]]) -> None:
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    path.write_text("".join(lines), encoding="utf-8")
    print(f"{path.name}: {len(lines):,} rows, {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()

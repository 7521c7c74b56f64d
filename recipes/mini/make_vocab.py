"""The vocabulary of kiloq-mini, learned from its own corpus, and how well it compresses each part.

python recipes/mini/make_vocab.py --out RUN_DIR --size 5632
"""

import argparse
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from kiloq.tokenizer import Tokenizer
from kiloq.tokenizer.train import train_tokenizer

MEASURED_BYTES = 400_000  # of each part, enough for three digits
# Of each generated part: enough to learn its words, not so much that whole sentences of its templates become tokens
# (Chinese has no spaces, so nothing else stops them). Korean has no other text, and its words are kept apart by spaces.
LEARNED_BYTES = {"stories": 200_000, "dialogues": 1_000_000, "drills": 200_000}
LEARNED_BYTES_KOREAN = {"stories": 2_000_000, "dialogues": 3_000_000, "drills": 200_000}


def main() -> None:
    """Writes tokenizer/kiloq-mini.tiktoken and prints a table of bytes per token."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="the folder that make_corpus.py wrote to")
    parser.add_argument("--size", type=int, default=5_632, help="ids, with the 208 specials")
    args = parser.parse_args()
    folder = args.out / "tokenizer"
    folder.mkdir(parents=True, exist_ok=True)
    train_tokenizer(learned(args.out), args.size, output=folder / "kiloq-mini.tiktoken")
    report = compression(Tokenizer.load(folder), args.out)
    (args.out / "tokens.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    for part, row in report.items():
        print(
            f"{part:24} {row['bytes']:12,} bytes  {row['bytes_per_token']:5.2f} bytes/token  {row['tokens']:11,} tokens"
        )


def learned(folder: Path) -> Iterator[str]:
    """The texts that the vocabulary is learned from."""
    taken = Counter[str]()
    for row in documents(folder):
        source = row["source"]
        limits = LEARNED_BYTES_KOREAN if row["lang"] == "ko" else LEARNED_BYTES
        limit = limits[source.split("-")[1]] if source.startswith("kiloq-") else None
        if limit is None or taken[source] < limit:
            taken[source] += len(row["text"].encode())
            yield row["text"]


def documents(folder: Path) -> Iterator[dict[str, str]]:
    """The training documents of all languages."""
    for path in sorted(folder.glob("train.*.jsonl")):
        with path.open(encoding="utf-8") as lines:
            yield from map(json.loads, lines)


def compression(tokenizer: Tokenizer, folder: Path) -> dict[str, dict[str, float]]:
    """Bytes, bytes per token (of a first piece) and the tokens that follow, of each source and language."""
    size, measured, tokens = Counter[str](), Counter[str](), Counter[str]()
    for row in documents(folder):
        length = len(row["text"].encode())
        for part in (row["source"], f"all {row['lang']}"):
            size[part] += length
        if measured[row["source"]] < MEASURED_BYTES:
            count = len(tokenizer.encode(row["text"]))
            for part in (row["source"], f"all {row['lang']}"):
                measured[part] += length
                tokens[part] += count
    return {
        part: {
            "bytes": size[part],
            "bytes_per_token": round(measured[part] / tokens[part], 3),
            "tokens": round(size[part] * tokens[part] / measured[part]),
        }
        for part in size
    }


if __name__ == "__main__":
    main()

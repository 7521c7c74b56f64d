"""The pre-training corpus of kiloq-mini: cleaned free texts, generated documents, and a manifest of their sources.

python recipes/mini/make_corpus.py --shared ../shared/data --out RUN_DIR
"""

import argparse
import gzip
import hashlib
import json
import re
import subprocess
import tomllib
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from clean import CLEANERS, groups
from minigen.documents import PARTS, generated_documents

HELDOUT_PER_MILLE = 15
SKETCH = 8  # one shingle hash in SKETCH is kept for the near-duplicate test
HERE = Path(__file__).parent


@dataclass
class SourceReport:
    """One line of the manifest; counts of documents and bytes at each stage."""

    name: str
    lang: str
    licence: str
    credit: str
    file_sha256: str = ""
    bytes_in: int = 0
    documents_in: int = 0
    paragraphs: int = 0
    groups: int = 0
    duplicates: int = 0
    documents_out: int = 0
    bytes_out: int = 0
    heldout: int = 0


@dataclass
class Corpus:
    """Documents written so far, and the sketches that keep copies out."""

    out: Path
    seen: set[int] = field(default_factory=set)
    documents: dict[str, list[dict[str, str]]] = field(default_factory=dict)

    def add(self, text: str, report: SourceReport) -> bool:
        """Takes a document unless more than half of it was seen before."""
        sketch = shingle_sketch(text)
        if sum(h in self.seen for h in sketch) * 2 > len(sketch):
            report.duplicates += 1
            return False
        self.seen.update(sketch)
        self.keep(text, report)
        return True

    def keep(self, text: str, report: SourceReport) -> None:
        """Takes a document as it is; the split is a function of its text alone."""
        heldout = int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) % 1000 < HELDOUT_PER_MILLE
        split = "heldout" if heldout else "train"
        row = {"text": text, "lang": report.lang, "source": report.name}
        self.documents.setdefault(f"{split}.{report.lang}", []).append(row)
        report.documents_out += 1
        report.heldout += heldout
        report.bytes_out += len(text.encode())

    def write(self) -> dict[str, str]:
        """Writes one JSONL per split and language, and one of all training text not written here; their sha256."""
        digests = {}
        for rows in self.documents.values():
            rows.sort(key=lambda row: hashlib.sha256(row["text"].encode()).digest())
        split = sorted(self.documents.items())
        real = [row for name, rows in split if name.startswith("train") for row in rows if not is_ours(row["source"])]
        for name, rows in [*split, ("train.real", real)]:
            path = self.out / f"{name}.jsonl"
            path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
            digests[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
        return digests


def is_ours(source: str) -> bool:
    """Whether a source is one of the generator's parts, and no book or documentation."""
    return source.startswith("kiloq-")


def shingle_sketch(text: str) -> list[int]:
    """A fixed sample of the hashes of 12-character shingles, the same for equal passages anywhere."""
    letters = re.sub(r"\W+", "", text.lower())
    hashes = [zlib.crc32(letters[i : i + 12].encode()) for i in range(max(1, len(letters) - 11))]
    return [h for h in hashes if h % SKETCH == 0] or hashes[:1]


def main() -> None:
    """Reads the sources, adds generated documents, writes the corpus and manifest.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shared", type=Path, required=True, help="folder with text/, see README.md")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--scale", type=float, default=1.0, help="size of the generated parts")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    corpus = Corpus(args.out)
    reports = [
        read_source(spec, args.shared, corpus) for spec in tomllib.loads((HERE / "sources.toml").read_text())["source"]
    ]
    for part in PARTS:
        report = SourceReport(part.name, part.lang, "Apache-2.0", "written by the kiloq project (recipes/mini)")
        for text in generated_documents(part, seed=args.seed, max_bytes=int(part.max_bytes * args.scale)):
            report.documents_in += 1
            report.bytes_in += len(text.encode())
            corpus.keep(text, report)
        reports.append(report)
    manifest = {
        "seed": args.seed,
        "generator": commit(),
        "sources": [vars(r) for r in reports],
        "files": corpus.write(),
    }
    (args.out / "manifest.json").write_text(json.dumps(manifest, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    print(mix_table(reports))


def commit() -> str:
    """The commit whose generator runs, with "+" where files differ from it; "" outside a git checkout."""
    command = ["git", "-C", str(HERE), "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip()


def read_source(spec: dict[str, str], shared: Path, corpus: Corpus) -> SourceReport:
    """Cleans one file of the shared texts into the corpus, up to its cap."""
    path = shared / spec["path"]
    report = SourceReport(spec["name"], spec["lang"], spec["licence"], spec["credit"])
    report.file_sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    for text in _raw_documents(path, tuple(spec.get("keep", ()))):
        report.documents_in += 1
        report.bytes_in += len(text.encode())
        paragraphs = CLEANERS[spec["kind"]](text, spec["lang"])
        report.paragraphs += len(paragraphs)
        for group in groups(paragraphs, spec["kind"]):
            report.groups += 1
            if report.bytes_out < int(spec["max_bytes"]):
                corpus.add(group, report)
    return report


def mix_table(reports: list[SourceReport]) -> str:
    """What a person checks: documents and bytes of every part, and the share of each language."""
    total = sum(r.bytes_out for r in reports)
    lines = [f"{'source':24} {'lang':4} {'in':>9} {'groups':>8} {'dup':>6} {'out':>8} {'MB':>7} {'share':>6}"]
    for r in reports:
        row = f"{r.name:24} {r.lang:4} {r.documents_in:9,} {r.groups:8,} {r.duplicates:6,} {r.documents_out:8,}"
        lines.append(f"{row} {r.bytes_out / 1e6:7.2f} {r.bytes_out / total:6.1%}")
    for lang in sorted({r.lang for r in reports}):
        size = sum(r.bytes_out for r in reports if r.lang == lang)
        lines.append(f"{'all':24} {lang:4} {'':>34} {size / 1e6:7.2f} {size / total:6.1%}")
    return "\n".join(lines)


def _raw_documents(path: Path, prefixes: tuple[str, ...]) -> Iterator[str]:
    """Rows in file order, but the wished order of prefixes first, so that a cap cuts what matters least."""
    rows = [json.loads(line) for line in gzip.decompress(path.read_bytes()).decode("utf-8").split("\n") if line]
    if not prefixes:
        yield from (row["text"] for row in rows)
        return
    for prefix in prefixes:
        yield from (row["text"] for row in rows if row["id"].startswith(prefix))


if __name__ == "__main__":
    main()

"""The corpus: cleaning keeps prose and drops markup, copies are dropped, the manifest adds up."""

import gzip
import json
import random
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from clean import CLEANERS, groups
from make_corpus import shingle_sketch
from minigen.documents import PARTS, generated_documents
from minigen.drills import drill
from minigen.stories import story
from minigen.templates import LANGUAGES

MARKDOWN = """---
title: x
---
# A heading

A paragraph with a [link](http://a.b) and **strong** words, which is long enough to count as prose.

```js
let code = 1;
```

- a list item that is long enough to be taken for a paragraph of prose, but is not

| a | table |
"""


def test_documentation_keeps_only_prose() -> None:
    prose = ["A paragraph with a link and strong words, which is long enough to count as prose."]
    assert CLEANERS["docs"](MARKDOWN, "en") == prose


def test_poems_in_traditional_script_are_left_out() -> None:
    simplified, traditional = (
        "静夜思\n李白\n床前明月光，疑是地上霜。\n举头望明月，低头思故乡。",
        "學而時習之，不亦說乎？有朋自遠方來，不亦樂乎？",
    )
    assert CLEANERS["poetry"](f"{simplified}\n\n{traditional}", "zh") == [simplified]


def test_groups_lose_no_paragraph_and_stay_small() -> None:
    paragraphs = [f"{i} " + "word " * 60 for i in range(40)]
    joined = groups(paragraphs, "fiction")
    assert "\n\n".join(joined) == "\n\n".join(paragraphs)
    assert max(len(g.encode()) for g in joined) <= 1900


def test_a_copy_has_the_same_sketch_and_another_text_has_not() -> None:
    text = story(random.Random(0), "en")
    assert shingle_sketch(text) == shingle_sketch(text.upper())
    assert not set(shingle_sketch(text)) & set(
        shingle_sketch("Something else entirely, about ships and the sea at night.")
    )


@pytest.mark.parametrize("lang", LANGUAGES)
def test_stories_and_drills_are_filled_in(lang: str) -> None:
    rng = random.Random(0)
    for _ in range(200):
        for text in (story(rng, lang), drill(rng, lang)):
            assert not re.search(r"[{}|]|\[\w", text), text


def test_generated_documents_repeat_for_a_seed_and_differ_between_seeds() -> None:
    first, second, other = (list(generated_documents(PARTS[0], seed=s, max_bytes=20_000)) for s in (1, 1, 2))
    assert first == second
    assert not set(first) & set(other)


def test_the_script_writes_a_corpus_whose_manifest_adds_up(tmp_path: Path) -> None:
    recipe = Path(__file__).parents[2] / "recipes" / "mini"
    for spec in tomllib.loads((recipe / "sources.toml").read_text(encoding="utf-8"))["source"]:
        path = tmp_path / "shared" / spec["path"]
        path.parent.mkdir(parents=True, exist_ok=True)
        name = spec.get("keep", ["x"])[0]
        body = "\n\n".join(
            f"{name} says that number {i} is a fine number to say, and so it was said." for i in range(9)
        )
        path.write_bytes(gzip.compress((json.dumps({"id": f"{name}/1", "text": body}) + "\n").encode()))
    out = tmp_path / "run"
    command = [sys.executable, str(recipe / "make_corpus.py"), "--scale", "0.002"]
    subprocess.run([*command, "--shared", str(tmp_path / "shared"), "--out", str(out)], check=True, capture_output=True)
    manifest = json.loads((out / "manifest.json").read_text(encoding="utf-8"))
    lines = {path.name: path.read_text(encoding="utf-8").splitlines() for path in out.glob("*.jsonl")}
    real = lines.pop("train.real.jsonl")
    assert sum(map(len, lines.values())) == sum(source["documents_out"] for source in manifest["sources"])
    assert 0 < len(real) <= sum(s["documents_out"] for s in manifest["sources"] if s["file_sha256"])
    assert set(real) < {line for name, rows in lines.items() if name.startswith("train") for line in rows}
    assert all(source["licence"] and source["credit"] for source in manifest["sources"])

"""A check that is silenced says why beside it; what mypy does not read needs no silence for it."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
SILENCE = re.compile(r"#\s*(noqa|type: ignore)\b[^#]*$")  # a reason follows as a comment of its own


def test_every_silenced_check_has_its_reason() -> None:
    files = [path for name in ("kiloq", "recipes", "benchmarks", "tests") for path in (ROOT / name).rglob("*.py")]
    lines = [(path, line) for path in files for line in path.read_text(encoding="utf-8").splitlines()]
    assert len(lines) > 10_000
    assert not [f"{path}: {line}" for path, line in lines if SILENCE.search(line)]

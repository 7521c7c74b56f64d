"""A check that is silenced says why beside it."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
# A reason follows as a comment of its own. mypy does not read the tests, so that there only ruff is silenced.
SILENCE = {
    "kiloq": r"noqa|type: ignore",
    "recipes": r"noqa|type: ignore",
    "benchmarks": r"noqa|type: ignore",
    "tests": "noqa",
}


def test_every_silenced_check_has_its_reason() -> None:
    faults = []
    for folder, words in SILENCE.items():
        files = sorted((ROOT / folder).rglob("*.py"))
        assert files
        for path in files:
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
                if re.search(rf"#\s*({words})\b[^#]*$", line):
                    faults.append(f"{path}:{number} {line.strip()}")
    assert not faults

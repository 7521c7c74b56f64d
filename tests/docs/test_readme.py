"""Both READMEs: the same commands in the same order, each of which runs, and every path they name exists."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FENCE = re.compile(r"(?P<mark><!-- not run: [^>]+-->\n)?```(?P<language>\w+)\n(?P<body>.*?)```", re.DOTALL)
# `make` starts from a checkout: .ci/run does that in a clean clone; a test inside the environment it makes cannot.
BY_CI = ("make chat", 'echo "你好" | make -s chat')


def blocks(name: str) -> list[tuple[str, str, bool]]:
    text = (ROOT / name).read_text(encoding="utf-8")
    return [(m["language"], m["body"], m["mark"] is None) for m in FENCE.finditer(text)]


ENGLISH = blocks("README.md")
RUNNABLE = [(language, body) for language, body, runs in ENGLISH if runs and body.strip() not in BY_CI]


def test_both_languages_have_the_same_commands() -> None:
    assert blocks("README_KO.md") == ENGLISH


def test_ci_runs_the_commands_that_need_a_checkout() -> None:
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert 'echo "你好" | make -s chat' in script
    assert "make test" in script


def test_what_is_not_run_needs_the_network() -> None:
    assert [body.strip() for _, body, runs in ENGLISH if not runs] == ["make chat MODEL=Qwen/Qwen3-0.6B"]


@pytest.mark.parametrize(("language", "body"), RUNNABLE, ids=[body.split("\n")[0][:40] for _, body in RUNNABLE])
def test_code_block_runs(language: str, body: str, tmp_path: Path) -> None:
    command = {"bash": ["bash", "-euo", "pipefail", "-c", body], "python": [sys.executable, "-c", body]}[language]
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip(), "the block printed nothing"
    if "My name is Tom" in body:  # the last question is what the name was
        assert "Tom" in done.stdout.strip().splitlines()[-1]


@pytest.mark.parametrize("name", ["README.md", "README_KO.md", "ARCHITECTURE.md", "CONTRIBUTING.md"])
def test_every_linked_file_exists(name: str) -> None:
    links = re.findall(r"\]\(([^)#]+)\)", (ROOT / name).read_text(encoding="utf-8"))
    missing = [link for link in links if not link.startswith("http") and not (ROOT / link).exists()]
    assert not missing


def test_architecture_names_files_and_rooms_that_exist() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(kiloq/[\w/.]+|recipes/[\w/.]+)`", text))
    assert len(named) > 20
    assert not [path for path in named if not (ROOT / path).exists()]


def test_the_floor_table_is_the_import_contract() -> None:
    table = re.findall(r"^\| (\d) \| (.+?) \|", (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8"), re.MULTILINE)
    floors = [sorted(re.findall(r"`(\w+)`", rooms)) for _, rooms in table]
    contract = re.search(r"layers = \[\n(.*?)\]", (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.DOTALL)
    assert contract is not None
    lines = re.findall(r'"(.+)"', contract[1])
    # Rooms in parentheses are planned and absent; the table shows what stands.
    assert floors == [sorted(re.findall(r"(?<!\()\b(\w+)\b(?!\))", line)) for line in lines]

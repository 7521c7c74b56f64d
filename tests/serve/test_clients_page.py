"""docs/clients.md: each block that can run here runs against a real server and prints something."""

import re
import subprocess
from pathlib import Path
from typing import Any

import dashscope
import pytest

PAGE = (Path(__file__).parents[2] / "docs" / "clients.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"(?P<mark><!-- not run: [^>]+-->\n)?```(?P<language>\w+)\n(?P<body>.*?)```", re.DOTALL)
RUNNABLE = [(block["language"], block["body"]) for block in BLOCK.finditer(PAGE) if block["mark"] is None]


@pytest.mark.parametrize(("language", "body"), RUNNABLE, ids=[re.sub(r"\W+", " ", body[:40]) for _, body in RUNNABLE])
def test_block_runs(
    language: str, body: str, server: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    body = body.replace("http://localhost:8000", server.url)
    for name in ("base_http_api_url", "api_key"):  # a block may set them for its whole process
        monkeypatch.setattr(dashscope, name, getattr(dashscope, name))
    if language == "bash":
        done = subprocess.run(["bash", "-euo", "pipefail", "-c", body], capture_output=True, text=True, check=True)
        said = done.stdout
        assert '"content":' in said
    else:
        exec(compile(body, "docs/clients.md", "exec"), {})
        said = capsys.readouterr().out
    assert said.strip()
    assert "Paris" in said or "capital" not in body


def test_every_block_is_python_or_bash_or_says_why_it_is_not_run() -> None:
    assert {language for language, _ in RUNNABLE} == {"python", "bash"}
    assert len(RUNNABLE) >= 8

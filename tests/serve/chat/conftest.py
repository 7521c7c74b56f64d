"""Servers of all three prompt formats, and OpenAI's client of each."""

from typing import Any

import openai
import pytest


@pytest.fixture(params=("qwen1", "qwen2.5", "qwen3"))
def url(request: pytest.FixtureRequest, start_server: Any) -> str:
    return str(start_server(request.param).openai)


@pytest.fixture
def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=url, api_key="none", max_retries=0)

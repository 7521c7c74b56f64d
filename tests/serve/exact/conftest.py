"""A server, and the engine itself in this process, both in fp32: there the tokens are the same in any batch."""

from collections.abc import Callable
from typing import Any

import openai
import pytest

from kiloq import LLM
from kiloq.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def server(start_server: Callable[..., Any]) -> Any:
    return start_server("qwen1", "--dtype", "float32")


@pytest.fixture(scope="session")
def client(server: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=server.openai, api_key="none", max_retries=0)


@pytest.fixture(scope="session")
def llm() -> LLM:
    return LLM(dtype="float32")


@pytest.fixture(scope="session")
def tokenizer(llm: LLM) -> Tokenizer:
    return llm.tokenizer

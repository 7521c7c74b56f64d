"""One model for all tests of the bridge."""

from collections.abc import Generator

import pytest

from kiloq import LLM


@pytest.fixture(scope="module")
def loaded() -> LLM:
    return LLM(max_batch=4, max_context=512, dtype="float32", kv_dtype="float32")  # a batch rounds as one row, to 1e-6


@pytest.fixture
def llm(loaded: LLM) -> Generator[LLM]:
    """Its engine has nothing to do, and nothing to tell of an earlier test."""
    yield loaded
    while loaded.engine.has_work:
        loaded.engine.step()

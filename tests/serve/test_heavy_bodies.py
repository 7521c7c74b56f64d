"""Small bodies that would be much work: refused at the door, or done in proportion."""

import json
from collections.abc import Sequence
from typing import Any

import httpx
import pytest

from kiloq.chat import QWEN2_5, Message, ToolCall, render
from kiloq.checkpoint import bundled
from kiloq.tokenizer import Tokenizer

MANY = 30_000


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "user", "content": ""}] * MANY,
        [[]] * MANY,  # each would be an error of its own
        [{"role": "user", "content": [{"type": "text", "text": ""}] * MANY}],
        [{"role": "assistant", "tool_calls": [{"function": {"name": "f"}}] * MANY}],
    ],
)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/tokenize", "/api/v1/tokenizer"])
def test_more_lists_and_objects_than_any_prompt_has_are_refused(server: Any, path: str, messages: object) -> None:
    body = {"model": "Qwen", "messages": messages, "input": {"messages": messages}}
    answer = httpx.post(server.url + path, json=body, timeout=60)
    assert answer.status_code == 400
    assert "lists and objects" in answer.text


def test_brackets_in_a_text_are_only_text(server: Any) -> None:
    content = '[{"' * 20_000 + "\\"
    answer = httpx.post(f"{server.url}/tokenize", json={"model": "Qwen", "prompt": content}, timeout=60)
    assert answer.status_code == 200
    assert answer.json()["count"] > 1000


def test_a_name_that_is_not_known_is_not_repeated_at_length(server: Any) -> None:
    body = {"model": "x" * 100_000, "messages": [{"role": "user", "content": "Hello"}]}
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60)
    assert answer.status_code == 404
    assert len(answer.content) < 1000


def test_an_answer_of_endless_calls_is_looked_for_a_few_times_only() -> None:
    asked = 0

    def recall(_: Sequence[str | int]) -> None:
        nonlocal asked
        asked += 1

    calls = tuple(ToolCall(name="f", arguments=json.dumps({"n": i})) for i in range(1000))
    messages = (Message(role="user", content="Hello"), Message(role="assistant", content="", tool_calls=calls))
    render(messages, Tokenizer.load(bundled()), QWEN2_5, recall=recall)
    assert 0 < asked < 100

"""What the tests of DashScope's API ask a server, and how its events are read."""

import json
from typing import Any

import httpx
from dashscope import Generation

HELLO = [{"role": "user", "content": "Hello, what can you do?"}]
PATH = "/api/v1/services/aigc/text-generation/generation"


def ask(server: Any, **fields: Any) -> Any:
    """Through the client; a list of events if it streams."""
    fields = {"model": "qwen-turbo", "max_tokens": 12, "api_key": "none"} | fields
    if "prompt" not in fields:
        fields = {"messages": HELLO} | fields
    answer = Generation.call(base_address=f"{server.url}/api/v1", **fields)
    return list(answer) if fields.get("stream") else answer


def post(
    server: Any, parameters: dict[str, Any], given: dict[str, Any] | None = None, **headers: str
) -> httpx.Response:
    body = {"model": "qwen-turbo", "input": given or {"messages": HELLO}, "parameters": parameters}
    return httpx.post(server.url + PATH, json=body, headers=headers, timeout=60)


def events_of(text: str) -> list[dict[str, Any]]:
    """The events of a stream, which are in the exact form that the client's parser knows."""
    *blocks, end = text.split("\n\n")
    assert not end
    found = []
    for number, block in enumerate(blocks, 1):
        *head, data = block.split("\n")
        assert head == [f"id:{number}", "event:result", ":HTTP_STATUS/200"]
        found.append(json.loads(data.removeprefix("data:")))
    return found

"""DashScope's streams, whole or in pieces: texts, thoughts, calls, errors; in the exact form that its client parses."""

import asyncio
import json
from collections.abc import Iterator
from http import HTTPStatus
from typing import Any

import dashscope
import pytest
import requests
from dashscope import AioGeneration
from dashscope.common.utils import _handle_stream
from dashscope.v2.errors import DashScopeError
from hypothesis import given, settings
from hypothesis import strategies as st

from kiloq.serve.dashscope_events import error_event, result_event
from kiloq.serve.errors import Problem
from kiloq.serve.http import KEEP_ALIVE
from tests.serve.dashscope_client import HELLO, ask, events_of, post


@pytest.mark.parametrize("result_format", ["text", "message"])
@pytest.mark.parametrize("incremental", [None, True, False])  # False: the client asks for True and joins the pieces
def test_a_stream_ends_with_the_whole_answer(server: Any, result_format: str, incremental: bool | None) -> None:
    whole = ask(server, result_format=result_format)
    events = ask(server, result_format=result_format, stream=True, incremental_output=incremental)

    def said(event: Any) -> tuple[str, str]:
        choice = event.output if result_format == "text" else event.output.choices[0]
        return (choice.text if result_format == "text" else choice.message.content), choice.finish_reason

    texts = [said(event)[0] for event in events]
    joined = "".join(texts) if incremental else texts[-1]
    assert (joined, said(events[-1])[1]) == said(whole)
    assert {said(event)[1] for event in events[:-1]} == {"null"}
    assert {key: events[-1].usage[key] for key in ("input_tokens", "output_tokens", "total_tokens")} == {
        key: whole.usage[key] for key in ("input_tokens", "output_tokens", "total_tokens")
    }


@pytest.mark.parametrize("parameters", [{}, {"incremental_output": True}, {"result_format": "message", "n": 2}])
def test_events_have_the_form_that_the_parser_knows(server: Any, parameters: dict[str, Any]) -> None:
    answer = post(server, {"max_tokens": 200, "ignore_eos": True, **parameters}, **{"X-DashScope-SSE": "enable"})
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = events_of(answer.text)
    assert {event["request_id"] for event in events} == {answer.headers["x-request-id"]}
    output_tokens = [event["usage"]["output_tokens"] for event in events]
    assert output_tokens == sorted(output_tokens)
    assert output_tokens[-1] == 200 > output_tokens[0]


WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Weather now",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CALLS = [("weather", {"city": "Seoul <1>"}), ("weather", {"city": "서울"})]
_HERMES = "".join(
    f"\n<tool_call>\n{json.dumps({'name': name, 'arguments': arguments}, ensure_ascii=False)}\n</tool_call>"
    for name, arguments in CALLS
)
# What the model is made to say; content, thoughts and calls that it means.
SAID = {
    "qwen1": (
        'Thought: I ask.\nAction: weather\nAction Input: {"city": "Seoul <1>"}',
        ("I ask.", "", CALLS[:1]),
    ),
    "qwen2.5": (f"I ask.{_HERMES}", ("I ask.", "", CALLS)),
    "qwen3": (f"<think>\nWho knows?\n</think>\n\nI ask.{_HERMES}", ("I ask.", "Who knows?", CALLS)),
}


def meant(message: Any, finish_reason: str) -> tuple[str, str, list[tuple[str, Any]]]:
    calls = message.get("tool_calls") or []
    assert finish_reason == "tool_calls"
    assert len({call["id"] for call in calls}) == len(calls)
    assert [call["index"] for call in calls] == list(range(len(calls)))
    read = [(call["function"]["name"], json.loads(call["function"]["arguments"])) for call in calls]
    return message["content"], message.get("reasoning_content") or "", read


@pytest.mark.parametrize("generation", SAID)
@pytest.mark.parametrize("incremental", [None, False])  # joined by the server; by the client
def test_calls_and_thoughts_arrive_whole_or_joined(
    start_server: Any, generation: str, incremental: bool | None
) -> None:
    text, expected = SAID[generation]
    fields = {"tools": [WEATHER], "guided_choice": [text], "max_tokens": None}
    server = start_server(generation)
    (choice,) = ask(server, **fields).output.choices
    assert meant(choice.message, choice.finish_reason) == expected
    *_, last = ask(server, stream=True, incremental_output=incremental, **fields)
    (choice,) = last.output.choices
    assert meant(choice.message, choice.finish_reason) == expected
    if generation == "qwen3":
        assert 0 < last.usage["output_tokens_details"]["reasoning_tokens"] < last.usage.output_tokens


def test_only_the_first_piece_of_a_call_has_its_name(start_server: Any) -> None:
    text, (_, _, calls) = SAID["qwen2.5"]
    fields = {"tools": [WEATHER], "guided_choice": [text], "max_tokens": None, "incremental_output": True}
    events = events_of(post(start_server("qwen2.5"), fields, **{"X-DashScope-SSE": "enable"}).text)
    pieces = [call for event in events for call in event["output"]["choices"][0]["message"].get("tool_calls", ())]
    for index, (name, arguments) in enumerate(calls):
        first, *rest = [piece for piece in pieces if piece["index"] == index]
        assert (first["type"], first["function"]["name"]) == ("function", name)
        assert first["id"]
        assert not any(piece["id"] or "name" in piece["function"] for piece in rest)
        joined = "".join(piece["function"]["arguments"] for piece in (first, *rest))
        assert json.loads(joined) == arguments


def test_a_tools_result_is_read_in_the_next_round(start_server: Any) -> None:
    server = start_server("qwen2.5")
    fields = {"tools": [WEATHER], "guided_choice": [SAID["qwen2.5"][0]], "max_tokens": None}
    message = ask(server, **fields).output.choices[0].message
    results = [
        {"role": "tool", "content": "Rain.", "tool_call_id": call["id"], "name": "weather"}
        for call in message["tool_calls"]
    ]
    answer = ask(server, messages=[*HELLO, dict(message), *results], tools=[WEATHER], tool_choice="none")
    assert answer.status_code == HTTPStatus.OK
    assert answer.output.choices[0].finish_reason in ("stop", "length")


@settings(deadline=None)
@given(cuts=st.lists(st.integers(0, 10_000), max_size=30))
def test_the_clients_parser_reads_any_chunking(cuts: list[int]) -> None:
    bodies: list[dict[str, object]] = [{"output": {"text": text}} for text in ("a\u2028b", "데이터:\r\n\n", "data:{}")]
    problem = Problem(status=503, message="busy\n\ndata: {}")
    stream = b"".join(
        [result_event(1, bodies[0]), KEEP_ALIVE, result_event(2, bodies[1]), result_event(3, bodies[2])]
    ) + error_event(problem, "r1")
    ends = sorted({min(cut, len(stream)) for cut in cuts} | {len(stream)})
    response = requests.Response()
    response.raw = Pieces([stream[a:b] for a, b in zip([0, *ends], ends, strict=False)])
    # The parser hands out one object again and again.
    *results, (is_error, status, error) = [(*kind, event.data) for *kind, event in _handle_stream(response)]
    assert [json.loads(data) for _, _, data in results] == bodies
    assert (is_error, status) == (True, 503)
    assert json.loads(error) == {"code": "ServiceUnavailable", "message": problem.message, "request_id": "r1"}


class Pieces:
    """A body that arrives in these pieces."""

    def __init__(self, pieces: list[bytes]) -> None:
        self._pieces = pieces

    def stream(self, *_: object, **__: object) -> Iterator[bytes]:
        yield from self._pieces


def test_a_stream_that_fails_midway_ends_with_an_error_event(start_server: Any) -> None:
    server = start_server("qwen1", "--request-timeout", "0.3")
    fields = {"max_tokens": 8000, "ignore_eos": True, "stream": True}
    *events, last = ask(server, **fields)
    assert {event.status_code for event in events} == {HTTPStatus.OK}
    assert (last.status_code, last.code) == (504, "GatewayTimeout")
    assert ask(server, max_tokens=8000, ignore_eos=True).code == "GatewayTimeout"

    async def final() -> Any:
        place = {"base_address": f"{server.url}/api/v1", "api_key": "none"}
        async for event in await AioGeneration.call("qwen-turbo", messages=HELLO, **fields, **place):
            last = event
        await dashscope.close_shared_aio_session()
        return last

    assert asyncio.run(final()).code == "GatewayTimeout"
    with pytest.raises(DashScopeError, match="not done within"):
        list(
            dashscope.Client(base_url=f"{server.url}/api/v1", api_key="none").chat.completions.create(
                model="qwen-turbo", messages=HELLO, stream=True, parameters={"ignore_eos": True}
            )
        )

"""/v1/responses as OpenAI's client reads it: every event and response is held strictly to the client's own types."""

import json
import typing
from collections.abc import Callable, Iterator
from typing import Annotated, Any

import httpx
import openai
import pydantic
import pytest
from openai.types import responses as types

from kiloq.chat import Delta
from kiloq.serve.errors import Problem
from kiloq.serve.responses_events import ResponseWriter

EVENTS = {
    typing.get_args(one.model_fields["type"].annotation)[0]: one
    for one in typing.get_args(typing.get_args(types.ResponseStreamEvent)[0])
}
WEATHER: Any = {
    "type": "function",
    "name": "get_weather",
    "description": "Weather of a city",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string"}},
        "required": ["city"],
        "additionalProperties": False,
    },
    "strict": True,
}
TEXT_ORDER = [
    "response.created",
    "response.in_progress",
    "response.output_item.added",
    "response.content_part.added",
    "response.output_text.delta",
    "response.output_text.done",
    "response.content_part.done",
    "response.output_item.done",
    "response.completed",
]
CALL = '<tool_call>\n{{"name": "get_weather", "arguments": {{"city": "{}"}}}}\n</tool_call>'


@pytest.fixture(params=["qwen1", "qwen2.5", "qwen3"])
def client(request: pytest.FixtureRequest, start_server: Callable[..., Any]) -> openai.OpenAI:
    return _client(start_server(request.param))


@pytest.fixture(scope="module")
def qwen2_5(start_server: Callable[..., Any]) -> openai.OpenAI:
    return _client(start_server("qwen2.5"))


@pytest.fixture(scope="module")
def qwen3(start_server: Callable[..., Any]) -> openai.OpenAI:
    return _client(start_server("qwen3"))


def _client(server: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=server.openai, api_key="none", max_retries=0)


def _says(*texts: str) -> dict[str, Any]:
    """The rest of a request whose answer is known."""
    return {"temperature": 0, "extra_body": {"guided_choice": list(texts)}}


def _create(client: openai.OpenAI, **asked: Any) -> types.Response:
    """A whole response, held to its type."""
    raw = client.responses.with_raw_response.create(model="Qwen", **asked)
    _check(types.Response, json.loads(raw.text))
    return raw.parse()


def _stream(client: openai.OpenAI, **asked: Any) -> list[dict[str, Any]]:
    """All events as they are on the wire, each held to its type."""
    body = {"model": "Qwen", "stream": True, **asked, **asked.pop("extra_body", {})}
    body.pop("extra_body", None)
    events = []
    with httpx.stream("POST", f"{client.base_url}responses", json=body, timeout=60, trust_env=False) as answer:
        assert answer.status_code == 200, answer.read()
        for block in answer.read().decode().removesuffix("\n\n").split("\n\n"):
            head, data = block.split("\n")
            event = json.loads(data.removeprefix("data: "))
            assert head == f"event: {event['type']}"
            _check(EVENTS[event["type"]], event)
            events.append(event)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    return events


def _check(model: Any, raw: dict[str, Any]) -> None:
    """Strictly of the type, and without a field that the type does not have."""
    assert not list(_unknown(model.model_validate(raw, strict=True), model.__name__))


def _unknown(value: Any, where: str) -> Iterator[str]:
    if isinstance(value, pydantic.BaseModel):
        yield from (f"{where}.{name}" for name in value.model_extra or {})
        for name in type(value).model_fields:
            yield from _unknown(getattr(value, name), f"{where}.{name}")
    elif isinstance(value, list):
        for i, one in enumerate(value):
            yield from _unknown(one, f"{where}[{i}]")


def _kinds(events: list[dict[str, Any]]) -> list[str]:
    """Types of events in their order; deltas of one text count once."""
    kinds = [event["type"] for event in events]
    return [kind for i, kind in enumerate(kinds) if not kind.endswith(".delta") or i == 0 or kinds[i - 1] != kind]


def _without_ids(response: dict[str, Any]) -> dict[str, Any]:
    hidden = ("id", "call_id", "created_at", "completed_at", "cached_tokens")
    return {
        key: [_without_ids(one) if isinstance(one, dict) else one for one in value]
        if isinstance(value, list)
        else _without_ids(value)
        if isinstance(value, dict)
        else value
        for key, value in response.items()
        if key not in hidden
    }


def test_a_text_comes_in_the_order_of_the_specification(client: openai.OpenAI) -> None:
    events = _stream(client, input="Hello", **_says("Hello, world"))
    assert _kinds(events) == TEXT_ORDER
    deltas = [event["delta"] for event in events if event["type"] == "response.output_text.delta"]
    assert "".join(deltas) == "Hello, world"
    assert len(deltas) > 1
    done = events[-1]["response"]
    assert done["output"] == [events[-2]["item"]]
    assert done["status"] == done["output"][0]["status"] == "completed"
    assert done["completed_at"] >= done["created_at"]


@pytest.mark.parametrize("more", [{}, {"max_output_tokens": 3}, {"top_logprobs": 2}], ids=str)
def test_a_stream_ends_with_the_response_that_comes_without_one(client: openai.OpenAI, more: dict[str, Any]) -> None:
    asked: dict[str, Any] = {"input": "Hello", "instructions": "Be kind.", **_says("Hello 世界 🙂"), **more}
    whole = _create(client, **asked)
    events = _stream(client, **asked)
    assert _without_ids(events[-1]["response"]) == _without_ids(json.loads(whole.to_json(exclude_unset=True)))
    assert events[-1]["type"] == f"response.{whole.status}"
    assert {event["response"]["id"] for event in events if "response" in event} == {events[-1]["response"]["id"]}


def test_a_response_that_is_cut_off_is_incomplete(client: openai.OpenAI) -> None:
    response = _create(client, input="Hello", max_output_tokens=2, **_says("One two three four five six seven"))
    assert response.status == "incomplete"
    assert response.incomplete_details is not None
    assert response.incomplete_details.reason == "max_output_tokens"
    assert response.output[0].status == "incomplete"
    assert response.usage is not None
    assert response.usage.output_tokens == 2


def test_log_probabilities_come_with_the_text(qwen2_5: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"input": "Hello", "include": ["message.output_text.logprobs"], "top_logprobs": 3}
    events = _stream(qwen2_5, **asked, **_says("Hello, world"))
    done = next(event for event in events if event["type"] == "response.output_text.done")
    assert "".join(one["token"] for one in done["logprobs"]) == "Hello, world"
    assert all(len(one["top_logprobs"]) == 3 for one in done["logprobs"])
    deltas = [one for event in events if event["type"].endswith("text.delta") for one in event["logprobs"]]
    assert deltas == done["logprobs"]
    whole = events[-1]["response"]["output"][0]["content"][0]["logprobs"]
    assert [(one["token"], one["logprob"]) for one in whole] == [(one["token"], one["logprob"]) for one in deltas]
    assert bytes(byte for one in whole for byte in one["bytes"]) == b"Hello, world"


def test_a_function_call_streams_its_arguments(qwen2_5: openai.OpenAI) -> None:
    events = _stream(qwen2_5, input="Weather?", tools=[WEATHER], **_says(CALL.format("Paris")))
    assert _kinds(events) == [
        *TEXT_ORDER[:3],
        "response.function_call_arguments.delta",
        "response.function_call_arguments.done",
        *TEXT_ORDER[-2:],
    ]
    item = events[-1]["response"]["output"][0]
    assert (item["type"], item["name"], item["status"]) == ("function_call", "get_weather", "completed")
    arguments = "".join(event["delta"] for event in events if event["type"].endswith("arguments.delta"))
    assert json.loads(arguments) == {"city": "Paris"}
    assert item["arguments"] == arguments


def test_calls_after_a_text_are_items_of_their_own(qwen2_5: openai.OpenAI) -> None:
    answer = "I look.\n" + "\n".join(CALL.format(city) for city in ("Paris", "서울"))
    asked: dict[str, Any] = {"input": "Weather?", "tools": [WEATHER], **_says(answer)}
    events, whole = _stream(qwen2_5, **asked), _create(qwen2_5, **asked)
    output = events[-1]["response"]["output"]
    assert [item["type"] for item in output] == ["message", "function_call", "function_call"]
    assert [json.loads(item["arguments"])["city"] for item in output[1:]] == ["Paris", "서울"]
    assert len({item["call_id"] for item in output[1:]}) == len({item["id"] for item in output[1:]}) == 2
    assert [event["output_index"] for event in events if event["type"] == "response.output_item.done"] == [0, 1, 2]
    assert [item.type for item in whole.output] == [item["type"] for item in output]


def test_v1s_actions_are_function_calls(start_server: Callable[..., Any]) -> None:
    client = _client(start_server("qwen1"))
    answer = 'Thought: I look.\nAction: get_weather\nAction Input: {"city": "Paris"}\nObservation:'
    asked: dict[str, Any] = {"input": "Weather?", "tools": [WEATHER], **_says(answer)}
    events, whole = _stream(client, **asked), _create(client, **asked)
    said, call = events[-1]["response"]["output"]
    assert said["content"][0]["text"] == "I look."
    assert json.loads(call["arguments"]) == {"city": "Paris"}
    assert [item.type for item in whole.output] == ["message", "function_call"]


@pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "get_weather"}], ids=str)
def test_a_call_that_is_required_is_made(client: openai.OpenAI, choice: Any) -> None:
    asked: dict[str, Any] = {"input": "Hello", "tools": [WEATHER], "tool_choice": choice, "max_output_tokens": 120}
    response = _create(client, temperature=0, reasoning={"effort": "none"}, **asked)
    if response.status == "completed":  # a small model may write a long name
        calls = [item for item in response.output if item.type == "function_call"]
        assert calls
        assert all(set(json.loads(call.arguments)) == {"city"} for call in calls)


def test_tools_across_two_turns(qwen2_5: openai.OpenAI) -> None:
    asked: Any = [{"role": "user", "content": "What is the weather in Paris?"}]
    first = _create(qwen2_5, input=asked, tools=[WEATHER], **_says(CALL.format("Paris")))
    call = first.output[0]
    assert call.type == "function_call"
    result: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "Sunny, 21 degrees."}
    items = [*asked, *(item.to_dict() for item in first.output), result]
    second = _create(qwen2_5, input=items, tools=[WEATHER], **_says("It is sunny."))
    assert second.output_text == "It is sunny."
    # The same conversation in the words of chat completions has the same prompt.
    spoken = [
        *asked,
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {"id": "c", "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            ],
        },
        {"role": "tool", "tool_call_id": "c", "content": "Sunny, 21 degrees."},
    ]
    told = {key: value for key, value in WEATHER.items() if key != "type"}
    body = {"messages": spoken, "tools": [{"type": "function", "function": told}]}
    assert second.usage is not None
    assert second.usage.input_tokens == _count(qwen2_5, body)
    assert second.usage.input_tokens_details.cached_tokens > 0


def test_thoughts_are_a_reasoning_item_before_the_message(qwen3: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"input": "1+1?", **_says("<think>\nOne and one.\n</think>\n\nTwo")}
    events = _stream(qwen3, **asked)
    reasoning = [name.replace("output_text", "reasoning_text") for name in TEXT_ORDER[2:-1]]
    assert _kinds(events) == [*TEXT_ORDER[:2], *reasoning, *TEXT_ORDER[2:]]
    thought, message = events[-1]["response"]["output"]
    assert thought["content"] == [{"type": "reasoning_text", "text": "One and one."}]
    assert message["content"][0]["text"] == "Two"
    usage = events[-1]["response"]["usage"]
    assert 0 < usage["output_tokens_details"]["reasoning_tokens"] < usage["output_tokens"]
    again = _create(
        qwen3, input=[{"role": "user", "content": "1+1?"}, thought, message, {"role": "user", "content": "?"}]
    )
    assert again.status in ("completed", "incomplete")


def test_effort_none_switches_thinking_off(qwen3: openai.OpenAI) -> None:
    thinks = _create(qwen3, input="Hi", max_output_tokens=1)
    does_not = _create(qwen3, input="Hi", max_output_tokens=1, reasoning={"effort": "none"})
    assert thinks.usage is not None
    assert does_not.usage is not None
    # The published template closes an empty thought in the prompt.
    assert does_not.usage.input_tokens > thinks.usage.input_tokens


def test_a_response_that_fails_on_its_way_says_so_in_its_last_event() -> None:
    writer = ResponseWriter({"id": "resp_1", "object": "response", "created_at": 1, "model": "m", "error": None,
                             "parallel_tool_calls": True, "tool_choice": "auto", "tools": []})  # fmt: skip
    events = [*writer.begin(), *writer.write(Delta(reasoning="Hm"), []), *writer.write(Delta(content="Hel"), [])]
    events += writer.fail(Problem(status=500, message="The server failed; its log says why."))
    for event in events:
        _check(EVENTS[event["type"]], event)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    failed = types.ResponseFailedEvent.model_validate(events[-1]).response
    assert failed.status == "failed"
    assert failed.error is not None
    assert "log" in failed.error.message
    assert [item.type for item in failed.output] == ["reasoning", "message"]


class Person(pydantic.BaseModel):
    """What the model is to fill in, and soon has."""

    name: Annotated[str, pydantic.Field(max_length=12)]
    age: Annotated[int, pydantic.Field(ge=0, le=120)]
    tags: Annotated[list[Annotated[str, pydantic.Field(max_length=12)]], pydantic.Field(max_length=2)]


def test_the_clients_own_parser_gets_an_object_of_its_class(client: openai.OpenAI) -> None:
    parsed = client.responses.parse(
        model="Qwen",
        input="A person, please.",
        text_format=Person,
        temperature=0,
        max_output_tokens=400,
        reasoning={"effort": "none"},
    )
    assert parsed.status == "completed"
    assert isinstance(parsed.output_parsed, Person)


def test_the_clients_own_stream_puts_the_response_together(qwen2_5: openai.OpenAI) -> None:
    with qwen2_5.responses.stream(
        model="Qwen", input="Weather?", tools=[WEATHER], **_says("Let me see.\n" + CALL.format("Rome"))
    ) as stream:
        snapshots = [event.snapshot for event in stream if event.type == "response.output_text.delta"]
        final = stream.get_final_response()
    assert snapshots[-1].strip() == final.output_text.strip() == "Let me see."
    assert final.output[1].type == "function_call"
    assert final.output[1].parsed_arguments == {"city": "Rome"}


def test_json_objects_and_schemas_are_held(client: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"ok": {"type": "boolean"}},
        "required": ["ok"],
        "additionalProperties": False,
    }
    form: Any = {"format": {"type": "json_schema", "name": "answer", "schema": schema, "strict": True}}
    answer = _create(
        client, input="Is it so?", text=form, temperature=0, max_output_tokens=60, reasoning={"effort": "none"}
    )
    assert answer.text is not None
    assert set(json.loads(answer.output_text)) == {"ok"}
    assert answer.text.format.type == "json_schema"


@pytest.mark.parametrize(
    ("items", "messages"),
    [
        ("Hi", [{"role": "user", "content": "Hi"}]),
        ([{"role": "user", "content": [{"type": "input_text", "text": "Hi"}]}], [{"role": "user", "content": "Hi"}]),
        (
            [
                {"type": "message", "role": "developer", "content": "Short."},
                {"role": "user", "content": "Hi"},
                {"role": "assistant", "content": [{"type": "output_text", "text": "Yes", "annotations": []}]},
                {"role": "user", "content": "Why?"},
            ],
            [
                {"role": "system", "content": "Short."},
                {"role": "user", "content": "Hi"},
                {"role": "assistant", "content": "Yes"},
                {"role": "user", "content": "Why?"},
            ],
        ),
    ],
)
def test_items_make_the_prompt_of_the_same_messages(client: openai.OpenAI, items: Any, messages: Any) -> None:
    response = _create(client, input=items, max_output_tokens=1)
    assert response.usage is not None
    assert response.usage.input_tokens == _count(client, {"messages": messages})


def test_instructions_are_the_system_message(client: openai.OpenAI) -> None:
    items: Any = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
    response = _create(client, input=items, instructions="Be short.", max_output_tokens=1)
    messages = [{"role": "system", "content": "Be short.\n\nBe kind."}, items[1]]
    assert response.usage is not None
    assert response.usage.input_tokens == _count(client, {"messages": messages})
    assert response.instructions == "Be short."


def test_fields_without_effect_are_accepted_and_told(qwen2_5: openai.OpenAI) -> None:
    response = _create(
        qwen2_5, input="Hi", max_output_tokens=1, store=True, metadata={"a": "b"}, truncation="auto",
        include=["reasoning.encrypted_content"], service_tier="auto", parallel_tool_calls=False, top_p=0.5,
        temperature=1,
    )  # fmt: skip
    assert response.metadata == {"a": "b"}
    assert (response.top_p, response.temperature) == (0.5, 1)
    assert response.parallel_tool_calls is False
    assert response.model == "Qwen"


def _user(content: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": content}]


MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({}, "input"),
    ({"input": None}, "input"),
    ({"input": []}, "input"),
    ({"input": 7}, "input"),
    ({"input": ["Hi"]}, "input[0]"),
    ({"input": [{"role": "nobody", "content": "Hi"}]}, "input[0].role"),
    ({"input": [{"role": "user"}]}, "input[0].content"),
    ({"input": _user([{"type": "input_image", "image_url": "x"}])}, "input[0].content[0].type"),
    ({"input": _user([{"type": "input_text"}])}, "input[0].content[0].text"),
    ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type"),
    ({"input": [{"type": "function_call_output", "call_id": "x", "output": "1"}]}, "input[0].call_id"),
    ({"input": [{"type": "function_call", "call_id": "x", "name": "f", "arguments": {}}]}, "input[0].arguments"),
    ({"input": "Hi", "previous_response_id": "resp_1"}, "previous_response_id"),
    ({"input": "Hi", "conversation": "conv_1"}, "conversation"),
    ({"input": "Hi", "background": True}, "background"),
    ({"input": "Hi", "prompt": {"id": "p"}}, "prompt"),
    ({"input": "Hi", "tools": [{"type": "web_search"}]}, "web_search"),
    ({"input": "Hi", "tools": [{"type": "function"}]}, "tools[0].name"),
    ({"input": "Hi", "tools": [WEATHER, WEATHER]}, "tools[1].name"),
    ({"input": "Hi", "tool_choice": "required"}, "tool_choice"),
    ({"input": "Hi", "tools": [WEATHER], "tool_choice": {"type": "function", "name": "f"}}, "tool_choice"),
    ({"input": "Hi", "tools": [WEATHER], "tool_choice": {"type": "allowed_tools"}}, "tool_choice"),
    ({"input": "Hi", "tool_choice": "maybe"}, "tool_choice"),
    ({"input": "Hi", "max_output_tokens": 0}, "max_output_tokens"),
    ({"input": "Hi", "max_output_tokens": -(10**30)}, "max_output_tokens"),
    ({"input": "Hi", "n": 2}, "n is 2"),
    ({"input": "Hi", "top_logprobs": 21}, "top_logprobs"),
    ({"input": "Hi", "temperature": 3}, "temperature"),
    ({"input": "Hi", "truncation": "some"}, "truncation"),
    ({"input": "Hi", "text": {"format": {"type": "json_schema"}}}, "text.format"),
    ({"input": "Hi", "text": {"format": {"type": "xml"}}}, "text.format"),
    ({"input": "Hi", "text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": 5}}}}, "text.format"),
    ({"input": "Hi", "tools": [{**WEATHER, "parameters": {"$ref": "#/none"}}]}, "tools: "),
    ({"input": "Hi", "guided_regex": "("}, "guided_regex"),
    ({"input": "Hi", "reasoning": {"effort": "huge"}}, "reasoning.effort"),
    ({"input": "Hi", "metadata": {"a": 1}}, "metadata"),
    ({"input": "long " * 20_000}, "maximum context length"),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("body", "named"), MISTAKES, ids=[json.dumps(body)[:50] for body, _ in MISTAKES])
def test_a_mistake_is_a_400_that_names_its_field(server: Any, body: dict[str, Any], named: str, stream: bool) -> None:
    body = {"model": "Qwen", "stream": stream, **body}
    answer = httpx.post(f"{server.openai}/responses", json=body, timeout=30, trust_env=False)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert named in error["message"]
    assert error["param"], error


def _count(client: openai.OpenAI, body: dict[str, Any]) -> int:
    url = str(client.base_url).replace("/v1/", "/tokenize")
    count: int = httpx.post(url, json=body, trust_env=False).json()["count"]
    return count

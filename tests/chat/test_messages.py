"""Laws of reading a conversation: every form in use is read, and a mistake is named by its place and field."""

import subprocess
import sys

import pytest

from kiloq.chat import Message, Tool, ToolCall, parse_messages, parse_tools
from kiloq.errors import RequestError


def test_roles_of_other_interfaces_become_ours() -> None:
    raw = [{"role": role, "content": "x"} for role in ("developer", "user", "assistant", "function", "tool")]
    assert [message.role for message in parse_messages(raw)] == ["system", "user", "assistant", "tool", "tool"]


def test_text_parts_are_joined_by_lines() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert parse_messages([{"role": "user", "content": parts}])[0].content == "a\nb"


def test_what_an_assistant_said_may_be_nothing_or_a_refusal() -> None:
    refusal = [{"type": "output_text", "text": "No:"}, {"type": "refusal", "refusal": "I can't."}]
    raw = [{"role": "assistant"}, {"role": "assistant", "content": None}, {"role": "assistant", "content": refusal}]
    assert [message.content for message in parse_messages(raw)] == ["", "", "No:\nI can't."]


def test_tool_calls_and_function_call_are_one_thing() -> None:
    call = {"name": "add", "arguments": '{"a": 1}'}
    new = {"role": "assistant", "content": None, "tool_calls": [{"id": "c1", "type": "function", "function": call}]}
    old = {"role": "assistant", "content": None, "function_call": call}
    assert parse_messages([new])[0].tool_calls == (ToolCall(id="c1", name="add", arguments='{"a": 1}'),)
    assert parse_messages([old])[0].tool_calls == (ToolCall(name="add", arguments='{"a": 1}'),)


def test_arguments_as_an_object_become_json_text() -> None:
    raw = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {"城": "北京"}}}]}
    assert parse_messages([raw])[0].tool_calls[0].arguments == '{"城": "北京"}'


def test_reasoning_is_read_under_both_names() -> None:
    for key in ("reasoning", "reasoning_content"):
        assert parse_messages([{"role": "assistant", "content": "a", key: "because"}])[0].reasoning == "because"


def test_messages_and_tools_pass_through() -> None:
    message, tool = Message(role="user", content="x"), Tool(name="f")
    assert parse_messages([message]) == (message,)
    assert parse_tools([tool]) == (tool,)
    assert parse_tools(None) == ()


def test_tools_are_read_in_all_three_forms() -> None:
    schema = {"type": "object", "properties": {}}
    function = {"name": "f", "description": "d", "parameters": schema}
    qwen = {"name_for_human": "F!", "name_for_model": "f", "description_for_model": "d", "parameters": [{"name": "x"}]}
    wrapped, bare, v1 = parse_tools([{"type": "function", "function": function}, function, qwen])
    assert wrapped.definition == bare.definition == {"type": "function", "function": function}
    assert (wrapped.name, wrapped.description, wrapped.human_name) == ("f", "d", "f")
    assert (v1.name, v1.human_name, v1.parameters) == ("f", "F!", [{"name": "x"}])


def nested(depth: int) -> list[object]:
    inner: list[object] = []
    for _ in range(depth):
        inner = [inner]
    return inner


def call(arguments: object) -> dict[str, object]:
    return {"role": "assistant", "content": None, "tool_calls": [{"name": "f", "arguments": arguments}]}


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        ("hello", "messages is of type str"),
        ([], "empty"),
        (["hi"], r"messages\[0\] is of type str"),
        ([{"content": "x"}], r"messages\[0\].role is None"),
        ([{"role": "king", "content": "x"}], "'king'"),
        ([{"role": "user"}], r"messages\[0\].content is missing"),
        ([{"role": "user", "content": 5}], r"messages\[0\].content is of type int"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], r"content\[0\].type is 'image_url'"),
        ([{"role": "user", "content": [{"type": "text"}]}], r"content\[0\].text is missing"),
        ([{"role": "assistant", "content": None, "tool_calls": "x"}], "tool_calls is of type str"),
        ([{"role": "assistant", "content": None, "tool_calls": [{"function": {}}]}], r"tool_calls\[0\].function.name"),
        ([{"role": "user", "content": "x", "name": 3}], r"messages\[0\].name is of type int"),
        ([call(nested(100_000))], r"tool_calls\[0\].function.arguments .* nested too deeply"),
        ([call({1, 2})], r"tool_calls\[0\].function.arguments .* set"),
    ],
)
def test_a_mistake_is_named_by_place_and_field(raw: object, words: str) -> None:
    with pytest.raises(RequestError, match=words):
        parse_messages(raw)


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        ("f", "tools is of type str"),
        ([{}], r"tools\[0\].name"),
        ([{"type": "custom", "custom": {"name": "f"}}], r"tools\[0\].type is 'custom'"),
        ([3], r"tools\[0\] is of type int"),
        ([{"name": "f", "parameters": nested(100_000)}], r"tools\[0\] .* nested too deeply"),
        ([{"name": "f", "parameters": {"type": str}}], r"tools\[0\] .* type"),
    ],
)
def test_a_mistake_in_a_tool_is_named(raw: object, words: str) -> None:
    with pytest.raises(RequestError, match=words):
        parse_tools(raw)


def test_the_chat_room_imports_no_torch() -> None:
    code = "import kiloq.chat, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

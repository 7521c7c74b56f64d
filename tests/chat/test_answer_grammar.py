"""What a grammar of answers accepts is read as valid calls of known tools, wherever it is cut off."""

import dataclasses
import json
from functools import cache

import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kiloq.chat import Reply, parse_reply, parse_tools
from kiloq.chat.answer_grammar import answer_grammar, json_expression
from kiloq.chat.chatml import QWEN1, QWEN2_5, QWEN3, ChatFormat
from kiloq.chat.messages import Tool
from kiloq.chat.tool_schema import arguments_schema
from kiloq.engine.constrain import Grammars
from kiloq.engine.params import Constraint
from kiloq.errors import RequestError
from kiloq.tokenizer import Tokenizer
from kiloq.tokenizer.vocabulary import Vocabulary, qwen_specials

WEATHER = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer", "minimum": 1}, "unit": {"enum": ["C", "F"]}},
    "required": ["city"],
}
SCHEMAS = {
    "weather": WEATHER,
    "weather_2": {"type": "object", "properties": {"at": {"type": "array", "items": {"type": "number"}}}},
    "날씨": {"type": "object", "properties": {"q": {"type": "string"}}, "required": ["q"]},
    "now": {"type": "object"},
}
TOOLS = parse_tools(
    [
        {"type": "function", "function": {"name": "weather", "parameters": WEATHER}},
        {
            "name": "weather_2",
            "parameters": {
                "type": "dict",
                "properties": {"at": {"type": "tuple", "items": {"type": "float"}}},
                "required": [],
            },
        },
        {
            "name_for_model": "날씨",
            "parameters": [{"name": "q", "description": "question", "required": True, "schema": {"type": "string"}}],
        },
        {"name": "now"},
    ]
)
CONTENT = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}},
    "required": ["ok"],
    "additionalProperties": False,
}
ALWAYS = dataclasses.replace(QWEN3, name="qwen3-thinking", thinking="always")
FORMATS = [QWEN1, QWEN2_5, QWEN3, ALWAYS]
CASES = [
    (fmt, thinking, required, parallel, content)
    for fmt in FORMATS
    for thinking in ((None,) if fmt.thinking != "hybrid" else (None, False))
    for required in (False, True)
    for parallel in (True, False)
    for content in (None, CONTENT)
    if not (required and content)
]
# Those that bring a call forward come first: they are chosen more often.
PIECES = [
    *(
        "<tool_call>",
        "</think>",
        "\nAction:",
        '"',
        "}",
        "]",
        "{",
        "\n</tool_call>",
        "\n<tool_call>",
        "\nFinal Answer: ",
    ),
    *(
        '"city": ',
        '"days": ',
        '"unit": ',
        '"at": ',
        '"q": ',
        '"ok": ',
        "1",
        "true",
        '"C"',
        "weather",
        "_2",
        "날씨",
        "now",
    ),
    *(
        "<think>",
        "[",
        ", ",
        "-",
        ".5",
        '"F"',
        "é",
        "\\n",
        "x",
        '"Seoul"',
        "{}",
        "null",
        '{"name": "',
        '", "arguments": ',
    ),
    *(
        "</tool_call>",
        "\n",
        " ",
        "hm",
        "<",
        "Thought: a",
        "\nAction Input:",
        "\nObservation:",
        '"</tool_call>"',
        '"x": ',
    ),
]


@cache
def grammars() -> Grammars:
    """One token per byte, so that every cut of a text is a cut between tokens."""
    ranks = {bytes([byte]): byte for byte in range(256)}
    return Grammars(Tokenizer(Vocabulary(name="bytes", ranks=ranks, special=qwen_specials(256))), 464)


class Writer:
    """Text under a grammar, piece by piece."""

    def __init__(self, grammar: str) -> None:
        self._matcher = grammars().compile(Constraint("lark", grammar)).beginning.deep_copy()
        self.text = ""

    def takes(self, piece: str) -> bool:
        return self._matcher.validate_tokens([*piece.encode()]) == len(piece.encode())

    def write(self, piece: str) -> None:
        assert self._matcher.consume_tokens([*piece.encode()])
        self.text += piece

    def go_on(self, choice: int) -> bool:
        """Write one of the pieces that fit, and then what can only follow; whether there was one."""
        fitting = [piece for piece in PIECES if self.takes(piece)]
        if not fitting:
            return False
        self.write(fitting[min(choice % len(fitting), choice // 256 % len(fitting))])
        self.write(self._matcher.compute_ff_bytes().decode())
        return True

    @property
    def may_end(self) -> bool:
        return self._matcher.is_accepting()


def accepts(grammar: str, text: str) -> bool:
    writer = Writer(grammar)
    if not writer.takes(text):
        return False
    writer.write(text)
    return writer.may_end


def check(reply: Reply, whole: Reply) -> None:
    """No call that is complete differs from what the whole answer calls."""
    for i, call in enumerate(reply.tool_calls):
        assert call.name == whole.tool_calls[i].name
        assert whole.tool_calls[i].arguments.startswith(call.arguments)
        try:
            json.loads(call.arguments)
        except ValueError:
            continue
        assert call.arguments == whole.tool_calls[i].arguments


def grammar_of(fmt, thinking, required, parallel, content) -> str:
    """Of one of the cases."""
    grammar = answer_grammar(
        fmt,
        tools=TOOLS,
        required=required,
        parallel=parallel,
        thinking=thinking,
        content=json_expression(content) if content else None,
    )
    assert grammar is not None
    return grammar


@pytest.mark.parametrize(("fmt", "thinking", "required", "parallel", "content"), CASES)
@settings(max_examples=60)
@given(st.lists(st.integers(0, 2**16), max_size=40))
def test_what_is_accepted_is_read_as_valid_calls_of_known_tools(fmt, thinking, required, parallel, content, choices):
    grammar = grammar_of(fmt, thinking, required, parallel, content)
    writer = Writer(grammar)
    for choice in choices:
        if not writer.go_on(choice):
            break
        if writer.may_end:
            reply = parse_reply(writer.text, fmt, tools=True, thinking=thinking)
            for call in reply.tool_calls:
                jsonschema.validate(json.loads(call.arguments), SCHEMAS[call.name])
            assert bool(reply.tool_calls) or not required
            assert len(reply.tool_calls) <= 1 or parallel
            if content and not reply.tool_calls:
                jsonschema.validate(json.loads(reply.content), content)
    whole = parse_reply(writer.text, fmt, tools=True, thinking=thinking)
    for end in range(len(writer.text)):
        check(parse_reply(writer.text[:end], fmt, tools=True, thinking=thinking), whole)


@pytest.mark.parametrize(("fmt", "thinking", "required", "parallel", "content"), CASES)
@settings(max_examples=30)
@given(st.lists(st.integers(0, 2**16), max_size=40))
def test_what_is_remembered_of_free_text_is_what_the_grammar_says(fmt, thinking, required, parallel, content, choices):
    grammar = grammar_of(fmt, thinking, required, parallel, content)
    writer, matcher = Writer(grammar), grammars().matcher(Constraint("lark", grammar), ())
    for choice in choices:
        before = len(writer.text.encode())
        if not writer.go_on(choice):
            break
        for byte in writer.text.encode()[before:]:
            matcher.accept(byte)
            truth = np.unpackbits(np.frombuffer(matcher._matcher.compute_bitmask(), np.uint8), bitorder="little")
            remembered = np.unpackbits(np.frombuffer(matcher._bits(), np.uint8), bitorder="little")
            assert np.array_equal(truth, remembered), writer.text


def test_most_of_free_text_is_remembered():
    grammar = answer_grammar(QWEN3, tools=TOOLS)
    matcher = grammars().matcher(Constraint("lark", grammar), ())
    text = "<think>\na < b, 가나\n</think>\n\nHello <b>you</b>.\n" * 3
    for byte in text.encode():
        matcher.accept(byte)
    assert not matcher.is_over
    assert len(grammars().compile(Constraint("lark", grammar)).bits) < 0.5 * len(text)


CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Seoul", "days": 2}}\n</tool_call>'
NOW = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
ACTION = '\nAction: weather\nAction Input: {"city": "Seoul"}'


@pytest.mark.parametrize(
    ("fmt", "wishes", "yes", "no"),
    [
        (
            QWEN2_5,
            {},
            ["", "hi", CALL, f"Let me see.\n{CALL}\n{NOW}", "a < b </tool_call>"],
            [f"{CALL} so", "<tool_call>", f"{CALL}hi"],
        ),
        (QWEN2_5, {"parallel": False}, [CALL, "hi"], [f"{CALL}\n{NOW}"]),
        (QWEN2_5, {"required": True}, [CALL, f"{CALL}\n{NOW}"], ["", "hi", f"hi\n{CALL}"]),
        (QWEN2_5, {"required": True, "names": ["now"]}, [NOW], [CALL]),
        (QWEN2_5, {"names": ["now"]}, [NOW, "hi"], [CALL]),
        (QWEN2_5, {"content": '"yes" | "no"'}, ["yes", CALL], ["maybe", f"yes\n{CALL}"]),
        (
            QWEN3,
            {},
            ["hi", f"<think>\n<tool_call>?\n</think>\n\n{CALL}", CALL],
            ["<think>hm", "<think>a</think><tool_call>"],
        ),
        (QWEN3, {"required": True}, [f"<think>\nhm\n</think>\n\n{CALL}", CALL], ["<think>\nhm\n</think>\n\nhi"]),
        (QWEN3, {"thinking": False, "required": True}, [CALL], [f"<think></think>{CALL}"]),
        (ALWAYS, {}, [f"hm\n</think>\n\n{CALL}", "hm</think>hi"], ["hm", CALL]),
        (
            QWEN1,
            {},
            ["hi", f"Thought: hm{ACTION}", "Thought: hm\nFinal Answer: 7\nAction: x"],
            [f"{ACTION}\n", "Thought\nAction: x"],
        ),
        (QWEN1, {"required": True}, [f"Thought: hm{ACTION}", f" hm{ACTION}"], ["hi", "Thought: hm\nFinal Answer: 7"]),
        (QWEN1, {}, ["Final Answer: 7"], [f"Final: 7{ACTION}x", "Action: x\nAction Input: {}\nFinal Answer: 7"]),
        (QWEN1, {"may_call": False}, ["hi", "Thought: hm\nFinal Answer: 7"], [f"Thought: hm{ACTION}", ACTION.strip()]),
        (QWEN2_5, {"may_call": False}, ["hi", "<tool_cal"], [CALL, f"hi\n{CALL}", "<tool_call>"]),
        (QWEN1, {"names": ["now"]}, ["Thought:\nAction: now\nAction Input: {}"], [f"Thought: hm{ACTION}"]),
    ],
)
def test_a_format_allows_what_its_models_write_and_no_more(fmt: ChatFormat, wishes, yes, no):
    grammar = answer_grammar(fmt, tools=TOOLS, **wishes)
    assert [text for text in yes if not accepts(grammar, text)] == []
    assert [text for text in no if accepts(grammar, text)] == []


@pytest.mark.parametrize(
    ("fmt", "thinking", "yes", "no"),
    [
        (QWEN1, None, '{"ok": true}', 'Thought: a\nFinal Answer: {"ok": true}'),
        (QWEN2_5, None, '{"ok": true}', "hi"),
        (QWEN3, None, '<think>\nhm {\n</think>\n\n{"ok":false}', "<think>\nhm\n</think>\n\nhi"),
        (QWEN3, False, '{\n  "ok": true\n}', '<think></think>{"ok": true}'),
        (ALWAYS, None, 'hm</think>{"ok": true}', '{"ok": true}'),
    ],
)
def test_content_is_held_to_its_form_behind_a_thought(fmt, thinking, yes, no):
    grammar = answer_grammar(fmt, thinking=thinking, content=json_expression(CONTENT))
    assert accepts(grammar, yes)
    assert not accepts(grammar, no)


def test_without_tools_and_form_an_answer_is_free():
    assert [answer_grammar(fmt, thinking=None) for fmt in FORMATS] == [None] * 4


@pytest.mark.parametrize("fmt", FORMATS)
def test_a_call_that_must_be_and_cannot_is_refused(fmt):
    with pytest.raises(RequestError, match="tomorrow"):
        answer_grammar(fmt, tools=TOOLS, required=True, names=["tomorrow"])
    with pytest.raises(RequestError, match="any tool"):
        answer_grammar(fmt, required=True)


@pytest.mark.parametrize(
    ("parameters", "yes", "no"),
    [
        ({}, "{}", '{"a": 1}'),
        (None, '{"a": 1}', "[]"),
        ("x", '{"a": 1}', "[]"),
        ([], "{}", '{"a": 1}'),
        ({"type": "string"}, "{}", '"a"'),
        ({"type": "OBJECT", "properties": {"a": {"type": "STRING"}}}, '{"a": "b"}', '{"a": 1}'),
        ({"properties": {"a": {"type": "any"}, "b": {"type": ["int", "none"]}}}, '{"a": [], "b": null}', '{"b": "x"}'),
        ({"properties": {"a": {"type": "string", "format": "city", "required": True}}}, '{"a": "b"}', '{"c": 1}'),
        ({"properties": {"a": {"type": "string", "pattern": "^(?!x)[a-z]+$"}}}, '{"a": "xyz"}', '{"a": 1}'),
        ({"properties": {"a": {"type": "string", "pattern": r"(.)\1"}}}, '{"a": "xyz"}', '{"a": 1}'),
        ({"properties": {"a": {"type": "string", "pattern": "^[a-z]+$"}}}, '{"a": "xyz"}', '{"a": "5"}'),
        ({"properties": {"pattern": {"const": "(?=a)"}}, "required": ["pattern"]}, '{"pattern": "(?=a)"}', "{}"),
        ({"properties": {"type": {"type": "str"}}, "required": ["type"]}, '{"type": "dict"}', "{}"),
        ({"properties": {"a": {}}, "required": ["a", "b"]}, '{"a": 1, "b": 2}', '{"a": 1}'),
        ({"properties": {"a": {}}, "additionalProperties": True}, '{"a": 1, "b": 2}', "1"),
        ({"allOf": [{"properties": {"a": {}}}, {"properties": {"b": {}}}]}, '{"a": 1, "b": 2}', "1"),
        ({"$ref": "#/$defs/x", "$defs": {"x": {"properties": {"a": {"const": 1}}}}}, '{"a": 1}', '{"a": 2}'),
        ({"properties": {"a": {"items": {"properties": {"b": {}}}}}}, '{"a": [{"b": 1}]}', '{"a": [{"c": 1}]}'),
    ],
)
def test_parameters_are_read_as_people_write_them(parameters, yes, no):
    grammar = f"start: {json_expression(arguments_schema(Tool(name='f', parameters=parameters)), lenient=True)}"
    assert accepts(grammar, yes)
    assert not accepts(grammar, no)


@pytest.mark.parametrize("name", ['q"\\', "a\nb", "<tool_call>", "x|y", "\ud800", "/*"])
def test_no_name_of_a_tool_breaks_a_grammar(name):
    grammar = answer_grammar(QWEN2_5, tools=[Tool(name=name)], required=True)
    written = json.dumps(name.encode("utf-8", "replace").decode(), ensure_ascii=False)
    assert accepts(grammar, f'<tool_call>\n{{"name": {written}, "arguments": {{}}}}\n</tool_call>')


def test_parameters_nested_beyond_reason_are_refused():
    schema: dict[str, object] = {}
    for _ in range(5000):
        schema = {"items": schema}
    with pytest.raises(RequestError, match="deeply"):
        arguments_schema(Tool(name="f", parameters=schema))

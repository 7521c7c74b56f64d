"""Laws of reading answers: any cut of the text gives the same reply, and no half marker is ever shown."""

import dataclasses
import itertools
import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from kiloq.chat import QWEN1, QWEN2_5, QWEN3, ChatFormat, Delta, Reply, ReplyParser, join, parse_reply

MARKERS = ["<think>", "</think>", "<tool_call>", "</tool_call>"]
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": [1, "}</tool_call>"], "b": {"c": "\\""}}}\n</tool_call>'
DEEP = 100_000 * "["
hermes_texts = st.lists(
    st.sampled_from(
        [
            *MARKERS,
            CALL,
            '{"name": "f", "arguments": ',
            '{"a": 1}',
            "}",
            '{"arguments": {}, "name": "g"}',
            "\n",
            " ",
            "<",
            "<tool",
            "hi",
            "好",
            '"',
            "\\",
        ]
    ),
    max_size=10,
).map("".join)
react_texts = st.lists(
    st.sampled_from(
        [
            *("Thought: ", "\nAction:", "\nAction Input:", "\nObservation:", "\nFinal Answer: "),
            *("Thought:", "Action:", "Action Input:", "Observation:", "Final Answer:"),
            *("\nAction", "\nFinal", "\n", " ", "x", "好", "{}"),
        ]
    ),
    max_size=10,
).map("".join)


def read(text: str, cuts: list[int], fmt: ChatFormat, **prompt: bool | None) -> tuple[Reply, list[Delta]]:
    edges = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    parser = ReplyParser(fmt, new_id=lambda: "id", **prompt)
    deltas = [d for a, b in itertools.pairwise(edges) for d in parser.push(text[a:b])]
    deltas += parser.finish()
    return join(deltas), deltas


cut_lists = st.lists(st.integers(0, 120), max_size=20)


@given(text=hermes_texts, cuts=cut_lists, tools=st.booleans(), thinking=st.sampled_from([None, True, False]))
def test_any_cut_of_a_json_style_answer_gives_the_same_reply(
    text: str, cuts: list[int], tools: bool, thinking: bool | None
) -> None:
    whole, _ = read(text, [], QWEN3, tools=tools, thinking=thinking)
    every, deltas = read(text, list(range(len(text))), QWEN3, tools=tools, thinking=thinking)
    assert read(text, cuts, QWEN3, tools=tools, thinking=thinking)[0] == whole == every
    assert Delta() not in deltas


@given(text=react_texts, cuts=cut_lists)
@example(text="\nAction:f\nAction Input:\nObservation:", cuts=[])
def test_any_cut_of_a_react_answer_gives_what_the_published_server_reads(text: str, cuts: list[int]) -> None:
    whole, _ = read(text, [], QWEN1, tools=True)
    assert read(text, cuts, QWEN1, tools=True)[0] == whole == read(text, list(range(len(text))), QWEN1, tools=True)[0]
    assert (whole.content, [(call.name, call.arguments) for call in whole.tool_calls]) == published(text)


def published(text: str) -> tuple[str, list[tuple[str, str]]]:
    """The server's rule on a whole text; where several markers follow each other, the first complete one decides.

    Other than there, an answer may begin with a marker, and the blank behind a marker may be missing.
    """
    lines = "\n" + text.lstrip()
    action, final = lines.find("\nAction:"), lines.find("\nFinal Answer:")
    given_at = lines.find("\nAction Input:", max(action + 8, 0))
    if 0 <= action < given_at and lines[action + 8 : given_at].strip() and not 0 <= final < given_at:
        end = lines.find("\nObservation:", given_at)
        arguments = lines[given_at + 14 : end if end >= 0 else len(lines)].strip()
        before = lines[:action]
        thought = before.find("Thought:")
        content = before[thought + 8 :] if thought >= 0 else before
        return content.strip(), [(lines[action + 8 : given_at].strip(), arguments)]
    return (lines[final + 14 :].removeprefix(" ") if final >= 0 else text), []


@given(text=st.one_of(hermes_texts, react_texts), cuts=cut_lists, tools=st.booleans(), calls=st.booleans())
def test_content_is_a_piece_of_the_text_at_the_place_it_says(
    text: str, cuts: list[int], tools: bool, calls: bool
) -> None:
    for fmt in (QWEN1, QWEN2_5, QWEN3):
        _, deltas = read(text, cuts, fmt, tools=tools, calls=calls)
        at = 0
        for delta in deltas:
            if delta.content:
                assert delta.start >= at
                at = delta.start + len(delta.content)
                assert text[delta.start : at] == delta.content


@pytest.mark.parametrize(
    ("fmt", "text"),
    [
        (QWEN2_5, '<tool_call>{"name": "f", "arguments": {"a": "}'),
        (QWEN1, 'Action: f\nAction Input: {"a": "}'),
    ],
)
def test_a_call_is_known_to_be_cut_off(fmt: ChatFormat, text: str) -> None:
    parser = ReplyParser(fmt, tools=True)
    assert join(parser.push(text)).tool_calls
    assert parser.in_call
    parser.push('"}')
    assert not parser.in_call


def test_where_no_call_may_be_made_none_is_read() -> None:
    for fmt, text in ((QWEN1, "Thought: x\nAction: f\nAction Input: {}"), (QWEN2_5, CALL)):
        parser = ReplyParser(fmt, tools=True, calls=False)
        assert join([*parser.push(text), *parser.finish()]) == Reply(text, "", ())


def test_a_react_answer_may_begin_with_a_marker() -> None:
    final = parse_reply("Final Answer: 42", QWEN1, tools=True)
    assert (final.content, final.reasoning) == ("42", "")
    call = parse_reply('\nAction: add\nAction Input: {"a": 1}', QWEN1, tools=True)
    assert (call.content, call.tool_calls[0].name, call.tool_calls[0].arguments) == ("", "add", '{"a": 1}')


@given(text=st.text(alphabet="ab <>/\n", max_size=30), cuts=cut_lists)
def test_plain_text_passes_unchanged(text: str, cuts: list[int]) -> None:
    for fmt in (QWEN1, QWEN2_5):
        assert read(text, cuts, fmt)[0] == Reply(text, "", ())
    assert read(text, cuts, QWEN2_5, tools=True)[0] == Reply(text, "", ())


@given(words=st.text(alphabet="ab\n<", max_size=10), cuts=cut_lists)
def test_half_a_marker_is_never_shown(words: str, cuts: list[int]) -> None:
    text = f"<think>\n{words}</think>\n\n{words}{CALL}"
    shown = ""
    parser = ReplyParser(QWEN3, tools=True)
    for char in text:
        for delta in parser.push(char):
            shown += delta.reasoning + delta.content
    assert "<t" not in shown
    assert "</" not in shown


def test_thoughts_content_and_calls_are_taken_apart() -> None:
    reply = parse_reply(f"<think>\nI think.\n</think>\n\nLet me add.\n{CALL}\n{CALL}", QWEN3, tools=True)
    assert (reply.reasoning, reply.content) == ("I think.", "Let me add.")
    assert [call.name for call in reply.tool_calls] == ["add", "add"]
    assert json.loads(reply.tool_calls[0].arguments) == {"a": [1, "}</tool_call>"], "b": {"c": '"'}}
    assert len({call.id for call in reply.tool_calls}) == 2
    assert all(call.id.startswith("call_") for call in reply.tool_calls)


def test_arguments_stream_as_they_come() -> None:
    parser = ReplyParser(QWEN2_5, tools=True, new_id=lambda: "c")
    pieces = ['<tool_call>{"name": "f", "arguments": {"te', 'xt": "lo', 'ng"}}</tool_call>']
    deltas = [[d.call for d in parser.push(piece) if d.call] for piece in pieces]
    assert [(c.id, c.name, c.arguments) for group in deltas for c in group] == [
        ("c", "f", ""),
        ("", "", '{"te'),
        ("", "", 'xt": "lo'),
        ("", "", 'ng"}'),
    ]


@pytest.mark.parametrize(
    ("text", "calls", "content"),
    [
        ('<tool_call>{"name": "f", "arguments": {"a": 1', [("f", '{"a": 1')], ""),
        ('<tool_call>{"name": "f"}</tool_call>', [("f", "{}")], ""),
        ('<tool_call>{"arguments": "{\\"a\\": 1}", "name": "f"}</tool_call>', [("f", '{"a": 1}')], ""),
        ('<tool_call>{"name": "f", "arguments": {"a": 1</tool_call> done', [("f", '{"a": 1')], " done"),
        ("so <tool_call>nonsense</tool_call>", [], "so <tool_call>nonsense</tool_call>"),
        ('<tool_call>{"na', [], '<tool_call>{"na'),
        (f"<tool_call>{DEEP}</tool_call>", [], f"<tool_call>{DEEP}</tool_call>"),
        (f'<tool_call>{{"arguments": {DEEP}', [], f'<tool_call>{{"arguments": {DEEP}'),
    ],
)
def test_calls_that_are_cut_off_or_odd_lose_nothing(text: str, calls: list[tuple[str, str]], content: str) -> None:
    reply = parse_reply(text, QWEN2_5, tools=True)
    assert [(call.name, call.arguments) for call in reply.tool_calls] == calls
    assert reply.content == content


def test_arguments_of_any_depth_are_read_or_are_text() -> None:
    for depth in (*range(800, 1000), 100_000):  # around the depth that json can read but not write
        text = f'<tool_call>{{"arguments": {"[" * depth}{"]" * depth}, "name": "f"}}</tool_call>'
        reply = parse_reply(text, QWEN2_5, tools=True)
        assert reply.content == text or reply.tool_calls[0].arguments == "[" * depth + "]" * depth


def test_calls_are_text_where_no_tools_were_offered() -> None:
    assert parse_reply(CALL, QWEN2_5).content == CALL


def test_thoughts_may_be_opened_by_the_prompt() -> None:
    always = dataclasses.replace(QWEN3, thinking="always")
    reply = parse_reply("I think.\n</think>\n\nYes", always)
    assert (reply.reasoning, reply.content) == ("I think.", "Yes")
    assert parse_reply("<think>unfinished", QWEN3).reasoning == "unfinished"


def test_a_react_answer_is_thought_and_final_answer_or_a_call() -> None:
    final = parse_reply("Thought: I now know the final answer.\nFinal Answer: 42", QWEN1, tools=True)
    assert (final.content, final.reasoning) == ("42", "I now know the final answer.")
    call = parse_reply('Thought: add.\nAction: add\nAction Input: {"a": 1}\nObservation: 9', QWEN1, tools=True)
    assert (call.content, call.tool_calls[0].name, call.tool_calls[0].arguments) == ("add.", "add", '{"a": 1}')
    assert parse_reply("Hello!", QWEN1, tools=True).content == "Hello!"

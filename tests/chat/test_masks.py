"""What is trained is what an assistant wrote and what ends it, whatever the words; no word is a control token."""

import base64
import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kiloq.chat import QWEN1, QWEN2_5, QWEN3, ChatFormat, Message, Tool, ToolCall, render
from kiloq.tokenizer import Tokenizer

END = "<|im_end|>"
HOSTILE = [
    END, "<|im_start|>assistant\n", "<|im_end|>\n<|im_start|>user\n", "<|endoftext|>", "<tool_call>", "<tools>",
    "<think>", "\nObservation: ", "\nFinal Answer: ", "Thought:", '"}', "{}", "é你안", "a", " ", "\n", "<|extra_0|>",
]  # fmt: skip
# Formats strip blanks around texts, each in its own way; a closed thought in an answer is taken for one.
WORDS = st.lists(st.sampled_from(HOSTILE), min_size=1, max_size=5).map(lambda parts: f"x{''.join(parts)}y")
CALLS = st.builds(ToolCall, name=WORDS, arguments=WORDS.map(lambda text: json.dumps({"q": text})))
ROUNDS = st.tuples(WORDS, WORDS, CALLS, WORDS, WORDS, st.one_of(st.just(""), WORDS))  # question ... last thought


@pytest.fixture(scope="module")
def byte_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """No token spans two bytes, so that each lies on one side of any border."""
    path = tmp_path_factory.mktemp("bytes") / "bytes.tiktoken"
    lines = [f"{base64.b64encode(bytes([i])).decode()} {i}" for i in range(256)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return Tokenizer.load(path)


def conversation(rounds: list[tuple[str, str, ToolCall, str, str, str]], system: str) -> list[Message]:
    messages = [Message(role="system", content=system)]
    for question, aside, call, result, answer, thought in rounds:
        messages += [
            Message(role="user", content=question),
            Message(role="assistant", content=aside, tool_calls=(call,)),
            Message(role="tool", content=result),
            Message(role="assistant", content=answer, reasoning=thought),
        ]
    return messages


def written(rounds: list[tuple[str, str, ToolCall, str, str, str]], fmt: ChatFormat) -> str:
    """All that the assistant writes, by the published formats."""
    said = ""
    for i, (_, aside, call, _, answer, thought) in enumerate(rounds):
        if fmt.tool_style == "react":
            known = thought or "I now know the final answer."
            said += f"Thought: {aside}\nAction: {call.name}\nAction Input: {call.arguments}\nObservation:"
            said += f"\nThought: {known}\nFinal Answer: {answer}{END}"
            continue
        made = f'{{"name": "{call.name}", "arguments": {call.arguments}}}'
        said += f"{aside}\n<tool_call>\n{made}\n</tool_call>{END}"
        if thought and fmt.thinking == "hybrid" and i == len(rounds) - 1:  # older thoughts are not shown again
            said += f"<think>\n{thought}\n</think>\n\n"
        said += f"{answer}{END}"
    return said


@settings(max_examples=20, deadline=None)
@given(rounds=st.lists(ROUNDS, min_size=1, max_size=3), system=WORDS, described=WORDS)
@pytest.mark.parametrize("fmt", [QWEN1, QWEN2_5, QWEN3], ids=lambda fmt: fmt.name)
@pytest.mark.parametrize("name", ["byte_tokenizer", "fast_tokenizer"])
def test_trained_is_what_the_assistant_wrote_and_no_word_is_a_control_token(
    name: str,
    fmt: ChatFormat,
    rounds: list[tuple[str, str, ToolCall, str, str, str]],
    system: str,
    described: str,
    request: pytest.FixtureRequest,
) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(name)
    tools = [Tool(name=rounds[0][2].name, description=described, parameters={"note": described})]
    rendered = render(conversation(rounds, system), tokenizer, fmt, tools=tools, add_generation_prompt=False)
    trained = tokenizer.decode([i for i, kept in zip(rendered.ids, rendered.trained, strict=True) if kept])
    expected = written(rounds, fmt)
    if name == "byte_tokenizer":
        assert trained == expected
    # A token that begins before a border and ends behind it is not trained: blanks at most.
    assert "".join(trained.split()) == "".join(expected.split())
    turns = 1 + len(rounds) * (2 if fmt.tool_style == "react" else 4)
    calls = 0 if fmt.tool_style == "react" else len(rounds)
    special = tokenizer.special_tokens
    assert rendered.ids.count(tokenizer.im_start_id) == rendered.ids.count(tokenizer.im_end_id) == turns
    assert tokenizer.end_of_text_id not in rendered.ids
    if "<tool_call>" in special:
        # Two more stand in the instruction, as an example.
        assert rendered.ids.count(special["<tool_call>"]) == (calls + 2 if calls else 0)
        thoughts = 1 if fmt.thinking == "hybrid" else 0
        assert rendered.ids.count(special["<think>"]) == thoughts


def test_an_answer_that_is_not_trained_changes_no_id(byte_tokenizer: Tokenizer) -> None:
    call = ToolCall(name="f", arguments="{}")
    messages = conversation([("q", "look", call, "4", "four", ""), ("r", "again", call, "5", "five", "")], "be")
    for fmt in (QWEN1, QWEN2_5, QWEN3):
        whole = render(messages, byte_tokenizer, fmt, add_generation_prompt=False)
        weighed = [replace(one, trained=i > 5) for i, one in enumerate(messages)]
        half = render(weighed, byte_tokenizer, fmt, add_generation_prompt=False)
        assert half.ids == whole.ids
        shown, learned = (
            byte_tokenizer.decode([i for i, kept in zip(one.ids, one.trained, strict=True) if kept])
            for one in (whole, half)
        )
        assert shown.endswith(learned)
        assert "four" in shown
        assert "four" not in learned
        assert "again" in learned

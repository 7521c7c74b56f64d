"""Laws of v1's tool prompts: the published text, on the published turn, with results that are never trained."""

import pytest

from kiloq.chat import QWEN1, Message, ToolCall, parse_messages, parse_tools, render
from kiloq.errors import RequestError
from kiloq.tokenizer import Tokenizer

TOOLS = parse_tools(
    [
        {"name": "add", "description": "Adds.", "parameters": {"type": "object"}},
        {
            "name_for_human": "天气",
            "name_for_model": "weather",
            "description_for_model": "Tells the weather.",
            "parameters": [{"name": "city"}],
        },
    ]
)
INSTRUCTION = """Answer the following questions as best you can. You have access to the following APIs:

add: Call this tool to interact with the add API. What is the add API useful for? Adds. Parameters: {"type": "object"}

weather: Call this tool to interact with the 天气 API. What is the 天气 API useful for? Tells the weather. Parameters: [{"name": "city"}]

Use the following format:

Question: the input question you must answer
Thought: you should always think about what to do
Action: the action to take, should be one of [add, weather]
Action Input: the input to the action
Observation: the result of the action
... (this Thought/Action/Action Input/Observation can be repeated zero or more times)
Thought: I now know the final answer
Final Answer: the final answer to the original input question

Begin!

Question: """  # noqa: E501  # the model's own words, line by line
SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
CALL = {"role": "assistant", "content": "I add.", "function_call": {"name": "add", "arguments": '{"a": 1}'}}


def text_of(raw: list[dict[str, object]], tokenizer: Tokenizer) -> str:
    return tokenizer.decode(render(parse_messages(raw), tokenizer, QWEN1, tools=TOOLS).ids)


def turn(role: str, text: str) -> str:
    return f"<|im_start|>{role}\n{text}<|im_end|>\n"


def test_the_instruction_is_put_before_the_first_question(v1_tokenizer: Tokenizer) -> None:
    text = text_of([{"role": "user", "content": "\n1 + 1? \n"}], v1_tokenizer)
    assert text == SYSTEM + turn("user", f"{INSTRUCTION}1 + 1?") + "<|im_start|>assistant\n"


def test_the_instruction_moves_to_the_last_question_that_has_an_answer(v1_tokenizer: Tokenizer) -> None:
    raw = [{"role": role, "content": text} for role, text in (("user", "a"), ("assistant", "b"), ("user", "c"))]
    expected = (
        turn("user", f"{INSTRUCTION}a")
        + turn("assistant", "Thought: I now know the final answer.\nFinal Answer: b")
        + turn("user", "c")
    )
    assert text_of(raw, v1_tokenizer) == SYSTEM + expected + "<|im_start|>assistant\n"


def test_a_result_is_written_into_the_answer_which_then_goes_on(v1_tokenizer: Tokenizer) -> None:
    raw = [{"role": "user", "content": "1 + 1?"}, CALL, {"role": "function", "name": "add", "content": " 2\n"}]
    answer = 'Thought: I add.\nAction: add\nAction Input: {"a": 1}\nObservation:  2\nThought:'
    assert (
        text_of(raw, v1_tokenizer) == SYSTEM + turn("user", f"{INSTRUCTION}1 + 1?") + f"<|im_start|>assistant\n{answer}"
    )


def test_a_call_its_result_and_the_final_answer_are_one_turn(v1_tokenizer: Tokenizer) -> None:
    raw = [
        {"role": "user", "content": "1 + 1?"},
        CALL,
        {"role": "function", "content": "2"},
        {"role": "assistant", "content": "It is 2."},
        {"role": "user", "content": "Thanks"},
    ]
    answer = (
        'Thought: I add.\nAction: add\nAction Input: {"a": 1}\nObservation: 2\n'
        "Thought: I now know the final answer.\nFinal Answer: It is 2."
    )
    expected = turn("user", f"{INSTRUCTION}1 + 1?") + turn("assistant", answer) + turn("user", "Thanks")
    assert text_of(raw, v1_tokenizer) == SYSTEM + expected + "<|im_start|>assistant\n"


def test_the_thought_of_a_call_may_be_given_as_reasoning(v1_tokenizer: Tokenizer) -> None:
    call = ToolCall(name="add", arguments="{}")
    question = Message(role="user", content="x")
    texts = [
        render([question, Message(role="assistant", tool_calls=(call,), **given)], v1_tokenizer, QWEN1, tools=TOOLS).ids
        for given in ({"content": "so"}, {"content": "", "reasoning": "so"})
    ]
    assert texts[0] == texts[1]


def test_results_are_never_trained(v1_tokenizer: Tokenizer) -> None:
    raw = [
        {"role": "user", "content": "1 + 1?"},
        CALL,
        {"role": "tool", "content": "SECRET 好."},
        {"role": "assistant", "content": "2"},
    ]
    rendered = render(parse_messages(raw), v1_tokenizer, QWEN1, tools=TOOLS, add_generation_prompt=False)
    learned = v1_tokenizer.decode(i for i, mark in zip(rendered.ids, rendered.trained, strict=True) if mark)
    head = 'Thought: I add.\nAction: add\nAction Input: {"a": 1}\nObservation:'
    tail = "Thought: I now know the final answer.\nFinal Answer: 2<|im_end|>"
    # The newline between them is trained unless it shares a token with the result.
    assert learned in (head + tail, f"{head}\n{tail}")


def test_without_tools_the_words_of_a_conversation_are_left_alone(v1_tokenizer: Tokenizer) -> None:
    raw = [{"role": "user", "content": "\n a \n"}, {"role": "assistant", "content": " b "}]
    ids = render(parse_messages(raw), v1_tokenizer, QWEN1, add_generation_prompt=False).ids
    assert v1_tokenizer.decode(ids) == SYSTEM + turn("user", "\n a \n") + turn("assistant", " b ")


@pytest.mark.parametrize(
    "roles", [["tool"], ["assistant"], ["user", "tool"], ["user", "user"], ["user", "assistant", "system"], ["system"]]
)
def test_turns_that_do_not_alternate_are_refused(v1_tokenizer: Tokenizer, roles: list[str]) -> None:
    messages = parse_messages([{"role": role, "content": "x"} for role in roles])
    with pytest.raises(RequestError, match="messages"):
        render(messages, v1_tokenizer, QWEN1, tools=TOOLS)

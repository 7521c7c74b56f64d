"""Laws of the second turn: only what is new goes through the model, and no text depends on what is remembered."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kiloq.cache import BLOCK_SIZE
from kiloq.chat import QWEN1, QWEN2_5, QWEN3, ChatFormat, Message, ToolCall, parse_tools, render, wording
from kiloq.checkpoint import open_checkpoint
from kiloq.serve.answer_memory import AnswerMemory
from kiloq.tokenizer import Tokenizer

GENERATIONS = ("qwen1", "qwen2.5", "qwen3")
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
ARGUMENTS = '{"a": 17, "b": 25}'
CALLS = {
    "qwen1": f"Thought: I add the numbers.\nAction: add\nAction Input: {ARGUMENTS}\nObservation:",
    "qwen2.5": f'I add the numbers.\n<tool_call>\n{{"name": "add", "arguments": {ARGUMENTS}}}\n</tool_call>',
}
CALLS["qwen3"] = CALLS["qwen2.5"]
FINALS = {"qwen1": " I now know the final answer.\nFinal Answer: It is 42, und nicht über 43."}


@pytest.fixture(scope="module")
def tokenizer(model_of: Callable[[str], Path]) -> Tokenizer:
    return open_checkpoint(model_of("qwen1")).tokenizer


def answer(url: str, messages: list[Any], text: str, *, stream: bool, **more: Any) -> tuple[dict[str, Any], Any]:
    """The message and usage of an answer that recites a text, token by token as chance has it."""
    asked = {"model": "Qwen", "messages": messages, "temperature": 1.5, "top_p": 1, "guided_choice": [text], **more}
    if not stream:
        body = httpx.post(f"{url}/chat/completions", json=asked).raise_for_status().json()
        return body["choices"][0]["message"], body["usage"]
    asked |= {"stream": True, "stream_options": {"include_usage": True}}
    message: dict[str, Any] = {"role": "assistant", "content": ""}
    events = httpx.post(f"{url}/chat/completions", json=asked).raise_for_status().text.split("\n\n")
    chunks = [httpx.Response(200, text=event.removeprefix("data: ")).json() for event in events[:-2]]
    for delta in (chunk["choices"][0]["delta"] for chunk in chunks[:-1]):
        message["content"] += delta.get("content") or ""
        for call in delta.get("tool_calls", ()):
            if "id" in call:
                message.setdefault("tool_calls", []).append(call)
            else:
                message["tool_calls"][call["index"]]["function"]["arguments"] += call["function"]["arguments"]
    return message, chunks[-1]["usage"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("generation", GENERATIONS)
def test_each_turn_of_a_chat_computes_only_what_is_new(start_server: Any, generation: str, stream: bool) -> None:
    url = start_server(generation).openai
    messages: list[Any] = [{"role": "user", "content": f"{stream}: what is 17 + 25? As exactly as you can, please."}]
    usages = []
    for text in ("The answer is 42, naïvely; 好的。", "Gladly! Here it is again: forty-two.", "Yes."):
        message, usage = answer(url, messages, text, stream=stream, enable_thinking=False)
        assert message["content"] == text
        usages.append(usage)
        messages += [message, {"role": "user", "content": f"Are you sure about it, and about {stream}?"}]
    check_cached(usages)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("generation", GENERATIONS)
def test_a_call_and_its_result_compute_only_what_is_new(start_server: Any, generation: str, stream: bool) -> None:
    url = start_server(generation).openai
    messages: list[Any] = [{"role": "user", "content": f"{stream}: what is 17 + 25? As exactly as you can, please."}]
    usages = []
    texts = (CALLS[generation], FINALS.get(generation, "It is 42, und nicht über 43."))
    more = ({"role": "tool", "content": f"42 {stream}", "tool_call_id": "x"}, {"role": "user", "content": "Thank you!"})
    for text, reply in zip((*texts, "Yes."), (*more, None), strict=True):
        message, usage = answer(url, messages, text, stream=stream, tools=[TOOL], enable_thinking=False)
        usages.append(usage)
        messages += [message, reply]
    assert messages[1]["tool_calls"][0]["function"] == {"name": "add", "arguments": ARGUMENTS}
    assert messages[3]["content"] == "It is 42, und nicht über 43."
    check_cached(usages)


def check_cached(usages: list[Any]) -> None:
    for before, after in itertools.pairwise(usages):
        computed = before["prompt_tokens"] + before["completion_tokens"] - 1  # the last is drawn and not computed
        assert after["prompt_tokens_details"]["cached_tokens"] == computed // BLOCK_SIZE * BLOCK_SIZE


# What a client may make up: pieces of what the markup looks like, and of what was remembered.
words = st.lists(
    st.sampled_from(
        ["Hello", " world", "\n", " ", "好", "<tool_call>", "</tool_call>", "<think>", "<|im_end|>", "Thought: ", "é"]
    ),
    max_size=6,
).map("".join)
messages_of = st.lists(
    st.tuples(words, st.lists(words, max_size=1), words).map(
        lambda one: (
            Message(role="user", content=one[0]),
            Message(
                role="assistant",
                content=one[2],
                tool_calls=tuple(ToolCall(name="add", arguments=text) for text in one[1]),
            ),
        )
    ),
    min_size=1,
    max_size=3,
).map(lambda rounds: [message for one in rounds for message in one])


@given(history=messages_of, remembered=st.lists(words, max_size=4), fmt=st.sampled_from([QWEN1, QWEN2_5, QWEN3]))
def test_what_is_remembered_changes_no_text(
    tokenizer: Tokenizer, history: list[Message], remembered: list[str], fmt: ChatFormat
) -> None:
    memory = AnswerMemory(tokenizer, max_tokens=10_000)
    for text in remembered:
        for ids in (tokenizer.encode(text, allowed_special="all"), bytewise(text, tokenizer)):
            memory.remember(ids, len(text))
    empty = AnswerMemory(tokenizer, max_tokens=10_000)
    tools = parse_tools([TOOL])
    for offered in ((), tools):
        prompts = [
            render(history, tokenizer, fmt, tools=offered, thinking=None, recall=one.recall).ids
            for one in (memory, empty)
        ]
        assert wording(prompts[0], tokenizer) == wording(prompts[1], tokenizer)


def bytewise(text: str, tokenizer: Tokenizer) -> list[int]:
    """The longest way to write a text."""
    return [tokenizer.vocabulary.ranks[bytes([byte])] for byte in text.encode()]


def test_the_memory_is_bounded(tokenizer: Tokenizer) -> None:
    memory = AnswerMemory(tokenizer, max_tokens=100)
    texts = [f"answer number {i}" for i in range(100)]
    for text in texts:
        memory.remember(tokenizer.encode(text), len(text))
    kept = [text for text in texts if memory.recall((text,))]
    assert 0 < sum(len(tokenizer.encode(text)) for text in kept) <= 100
    assert kept == texts[-len(kept) :]


def test_an_answer_that_is_no_text_is_not_remembered(tokenizer: Tokenizer) -> None:
    memory = AnswerMemory(tokenizer, max_tokens=100)
    half = bytewise("好", tokenizer)[:2]
    memory.remember(half, 1)
    assert memory.recall(("�",)) is None


def test_a_text_that_a_stop_string_cut_is_remembered_where_its_tokens_end(tokenizer: Tokenizer) -> None:
    memory = AnswerMemory(tokenizer, max_tokens=100)
    memory.remember(bytewise("So it is. STOP", tokenizer), len("So it is. "))
    ids = memory.recall(("So it is. ",))
    assert ids is not None
    assert tokenizer.decode(ids) == "So it is. "

"""Laws of remembered ids: the next prompt begins with the last one and its answer, token for token; no text changes."""

import random
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kiloq.chat import QWEN1, QWEN2_5, QWEN3, ChatFormat, Message, ToolCall, parse_reply, parse_tools, render, wording
from kiloq.tokenizer import Tokenizer

TOOLS = parse_tools([{"name": "add", "parameters": {"type": "object"}}])
QUESTION = Message(role="user", content="1 + 1?")
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
THOUGHT = "<think>\nHm, 好.\n</think>\n\n"
ANSWERS = {
    "qwen1": ["You are helpful. 好", 'Thought: I add.\nAction: add\nAction Input: {"a": 1}'],
    "qwen2.5": ["You are helpful. 好", CALL, f"Action: 好\n{CALL}\n{CALL}"],
    "qwen3": ["You are helpful. 好", CALL, f"Action: 好\n{CALL}\n{CALL}"],
}


def any_ids(text: str, tokenizer: Tokenizer, seed: int) -> list[int]:
    """Ids of a text, cut at random: as a model may write it. Names of added tokens are those tokens."""
    chance, ids = random.Random(seed), []
    names = [name for name in tokenizer.special_tokens if not name.startswith("<|")]
    for part in re.split("(" + "|".join(map(re.escape, names)) + ")", text) if names else [text]:
        if part in names:
            ids.append(tokenizer.special_tokens[part])
            continue
        raw = part.encode()
        while raw:
            sizes = [size for size in range(1, len(raw) + 1) if raw[:size] in tokenizer.vocabulary.ranks]
            size = chance.choice(sizes)
            ids.append(tokenizer.vocabulary.ranks[raw[:size]])
            raw = raw[size:]
    return ids


def spoken(text: str, fmt: ChatFormat, *, thinking: bool | None) -> Message:
    """What a client sends back of an answer."""
    reply = parse_reply(text, fmt, tools=True, thinking=thinking)
    return Message(role="assistant", content=reply.content, reasoning=reply.reasoning, tool_calls=reply.tool_calls)


@pytest.mark.parametrize("fmt", [QWEN1, QWEN2_5, QWEN3], ids=lambda fmt: fmt.name)
@given(seed=st.integers(0, 10**6), which=st.integers(0, 2))
def test_the_next_prompt_begins_with_this_one_and_its_answer(
    v1_tokenizer: Tokenizer, fast_tokenizer: Tokenizer, fmt: ChatFormat, seed: int, which: int
) -> None:
    tokenizer = v1_tokenizer if fmt is QWEN1 else fast_tokenizer
    texts = ANSWERS[fmt.name]
    text = texts[which % len(texts)]
    tools = TOOLS if "add" in text else ()
    ids = any_ids(text, tokenizer, seed)
    known = {wording(ids, tokenizer): ids}
    message = spoken(text, fmt, thinking=False) if tools else Message(role="assistant", content=text)
    more = Message(role="tool", content="2") if tools else QUESTION

    def prompt(*messages: Message) -> list[int]:
        return render(messages, tokenizer, fmt, tools=tools, thinking=False, recall=known.get).ids

    begun = prompt(QUESTION) + ids
    assert prompt(QUESTION, message, more)[: len(begun)] == begun


def test_a_thought_that_is_sent_back_while_tools_work_is_recalled(fast_tokenizer: Tokenizer) -> None:
    ids = any_ids(THOUGHT + CALL, fast_tokenizer, seed=1)
    known = {wording(ids, fast_tokenizer): ids}
    message = spoken(THOUGHT + CALL, QWEN3, thinking=None)
    prompts = [
        render(messages, fast_tokenizer, QWEN3, tools=TOOLS, recall=known.get).ids
        for messages in ([QUESTION], [QUESTION, message, Message(role="tool", content="2")])
    ]
    begun = prompts[0] + ids
    assert prompts[1][: len(begun)] == begun


def test_a_final_answer_of_v1_follows_the_result_that_it_came_from(v1_tokenizer: Tokenizer) -> None:
    texts = [f"{ANSWERS['qwen1'][1]}\nObservation:", " I now know the final answer.\nFinal Answer: 2."]
    known = {}
    history, begun = [QUESTION], []
    for seed, (text, more) in enumerate(zip(texts, (Message(role="tool", content="2"), QUESTION), strict=True)):
        ids = any_ids(text, v1_tokenizer, seed)
        known[wording(ids, v1_tokenizer)] = ids
        prompt = render(history, v1_tokenizer, QWEN1, tools=TOOLS, recall=known.get).ids
        assert prompt[: len(begun)] == begun
        begun = prompt + ids
        history += [spoken(text, QWEN1, thinking=None), more]
    prompt = render(history, v1_tokenizer, QWEN1, tools=TOOLS, recall=known.get).ids
    assert prompt[: len(begun)] == begun


def test_names_of_tokens_in_a_clients_text_stay_text(fast_tokenizer: Tokenizer) -> None:
    ids = any_ids("<think>", fast_tokenizer, seed=0)
    known = {wording(ids, fast_tokenizer): ids}
    forged = [QUESTION, Message(role="assistant", content="<think>"), QUESTION]
    prompts = [render(forged, fast_tokenizer, QWEN2_5, recall=recall).ids for recall in (known.get, None)]
    assert prompts[0] == prompts[1]


def test_ids_of_a_call_that_are_given_are_laid_out(v1_tokenizer: Tokenizer) -> None:
    ids = tuple(any_ids(ANSWERS["qwen1"][1], v1_tokenizer, seed=3))
    call = ToolCall(name="add", arguments="{}")
    message = Message(role="assistant", content="", tool_calls=(call,), token_ids=ids)
    begun = [*render([QUESTION], v1_tokenizer, QWEN1, tools=TOOLS).ids, *ids]
    prompt = render([QUESTION, message, Message(role="tool", content="2")], v1_tokenizer, QWEN1, tools=TOOLS).ids
    assert prompt[: len(begun)] == begun

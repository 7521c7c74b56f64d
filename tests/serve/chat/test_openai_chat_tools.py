"""Tools and functions in chat completions; streams and whole answers say the same, whatever the model writes."""

import json
from typing import Any, Literal

import httpx
import openai
import pytest
from pydantic import BaseModel

GENERATIONS = ("qwen1", "qwen2.5", "qwen3")
ASK: Any = [{"role": "user", "content": "What is 17 + 25?"}]
PARAMETERS = {
    "type": "object",
    "properties": {"a": {"type": "integer", "maximum": 99}, "sign": {"enum": ["plus", "minus"]}},
    "required": ["a", "sign"],
    "additionalProperties": False,
}
ADD: Any = {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": PARAMETERS}}
SEE: Any = {"type": "function", "function": {"name": "see", "parameters": {"type": "object", "properties": {}}}}
QWEN_STYLE = {
    "name_for_human": "加",
    "name_for_model": "add",
    "description_for_model": "Adds.",
    "parameters": [{"name": "a", "description": "a number", "required": True, "schema": {"type": "integer"}}],
}
ARGUMENTS = '{"a": 17, "sign": "plus"}'
JSON_CALL = f'<tool_call>\n{{"name": "add", "arguments": {ARGUMENTS}}}\n</tool_call>'
REACT_CALL = f"Thought: 好, I add.\nAction: add\nAction Input: {ARGUMENTS}\nObservation:"
TEXTS = {
    "plain": "Hello 🙂 naïve 好的, a <b> and { and 'Action: x'.\nAction: none. Fin",
    "half markers": "<tool_ca <tool_call \n</tool_call> <think Thought: \nAction Input: x\nFinal Answer",
    "json call": JSON_CALL,
    "content and calls": f"I add 好.\n{JSON_CALL}\n{JSON_CALL}",
    "odd call": '<tool_call>{"arguments": "{}", "name": "see"}</tool_call> and <tool_call>none</tool_call>',
    "thought": f"<think>\nIs it 好?\n</think>\n\nYes, {JSON_CALL}",
    "react call": REACT_CALL,
    "react call without a thought": f"Action: add\nAction Input: {ARGUMENTS}",
    "react answer": "Thought: I now know the final answer.\nFinal Answer: It is 42 🙂.\nReally.",
    "react answer without a thought": "Final Answer: 42.",
}
COMMON = [
    ("plain", "none"),
    ("plain", "tools"),
    ("half markers", "none"),
    ("half markers", "tools"),
    ("thought", "none"),
]
JSON_STYLE = [
    ("json call", "tools"),
    ("json call", "functions"),
    ("json call", "forbidden"),
    ("content and calls", "tools"),
    ("content and calls", "functions"),
    ("odd call", "tools"),
    ("thought", "tools"),
]
REACT_STYLE = [
    ("react call", "tools"),
    ("react call", "functions"),
    ("react call", "forbidden"),
    ("react call without a thought", "tools"),
    ("react answer", "tools"),
    ("react answer without a thought", "functions"),
]


# -- the law of streams ------------------------------------------------------------------------------------------------


def whole(url: str, asked: dict[str, Any]) -> tuple[Any, Any]:
    body = httpx.post(f"{url}/chat/completions", json=asked).raise_for_status().json()
    (choice,) = body["choices"]
    del choice["index"]
    for call in choice["message"].get("tool_calls", ()):
        assert call.pop("id").startswith("call_")
    return choice, body["usage"]


def streamed(url: str, asked: dict[str, Any]) -> tuple[Any, Any]:
    """A stream put together as strictly as any client may do it."""
    asked = {**asked, "stream": True, "stream_options": {"include_usage": True}}
    events = httpx.post(f"{url}/chat/completions", json=asked).raise_for_status().text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    *chunks, last = [json.loads(event.removeprefix("data: ")) for event in events[:-2]]
    assert last["choices"] == []
    choices = [chunk["choices"][0] for chunk in chunks]
    assert [choice["delta"] for choice in choices].count({"role": "assistant", "content": ""}) == 1
    message: dict[str, Any] = {"role": "assistant", "content": None, "refusal": None}
    tokens: list[Any] = []
    for choice in choices[1:]:
        delta = choice["delta"]
        assert (choice["finish_reason"] is not None) == (choice is choices[-1]) == (delta == {})
        for name in ("content", "reasoning_content"):
            if name in delta:
                assert delta[name]
                message[name] = (message.get(name) or "") + delta[name]
        tokens += (choice["logprobs"] or {}).get("content", ())
        for piece in delta.get("tool_calls", ()):
            calls = message.setdefault("tool_calls", [])
            if piece["index"] == len(calls):
                assert piece.pop("id").startswith("call_")
                calls.append(piece)
            else:
                assert piece.keys() == {"index", "function"}
                calls[piece["index"]]["function"]["arguments"] += piece["function"]["arguments"]
        if piece := delta.get("function_call"):
            if "function_call" in message:
                message["function_call"]["arguments"] += piece["arguments"]
            else:
                message["function_call"] = piece
    for call in message.get("tool_calls", ()):
        del call["index"]
    if message["content"] is None and not message.keys() & {"tool_calls", "function_call"}:
        message["content"] = ""
    choice = {"message": message, "logprobs": {"content": tokens, "refusal": None} if asked["logprobs"] else None}
    return {**choice, "finish_reason": choices[-1]["finish_reason"]}, last["usage"]


CASES = [
    *((generation, text, tools) for generation in GENERATIONS for text, tools in COMMON),
    *((generation, text, tools) for generation in GENERATIONS[1:] for text, tools in JSON_STYLE),
    *(("qwen1", text, tools) for text, tools in REACT_STYLE),
]


@pytest.mark.parametrize(("generation", "name", "tools"), CASES)
def test_a_stream_adds_up_to_the_whole_answer(start_server: Any, generation: str, name: str, tools: str) -> None:
    url = start_server(generation).openai
    given = {
        "none": {},
        "tools": {"tools": [ADD, SEE]},
        "functions": {"functions": [ADD["function"]]},
        "forbidden": {"tools": [ADD], "tool_choice": "none"},
    }[tools]
    asked = {"model": "Qwen", "messages": ASK, "guided_choice": [TEXTS[name]], "temperature": 1.5, "top_p": 1, **given}
    whole(url, {**asked, "max_tokens": 1})  # what is in the cache is rounded otherwise than what is not
    for seed, cut in enumerate(({}, {"max_tokens": 11}, {"stop": ["ll", '"sign": "pl', "好的"]})):
        asked |= {"seed": seed, "logprobs": seed != 1, "max_tokens": None, **cut}
        (choice, usage), (joined, their_usage) = whole(url, asked), streamed(url, asked)
        assert joined == choice
        assert their_usage == usage
        check_honesty(choice, TEXTS[name], cut)


def check_honesty(choice: Any, text: str, cut: dict[str, Any]) -> None:
    """No stop word and nothing invented; the log probabilities are those of what is shown."""
    message = choice["message"]
    content = message["content"] or ""
    assert content in text
    calls = [call["function"] for call in message.get("tool_calls", ())] or [message.get("function_call") or {}]
    shown = content + message.get("reasoning_content", "") + "".join(call.get("arguments", "") for call in calls)
    assert not any(word in shown for word in cut.get("stop", ()))
    if choice["logprobs"]:
        raw = b"".join(bytes(token["bytes"]) for token in choice["logprobs"]["content"])
        assert content in raw.decode(errors="replace")
        assert len(raw) <= len(content.encode()) + 40  # a token at each end may hold more
    if choice["finish_reason"] == "tool_calls":
        assert all(json.loads(call["function"]["arguments"]) is not None for call in message["tool_calls"])


# -- tools -------------------------------------------------------------------------------------------------------------


def recited(client: openai.OpenAI) -> dict[str, Any]:
    """A call in the form of the model behind this client."""
    prompt = httpx.post(
        f"{client.base_url}".removesuffix("v1/") + "tokenize",
        json={"messages": ASK, "tools": [ADD], "return_token_strs": True},
    ).json()
    text = REACT_CALL if "Action Input" in "".join(prompt["token_strs"]) else f"I add.\n{JSON_CALL}"
    return {"guided_choice": [text]}


def test_a_call_is_told_as_openai_tells_it_and_its_result_goes_back(client: openai.OpenAI) -> None:
    messages = list(ASK)
    answer = client.chat.completions.create(model="Qwen", messages=messages, tools=[ADD], extra_body=recited(client))
    (choice,) = answer.choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.tool_calls
    (call,) = choice.message.tool_calls
    assert call.type == "function"
    assert (call.function.name, json.loads(call.function.arguments)) == ("add", {"a": 17, "sign": "plus"})
    messages += [choice.message, {"role": "tool", "tool_call_id": call.id, "content": "42"}]
    final = client.chat.completions.create(model="Qwen", messages=messages, tools=[ADD], max_tokens=5)
    assert final.choices[0].finish_reason in ("stop", "length")


@pytest.mark.parametrize("stream", [False, True])
def test_a_required_call_is_made_with_arguments_that_fit(client: openai.OpenAI, stream: bool) -> None:
    for seed, choice in enumerate(("required", "named", "allowed")):
        tool_choice: Any = {
            "required": "required",
            "named": {"type": "function", "function": {"name": "add"}},
            "allowed": {
                "type": "allowed_tools",
                "allowed_tools": {"mode": "required", "tools": [{"type": "function", "function": {"name": "add"}}]},
            },
        }[choice]
        asked: Any = {"model": "Qwen", "messages": ASK, "tool_choice": tool_choice, "seed": seed}
        asked["tools"] = [ADD] if choice == "required" else [SEE, ADD]
        if stream:
            with client.chat.completions.stream(**asked) as events:
                answer: Any = events.get_final_completion()
        else:
            answer = client.chat.completions.create(**asked)
        (one,) = answer.choices
        assert one.finish_reason == ("stop" if choice == "named" else "tool_calls")
        for call in one.message.tool_calls:
            assert call.function.name == "add"
            arguments = json.loads(call.function.arguments)
            assert arguments.keys() == {"a", "sign"}
            assert isinstance(arguments["a"], int)
            assert arguments["sign"] in ("plus", "minus")


def test_one_call_at_a_time_where_no_more_are_wanted(client: openai.OpenAI) -> None:
    for seed in range(3):
        answer = client.chat.completions.create(
            model="Qwen", messages=ASK, tools=[SEE], tool_choice="required", parallel_tool_calls=False, seed=seed
        )
        assert len(answer.choices[0].message.tool_calls or ()) == 1


def test_no_call_is_made_where_none_may_be(client: openai.OpenAI) -> None:
    for seed in range(3):
        answer = client.chat.completions.create(
            model="Qwen", messages=ASK, tools=[ADD], tool_choice="none", seed=seed, max_tokens=20, temperature=2
        )
        assert answer.choices[0].message.tool_calls is None
        assert "<tool_call>" not in (answer.choices[0].message.content or "")


def test_a_cut_call_ends_with_length_in_both_modes(client: openai.OpenAI) -> None:
    for stream in (False, True):
        asked: Any = {"model": "Qwen", "messages": ASK, "tools": [ADD], "max_tokens": 18, "seed": 1, "stream": stream}
        answer: Any = client.chat.completions.create(**asked, extra_body=recited(client))
        endings = [c.choices[0].finish_reason for c in answer] if stream else [answer.choices[0].finish_reason]
        assert endings[-1] == "length"


# -- content that must have a form -------------------------------------------------------------------------------------


class Colour(BaseModel):
    name: Literal["red", "green"]
    strength: Literal[1, 2, 3]


def test_a_parsed_answer_is_an_object_of_the_clients_class(client: openai.OpenAI) -> None:
    thinking = {"enable_thinking": False}
    answer = client.chat.completions.parse(
        model="Qwen", messages=ASK, response_format=Colour, max_tokens=400, seed=1, extra_body=thinking
    )
    assert isinstance(answer.choices[0].message.parsed, Colour)


def test_any_json_object_is_one(client: openai.OpenAI) -> None:
    for stream in (False, True):
        asked: Any = {"model": "Qwen", "messages": ASK, "max_tokens": 60, "temperature": 2, "seed": 2, "stream": stream}
        answer: Any = client.chat.completions.create(
            **asked, response_format={"type": "json_object"}, extra_body={"enable_thinking": False}
        )
        if stream:
            text = "".join(chunk.choices[0].delta.content or "" for chunk in answer)
            assert text.lstrip().startswith("{")
        elif answer.choices[0].finish_reason == "stop":
            assert isinstance(json.loads(answer.choices[0].message.content), dict)


# -- functions, as clients of the first years know them ----------------------------------------------------------------


@pytest.mark.parametrize("function", [ADD["function"], QWEN_STYLE], ids=["openai", "qwen"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_function_is_called_and_its_result_goes_back(client: openai.OpenAI, function: Any, stream: bool) -> None:
    messages = list(ASK)
    asked: Any = {"model": "Qwen", "messages": messages, "functions": [function], "stream": stream}
    answer: Any = client.chat.completions.create(**asked, extra_body=recited(client))
    if stream:
        choices = [chunk.choices[0] for chunk in answer]
        calls = [choice.delta.function_call for choice in choices if choice.delta.function_call]
        name, arguments = calls[0].name, "".join(call.arguments for call in calls)
        ending = choices[-1].finish_reason
        assert all(call.name is None for call in calls[1:])
    else:
        call = answer.choices[0].message.function_call
        name, arguments, ending = call.name, call.arguments, answer.choices[0].finish_reason
        assert answer.choices[0].message.tool_calls is None
    assert (name, json.loads(arguments), ending) == ("add", {"a": 17, "sign": "plus"}, "function_call")
    called = {"role": "assistant", "content": None, "function_call": {"name": name, "arguments": arguments}}
    messages += [called, {"role": "function", "name": "add", "content": "42"}]
    final = client.chat.completions.create(model="Qwen", messages=messages, functions=[function], max_tokens=5)
    assert final.choices[0].message.role == "assistant"


def test_a_named_function_is_called(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="Qwen", messages=ASK, functions=[SEE["function"], ADD["function"]], function_call={"name": "add"}, seed=1
    )
    (choice,) = answer.choices
    assert choice.finish_reason == "stop"
    assert choice.message.function_call
    assert choice.message.function_call.name == "add"
    assert json.loads(choice.message.function_call.arguments).keys() == {"a", "sign"}

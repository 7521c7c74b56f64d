"""/v1/chat/completions as OpenAI's own client uses it, with texts that the model is made to recite."""

import asyncio
import json
from typing import Any

import httpx
import openai
import pytest

HELLO: Any = [{"role": "user", "content": "Hello"}]


def recited(*texts: str, **more: Any) -> dict[str, Any]:
    return {"model": "Qwen", "messages": HELLO, "extra_body": {"guided_choice": list(texts), **more}}


def test_an_answer_has_every_field_that_openai_requires(url: str) -> None:
    response = httpx.post(f"{url}/chat/completions", json={"model": "Qwen", "messages": HELLO, "max_tokens": 5})
    assert response.status_code == 200
    answer = response.json()
    assert answer["id"].startswith("chatcmpl-")
    assert (answer["object"], answer["model"]) == ("chat.completion", "Qwen")
    assert isinstance(answer["created"], int)
    (choice,) = answer["choices"]
    assert choice.keys() == {"index", "message", "logprobs", "finish_reason"}
    assert choice["message"].keys() >= {"role", "content", "refusal"}
    assert choice["logprobs"] is None
    usage = answer["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert usage["prompt_tokens_details"].keys() == {"cached_tokens"}


def test_the_chunks_of_a_stream_have_the_form_that_openai_gives_them(url: str) -> None:
    asked = {"model": "Qwen", "messages": HELLO, "max_tokens": 8, "stream": True, "n": 2, "seed": 1}
    events = httpx.post(f"{url}/chat/completions", json=asked).text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    chunks = [json.loads(event.removeprefix("data: ")) for event in events[:-2]]
    assert len({(chunk["id"], chunk["created"], chunk["object"]) for chunk in chunks}) == 1
    assert all(len(chunk["choices"]) == 1 and "usage" not in chunk for chunk in chunks)
    for index in range(2):
        deltas = [c["choices"][0]["delta"] for c in chunks if c["choices"][0]["index"] == index]
        assert deltas[0] == {"role": "assistant", "content": ""}
        assert deltas[-1] == {}
        assert all(delta["content"] for delta in deltas[1:-1] if "content" in delta)
        assert not any("role" in delta for delta in deltas[1:])


def test_usage_comes_in_a_chunk_without_choices_when_it_is_asked_for(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model="Qwen", messages=HELLO, max_tokens=6, seed=3)
    chunks = list(
        client.chat.completions.create(
            model="Qwen", messages=HELLO, max_tokens=6, seed=3, stream=True, stream_options={"include_usage": True}
        )
    )
    assert [chunk.usage for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert not chunks[-1].choices
    assert whole.usage
    assert chunks[-1].usage
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_usage_may_come_with_every_chunk(client: openai.OpenAI) -> None:
    options: Any = {"include_usage": True, "continuous_usage_stats": True}
    asked: Any = {"model": "Qwen", "messages": HELLO, "max_tokens": 6, "stream_options": options, "seed": 1}
    usages = [chunk.usage for chunk in client.chat.completions.create(**asked, stream=True)]
    drawn = [usage.completion_tokens for usage in usages if usage]
    assert len(drawn) == len(usages)
    assert drawn == sorted(drawn)
    assert len({usage.prompt_tokens for usage in usages if usage}) == 1


def test_thoughts_are_told_apart_and_counted(start_server: Any) -> None:
    url = start_server("qwen3").openai
    asked = {"model": "Qwen", "messages": HELLO, "guided_choice": ["<think>\nHm, hm.\n</think>\n\nYes."], "seed": 1}
    body = httpx.post(f"{url}/chat/completions", json=asked).json()
    message, usage = body["choices"][0]["message"], body["usage"]
    assert (message["reasoning_content"], message["content"]) == ("Hm, hm.", "Yes.")
    assert 0 < usage["completion_tokens_details"]["reasoning_tokens"] < usage["completion_tokens"]
    events = httpx.post(f"{url}/chat/completions", json={**asked, "stream": True}).text.split("\n\n")[:-2]
    deltas = [json.loads(event.removeprefix("data: "))["choices"][0]["delta"] for event in events]
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == "Hm, hm."
    off = {**asked, "guided_choice": ["<think> is a marker."], "reasoning_effort": "none"}
    body = httpx.post(f"{url}/chat/completions", json=off).json()
    assert body["choices"][0]["message"]["content"] == "<think> is a marker."
    assert body["usage"]["completion_tokens_details"]["reasoning_tokens"] == 0


def test_one_seed_gives_one_text_and_n_answers_differ_only_by_it(client: openai.OpenAI) -> None:
    def texts(**asked: Any) -> list[str | None]:
        answer = client.chat.completions.create(model="Qwen", messages=HELLO, max_tokens=12, temperature=1, **asked)
        return [choice.message.content for choice in answer.choices]

    assert texts(seed=5, n=3) == texts(seed=5, n=3)
    assert texts(seed=5, n=3)[1:2] == texts(seed=6)


@pytest.mark.parametrize(
    ("wrong", "param"),
    [
        ({"temperature": 3}, "temperature"),
        ({"temperature": "1"}, "temperature"),
        ({"top_p": 1.5}, "top_p"),
        ({"presence_penalty": -3}, "presence_penalty"),
        ({"frequency_penalty": 2.5}, "frequency_penalty"),
        ({"n": 0}, "n"),
        ({"n": 129}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_completion_tokens": -1}, "max_completion_tokens"),
        ({"top_logprobs": 21, "logprobs": True}, "top_logprobs"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop"),
        ({"stop": 5}, "stop"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"seed": 1.5}, "seed"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"messages": []}, "messages"),
        ({"messages": "Hello"}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages"),
        ({"messages": [{"role": "nobody", "content": "x"}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "messages"),
        ({"tools": "add"}, "tools"),
        ({"tools": [{"type": "function", "function": {}}]}, "tools"),
        ({"tools": [{"type": "custom", "custom": {"name": "add"}}]}, "tools"),
        ({"functions": [{"description": "no name"}]}, "functions"),
        ({"functions": [{"name": "f"}], "tools": [{"type": "function", "function": {"name": "f"}}]}, "functions"),
        ({"enable_thinking": True}, "thinking"),
        ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_regex"),
        ({"guided_regex": "("}, "guided_regex"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": 5}}}},
            "response_",
        ),
        (
            {
                "tools": [{"type": "function", "function": {"name": "f"}}],
                "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": 5}}},
            },
            "response_format",
        ),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": "sometimes"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "add"}}}, "tool_choice"),
        ({"function_call": {}}, "function_call"),
        ({"audio": {"voice": "alloy", "format": "mp3"}}, "audio"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"prediction": {"type": "content", "content": "x"}}, "prediction"),
        ({"web_search_options": {}}, "web_search_options"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"model": "no-such-model"}, "model"),
        ({"model": None}, "model"),
    ],
)
def test_a_wrong_field_is_named(server: Any, wrong: dict[str, Any], param: str) -> None:
    response = httpx.post(f"{server.openai}/chat/completions", json={"model": "Qwen", "messages": HELLO, **wrong})
    assert response.status_code == (404 if wrong.get("model") else 400)
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["param"].startswith(param)
    assert param in error["message"]


def test_unknown_fields_are_ignored_and_named(server: Any) -> None:
    asked = {
        "model": "Qwen",
        "messages": HELLO,
        "max_tokens": 1,
        "user": "u",
        "store": True,
        "frobnicate": 1,
        "a\nb": 2,
    }
    response = httpx.post(f"{server.openai}/chat/completions", json=asked)
    assert response.status_code == 200
    assert response.headers["x-kiloq-ignored"] == "frobnicate"


def test_a_prompt_or_an_answer_that_is_too_long_is_refused_before_the_stream(client: openai.OpenAI) -> None:
    for asked in ({"messages": [{"role": "user", "content": "word " * 20_000}]}, {"max_tokens": 1_000_000}):
        given: Any = {"model": "Qwen", "messages": HELLO, "stream": True, **asked}
        with pytest.raises(openai.BadRequestError, match="maximum context length is") as info:
            client.chat.completions.create(**given)
        assert info.value.code == "context_length_exceeded"


def test_content_may_come_in_parts_and_from_a_developer(client: openai.OpenAI) -> None:
    def prompt_tokens(messages: Any) -> int:
        usage = client.chat.completions.create(model="Qwen", messages=messages, max_tokens=1).usage
        assert usage
        return usage.prompt_tokens

    plain = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
    parts = [
        {"role": "developer", "content": [{"type": "text", "text": "Be kind."}]},
        {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
    ]
    assert prompt_tokens(plain) == prompt_tokens(parts)


def test_max_completion_tokens_wins(client: openai.OpenAI) -> None:
    asked: Any = {"max_tokens": 9, "max_completion_tokens": 2, "extra_body": {"ignore_eos": True}}
    answer = client.chat.completions.create(model="Qwen", messages=HELLO, **asked)
    assert answer.usage
    assert (answer.usage.completion_tokens, answer.choices[0].finish_reason) == (2, "length")


def test_log_probabilities_are_those_of_the_content(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="Qwen", messages=HELLO, max_tokens=8, logprobs=True, top_logprobs=2, extra_body={"ignore_eos": True}
    )
    (choice,) = answer.choices
    assert choice.logprobs
    assert choice.logprobs.content
    raw = b"".join(bytes(token.bytes or ()) for token in choice.logprobs.content)
    assert raw.decode(errors="replace") == choice.message.content
    assert all(len(token.top_logprobs) == 2 for token in choice.logprobs.content)


def test_the_asynchronous_client_streams_what_it_would_answer(server: Any) -> None:
    async def texts() -> list[str | None]:
        async with openai.AsyncOpenAI(base_url=server.openai, api_key="none") as client:
            asked: Any = {"model": "Qwen", "messages": HELLO, "max_tokens": 6, "temperature": 0}
            stream = await client.chat.completions.create(**asked, stream=True)
            text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
            return [text, (await client.chat.completions.create(**asked)).choices[0].message.content]

    streamed, whole = asyncio.run(texts())
    assert streamed == whole

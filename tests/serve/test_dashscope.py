"""DashScope's own client against the real server: answers, streams, errors, in the shapes that it parses."""

import asyncio
import json
import os
import subprocess
import sys
from functools import partial
from http import HTTPStatus
from typing import Any

import dashscope
import openai
import pytest
from dashscope import AioGeneration, Models, TextEmbedding, Tokenization
from dashscope.v2.errors import BadRequestError, NotFoundError

from tests.serve.dashscope_client import HELLO, ask

# As the first Qwen README has it, character by character: programs that hold it must run.
README_SNIPPET = """
import random
from http import HTTPStatus
from dashscope import Generation


def call_with_messages():
    messages = [{'role': 'system', 'content': 'You are a helpful assistant.'},
                {'role': 'user', 'content': '如何做西红柿鸡蛋？'}]
    gen = Generation()
    response = gen.call(
        Generation.Models.qwen_turbo,
        messages=messages,
        seed=random.randint(1, 10000),  # set the random seed, optional, default to 1234 if not set
        result_format='message',  # set the result to be "message" format.
    )
    return response


if __name__ == '__main__':
    response = call_with_messages()
    if response.status_code == HTTPStatus.OK:
        print(response)
    else:
        print('Request id: %s, Status code: %s, error code: %s, error message: %s' % (
            response.request_id, response.status_code,
            response.code, response.message
        ))
"""


def test_the_snippet_of_the_first_readme_runs_as_it_stands(server: Any) -> None:
    place = {"DASHSCOPE_HTTP_BASE_URL": f"{server.url}/api/v1", "DASHSCOPE_API_KEY": "none"}
    done = subprocess.run(
        [sys.executable, "-c", README_SNIPPET], env=os.environ | place, capture_output=True, text=True, check=True
    )
    answer = json.loads(done.stdout)
    assert answer["status_code"] == 200
    assert answer["request_id"]
    choice = answer["output"]["choices"][0]
    assert choice["finish_reason"] in ("stop", "length")
    assert choice["message"]["role"] == "assistant"
    assert choice["message"]["content"]
    usage = answer["usage"]
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]


def test_text_and_message_formats_say_the_same(server: Any) -> None:
    text, message = ask(server), ask(server, result_format="message")
    assert text.status_code == message.status_code == HTTPStatus.OK
    assert text.output.choices is None
    assert text.output.text == message.output.choices[0].message.content
    assert text.output.finish_reason == message.output.choices[0].finish_reason == "length"
    assert text.usage.output_tokens == message.usage.output_tokens == 12
    assert text.request_id != message.request_id


def test_the_asynchronous_client_gets_the_same(server: Any) -> None:
    async def both() -> tuple[Any, list[Any]]:
        fields = {"model": "qwen-plus", "messages": HELLO, "max_tokens": 12, "api_key": "none"}
        fields |= {"base_address": f"{server.url}/api/v1", "result_format": "message"}
        whole = await AioGeneration.call(**fields)
        stream = await AioGeneration.call(stream=True, incremental_output=True, **fields)
        events = [event async for event in stream]
        await dashscope.close_shared_aio_session()
        return whole, events

    whole, events = asyncio.run(both())
    joined = "".join(event.output.choices[0].message.content for event in events)
    assert joined == whole.output.choices[0].message.content == ask(server).output.text


def test_an_answer_is_decided_by_its_seed_which_is_1234_if_none_is_given(server: Any) -> None:
    texts = [ask(server, temperature=1.5, top_p=1.0, **seed).output.text for seed in ({}, {"seed": 1234}, {"seed": 7})]
    assert texts[0] == texts[1] != texts[2]
    assert ask(server, seed=2**64 - 1).status_code == HTTPStatus.OK


def test_several_answers_are_choices_whose_tokens_are_counted_together(server: Any) -> None:
    whole = ask(server, n=3, temperature=1.5, top_p=1.0)
    assert [choice.index for choice in whole.output.choices] == [0, 1, 2]
    last = {}
    for event in ask(server, n=3, temperature=1.5, top_p=1.0, stream=True):
        last[event.output.choices[0].index] = event
    assert [last[i].output.choices[0].message.content for i in range(3)] == [
        choice.message.content for choice in whole.output.choices
    ]
    assert sum(event.usage.output_tokens for event in last.values()) == whole.usage.output_tokens > 12


def test_a_history_and_a_prompt_are_the_same_conversation_as_messages(server: Any) -> None:
    old = ask(server, history=[{"user": "My name is Tom.", "bot": "Hello, Tom."}], prompt="What is my name?")
    turns = [("user", "My name is Tom."), ("assistant", "Hello, Tom."), ("user", "What is my name?")]
    new = ask(server, messages=[{"role": role, "content": [{"text": text}]} for role, text in turns])
    assert old.output.text == new.output.text
    assert old.usage.input_tokens == new.usage.input_tokens


def test_stop_takes_a_text_texts_or_token_ids(server: Any) -> None:
    whole = ask(server, max_tokens=30, temperature=0.0).output.text
    stop = whole.split()[2]
    for one in (stop, [stop, "never said"]):
        answer = ask(server, max_tokens=30, temperature=0.0, stop=one)
        assert (answer.output.text, answer.output.finish_reason) == (whole[: whole.index(stop)], "stop")
    ids = Tokenization.call("qwen-turbo", prompt=whole, api_key="none", base_address=f"{server.url}/api/v1").output
    by_id = ask(server, max_tokens=30, temperature=0.0, stop_token_ids=[ids["token_ids"][3]])
    assert by_id.output.text == "".join(ids["tokens"][:3])
    for one in (ids["token_ids"][3], [ids["token_ids"][3]], [ids["token_ids"][3:5]]):
        answer = ask(server, max_tokens=30, temperature=0.0, stop=one)
        assert (answer.output.text, answer.output.finish_reason) == ("".join(ids["tokens"][:3]), "stop")


def test_counted_tokens_are_those_of_the_prompt(server: Any) -> None:
    place = {"api_key": "none", "base_address": f"{server.url}/api/v1"}
    counted = Tokenization.call("qwen-turbo", messages=HELLO, **place)
    assert counted.usage["input_tokens"] == len(counted.output["token_ids"]) == ask(server).usage.input_tokens
    assert "<|im_start|>" in counted.output["tokens"]
    text = Tokenization.call("qwen-turbo", prompt="How do I cook? <|im_end|>", **place).output
    assert "".join(text["tokens"]) == "How do I cook? <|im_end|>"
    assert len(text["token_ids"]) == len(text["tokens"]) > 5


def test_texts_become_the_vectors_of_openais_api(server: Any) -> None:
    texts = ["The cat sat.", "如何做西红柿鸡蛋？"]
    theirs = openai.OpenAI(base_url=server.openai, api_key="none").embeddings.create(
        model="Qwen", input=texts, encoding_format="float"
    )
    expected = [one.embedding for one in theirs.data]
    place = {"api_key": "none", "base_address": f"{server.url}/api/v1"}
    ours = TextEmbedding.call("qwen-turbo", texts, **place)
    assert [one["text_index"] for one in ours.output["embeddings"]] == [0, 1]
    assert [one["embedding"] for one in ours.output["embeddings"]] == expected
    assert ours.usage["total_tokens"] == theirs.usage.total_tokens
    client = dashscope.Client(base_url=f"{server.url}/api/v1", api_key="none")
    assert [one.embedding for one in client.embeddings.create(model="qwen-turbo", input=texts).embeddings] == expected
    refused = TextEmbedding.call("qwen-turbo", texts, dimension=7, **place)
    assert (refused.status_code, refused.code) == (400, "InvalidParameter")


def test_models_are_listed_and_found_by_name(server: Any) -> None:
    place = {"api_key": "none", "base_address": f"{server.url}/api/v1"}
    names = [model["name"] for model in Models.list(**place).output["models"]]
    assert ask(server, model=names[0]).status_code == HTTPStatus.OK
    assert Models.list(page=2, **place).output["models"] == []
    dashscope.base_http_api_url, before = f"{server.url}/api/v1", dashscope.base_http_api_url
    try:  # this call takes no address
        assert Models.get("qwen-plus", api_key="none").output["name"] == "qwen-plus"
        assert Models.get("no-such-model", api_key="none").status_code == HTTPStatus.NOT_FOUND
    finally:
        dashscope.base_http_api_url = before


@pytest.mark.parametrize(
    ("fields", "status", "code", "says"),
    [
        ({"model": "no-such-model"}, 404, "ModelNotFound", "no-such-model"),
        ({"temperature": 9.5}, 400, "InvalidParameter", "parameters.temperature"),
        ({"max_tokens": 0}, 400, "InvalidParameter", "parameters.max_tokens"),
        ({"messages": [{"role": "nobody", "content": "Hello"}]}, 400, "InvalidParameter", "messages[0].role"),
        ({"messages": [{"role": "user", "content": [{"image": "cat.png"}]}]}, 400, "InvalidParameter", "text parts"),
        ({"prompt": "word " * 100_000}, 400, "InvalidParameter", "maximum context length"),
        ({"enable_search": True}, 400, "InvalidParameter", "enable_search"),
        ({"thinking_budget": 100}, 400, "InvalidParameter", "thinking_budget"),
        ({"plugins": "pdf_extracter"}, 400, "InvalidParameter", "Plugin"),
        ({"messages": [{"role": "assistant", "content": "Hel", "partial": True}]}, 400, "InvalidParameter", "partial"),
        ({"n": 2, "result_format": "text"}, 400, "InvalidParameter", "result_format"),
        ({"guided_regex": "("}, 400, "InvalidParameter", "parameters.guided_regex"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_mistake_comes_back_as_status_code_and_message(
    server: Any, stream: bool, fields: dict[str, Any], status: int, code: str, says: str
) -> None:
    answer = ask(server, stream=stream, **fields)
    (answer,) = answer if stream else (answer,)
    assert (answer.status_code, answer.code) == (status, code)
    assert says in answer.message
    assert answer.request_id


def test_the_second_client_raises_and_reads_the_same_answers(server: Any) -> None:
    client = dashscope.Client(base_url=f"{server.url}/api/v1", api_key="none")
    ask_it = partial(client.chat.completions.create, model="qwen-turbo", messages=HELLO, max_tokens=12)
    whole, events = ask_it(), list(ask_it(stream=True))
    assert whole.output_text == "".join(event.delta.content for event in events) == ask(server).output.text
    assert events[-1].choices[0].finish_reason == whole.choices[0].finish_reason == "length"
    assert events[-1].usage.total_tokens == whole.usage.total_tokens
    with pytest.raises(NotFoundError, match="no-such-model"):
        ask_it(model="no-such-model")
    with pytest.raises(BadRequestError, match="temperature"):
        ask_it(temperature=9)
    assert client.tokenization.count(model="qwen-turbo", messages=HELLO).input_tokens == whole.usage.input_tokens
    assert client.models.get("qwen-plus").model == "qwen-plus"
    assert client.models.list().total_count == 1


def test_openais_api_answers_where_the_cloud_has_it(server: Any) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/compatible-mode/v1", api_key="none")
    there, here = (
        one.chat.completions.create(model="qwen-plus", messages=HELLO, max_tokens=12, seed=1234)
        for one in (client, openai.OpenAI(base_url=server.openai, api_key="none"))
    )
    assert there.choices[0].message == here.choices[0].message
    assert list(client.models.list())
    other = dashscope.Client(base_url=f"{server.url}/compatible-mode/v1", api_key="none", protocol="openai")
    pieces = other.chat.completions.create(model="qwen-plus", messages=HELLO, max_tokens=12, seed=1234, stream=True)
    assert "".join(piece.delta.content or "" for piece in pieces if piece.choices) == here.choices[0].message.content


def test_log_probabilities_are_those_of_openais_api(server: Any) -> None:
    theirs = openai.OpenAI(base_url=server.openai, api_key="none").chat.completions.create(
        model="Qwen", messages=HELLO, max_tokens=12, seed=1234, logprobs=True, top_logprobs=2
    )
    expected = [one.model_dump(exclude_none=True) for one in theirs.choices[0].logprobs.content]
    whole = ask(server, logprobs=True, top_logprobs=2)
    assert whole.output.choices[0].logprobs["content"] == expected
    assert len(expected) > 3
    pieces = ask(server, logprobs=True, top_logprobs=2, stream=True, incremental_output=True)
    assert [one for piece in pieces for one in piece.output.choices[0].logprobs["content"]] == expected


def test_an_answer_is_held_to_the_response_format(server: Any) -> None:
    schema = {"type": "object", "properties": {"city": {"enum": ["Paris", "Seoul"]}}, "required": ["city"]}
    form = {"type": "json_schema", "json_schema": {"name": "place", "schema": schema}}
    assert json.loads(ask(server, max_tokens=60, response_format=form).output.text)["city"] in ("Paris", "Seoul")


def test_a_wrong_key_is_told_in_the_apis_shape(start_server: Any) -> None:
    server = start_server("qwen1", "--api-key", "secret")
    for stream in (False, True):
        answer = ask(server, stream=stream)
        (answer,) = answer if stream else (answer,)
        assert (answer.status_code, answer.code) == (401, "InvalidApiKey")
        assert "none" not in answer.message
    assert ask(server, api_key="secret").status_code == HTTPStatus.OK

"""Every error, from whatever layer, has the shape of the API that was called, and names what is wrong."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

CHAT = "/v1/chat/completions"
GENERATION = "/api/v1/services/aigc/text-generation/generation"
HELLO = {"model": "Qwen", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2}


@pytest.fixture
def client(server: Any) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60) as client:
        yield client


def openai_error(answer: httpx.Response) -> dict[str, str | None]:
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-request-id"]
    (key,) = answer.json()
    error: dict[str, str | None] = answer.json()[key]
    assert key == "error"
    assert list(error) == ["message", "type", "param", "code"]
    assert isinstance(error["message"], str)
    assert isinstance(error["type"], str)
    assert error["code"] is None or isinstance(error["code"], str)
    assert error["param"] is None or isinstance(error["param"], str)
    return error


def post(
    client: httpx.Client, content: bytes | str, path: str = CHAT, kind: str = "application/json"
) -> httpx.Response:
    return client.post(path, content=content, headers={"content-type": kind})


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nothing", 404),
        ("POST", f"{CHAT}/", 404),
        ("POST", "/v1/images/generations", 404),
        ("DELETE", "/v1/models", 405),
        ("GET", CHAT, 405),
        ("GET", "/v1/models/nope", 404),
        ("PROPFIND", "/", 405),
    ],
)
def test_errors_of_the_framework_have_openais_shape(client: httpx.Client, method: str, path: str, status: int) -> None:
    answer = client.request(method, path)
    assert answer.status_code == status
    openai_error(answer)


@pytest.mark.parametrize(
    ("body", "found"),
    [
        (b"", "the body"),
        (b"{", "line 1, column 2"),
        (b"[" * 100_000, "lists and objects"),
        (b'{"messages":' + b"[" * 500 + b"]" * 500 + b"}", "nests"),
        (b'{"a":' * 5000 + b"1" + b"}" * 5000, "nests"),
        (b'{"model": "Qwen", "messages": "\xff"}', "UTF-8"),
        (b'\xef\xbb\xbf{"model": "Qwen"}', "BOM"),
        ('{"model": "Qwen"}'.encode("utf-16"), "UTF-8"),
        (b'{"temperature": NaN}', "NaN"),
        (b'{"temperature": -Infinity}', "-Infinity"),
        (b'{"messages": [{"role": "user", "content": "\\ud83d"}]}', "surrogate"),
        (b'{"\\udc00": 1}', "surrogate"),
        (b'{"max_tokens": 1' + b"0" * 5000 + b"}", "number"),
        (b'"text"', "the body"),
        (b"null", "the body"),
        (b"[]", "the body"),
    ],
)
@pytest.mark.parametrize("path", [CHAT, GENERATION])
def test_bodies_that_are_no_object_in_json(client: httpx.Client, body: bytes, found: str, path: str) -> None:
    answer = post(client, body, path)
    assert answer.status_code == 400
    message = answer.json()["message"] if path == GENERATION else openai_error(answer)["message"]
    assert found in str(message)


def test_pairs_of_surrogates_are_characters(client: httpx.Client) -> None:
    body = json.dumps(HELLO | {"messages": [{"role": "user", "content": "😀"}]}, ensure_ascii=True)
    assert "\\ud83d" in body
    assert post(client, body).status_code == 200


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"])
def test_other_types_of_content_are_refused(client: httpx.Client, kind: str) -> None:
    answer = post(client, json.dumps(HELLO), kind=kind)
    assert answer.status_code == 415
    assert kind.split(";", maxsplit=1)[0] in str(openai_error(answer)["message"])
    assert client.post(CHAT, content=json.dumps(HELLO)).status_code == 415


@pytest.mark.parametrize("kind", ["application/json; charset=utf-8", "Application/JSON", "application/vnd.api+json"])
def test_spellings_of_json(client: httpx.Client, kind: str) -> None:
    assert post(client, json.dumps(HELLO), kind=kind).status_code == 200


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": 1e999}, None),  # written as Infinity
        ({"temperature": 3}, "temperature"),
        ({"top_p": [1]}, "top_p"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 10**400}, "max_tokens"),
        ({"stream": "perhaps"}, "stream"),
        ({"messages": []}, "messages"),
        ({"messages": "Hello"}, "messages"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": [3]}, "messages[0]"),
        ({"stop": 5}, "stop"),
        ({"model": 7}, "model"),
        ({"model": "nope"}, "model"),
    ],
)
def test_a_wrong_field_is_named(client: httpx.Client, change: dict[str, object], param: str | None) -> None:
    answer = post(client, json.dumps(HELLO | change))
    assert answer.status_code in (400, 404)
    error = openai_error(answer)
    assert error["param"] == param
    assert (param or "Infinity") in str(error["message"])


def test_a_message_never_repeats_the_prompt(client: httpx.Client) -> None:
    secret = "the wallet is under the oak"
    answer = post(client, json.dumps(HELLO | {"messages": secret, "temperature": secret, "stop": {"a": secret}}))
    assert answer.status_code == 400
    assert secret not in answer.text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_tokens": 12.0}, "max_tokens: Input should be a valid integer (found 12.0)."),
        ({"logit_bias": {"x": 1}}, "logit_bias: the keys must be token ids (found an object)."),
    ],
)
def test_a_message_says_what_was_asked_in_plain_words(
    client: httpx.Client, change: dict[str, object], message: str
) -> None:
    assert openai_error(post(client, json.dumps(HELLO | change)))["message"] == message


def test_missing_fields_are_named(client: httpx.Client) -> None:
    answer = post(client, json.dumps({"model": "Qwen"}))
    assert openai_error(answer)["param"] == "messages"


def test_a_prompt_beyond_the_context_is_refused_before_a_stream_begins(client: httpx.Client) -> None:
    long = [{"role": "user", "content": "word " * 20_000}]
    answer = post(client, json.dumps(HELLO | {"messages": long, "stream": True}))
    assert answer.status_code == 400
    error = openai_error(answer)
    assert error["code"] == "context_length_exceeded"
    assert str(error["message"]).startswith("This model's maximum context length is ")


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "code"),
    [
        ("GET", "/api/v1/nothing", None, 404, "InvalidParameter"),
        ("GET", GENERATION, None, 405, "InvalidParameter"),
        ("POST", GENERATION, {"model": "nope", "input": {"prompt": "x"}}, 404, "ModelNotFound"),
        ("POST", GENERATION, {"model": "qwen-turbo", "input": 5}, 400, "InvalidParameter"),
        ("POST", GENERATION, {"model": "qwen-turbo"}, 400, "InvalidParameter"),
    ],
)
def test_dashscopes_paths_have_dashscopes_errors(
    client: httpx.Client, method: str, path: str, body: object, status: int, code: str
) -> None:
    answer = client.request(method, path, json=body)
    assert answer.status_code == status
    assert set(answer.json()) == {"code", "message", "request_id"}
    assert answer.json()["code"] == code
    assert answer.json()["request_id"] == answer.headers["x-request-id"]

"""/tokenize and /detokenize over HTTP, against the tokenizer itself and the engine's own counts."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from kiloq.checkpoint import bundled
from kiloq.tokenizer import Tokenizer

TEXTS = ["Hello, world", "你好，世界", "가나다 🙂 é", " \n\t ", "<|im_start|>system\n<|im_end|>", "a" * 30_000]


@pytest.fixture(scope="module")
def http(server: Any) -> httpx.Client:
    return httpx.Client(base_url=server.url, timeout=60, trust_env=False)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(bundled())


@pytest.mark.parametrize("text", TEXTS)
def test_tokens_are_the_tokenizers_and_give_the_text_back(http: httpx.Client, tokenizer: Tokenizer, text: str) -> None:
    told = http.post("/tokenize", json={"prompt": text, "return_token_strs": True}).json()
    assert told["tokens"] == tokenizer.encode(text)
    assert told["count"] == len(told["tokens"]) == len(told["token_strs"])
    assert http.post("/detokenize", json={"tokens": told["tokens"]}).json() == {"prompt": text}


def test_a_name_becomes_a_control_token_only_when_that_is_asked_for(http: httpx.Client, tokenizer: Tokenizer) -> None:
    def count(**more: object) -> list[int]:
        ids: list[int] = http.post("/tokenize", json={"prompt": "<|im_end|>", **more}).json()["tokens"]
        return ids

    assert tokenizer.im_end_id not in count()
    assert tokenizer.im_end_id not in count(add_special_tokens=True)
    assert count(parse_special=True) == [tokenizer.im_end_id]


@pytest.mark.parametrize("generation", ["qwen1", "qwen2.5", "qwen3"])
def test_messages_count_as_many_tokens_as_their_answer_is_charged(
    start_server: Callable[..., Any], generation: str
) -> None:
    server = start_server(generation)
    messages = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Hello <|im_end|>"}]
    told = httpx.post(f"{server.url}/tokenize", json={"messages": messages}).json()
    client = openai.OpenAI(base_url=server.openai, api_key="none")
    prompt = client.completions.create(model="Qwen", prompt=told["tokens"], max_tokens=1)
    answer = client.chat.completions.create(model="Qwen", messages=messages, max_tokens=1)
    assert prompt.usage
    assert answer.usage
    assert told["count"] == prompt.usage.prompt_tokens == answer.usage.prompt_tokens
    assert told["max_model_len"] == client.models.retrieve("Qwen").max_model_len
    shorter = httpx.post(f"{server.url}/tokenize", json={"messages": messages, "add_generation_prompt": False}).json()
    assert shorter["tokens"] == told["tokens"][: shorter["count"]]
    assert shorter["count"] < told["count"]


@pytest.mark.parametrize(
    ("path", "body", "named"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": []}, "prompt"),
        ("/tokenize", {"prompt": 7}, "prompt"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/tokenize", {"messages": [{"role": "nobody", "content": ""}]}, "messages[0].role"),
        ("/tokenize", {"prompt": "a", "model": "no-such-model"}, "no-such-model"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": "abc"}, "tokens"),
        ("/detokenize", {"tokens": [1, -1]}, "tokens[1]"),
        ("/detokenize", {"tokens": [10**30]}, "tokens[0]"),
        ("/detokenize", {"tokens": [1.5]}, "tokens[0]"),
        ("/detokenize", {"tokens": [True]}, "tokens[0]"),
        ("/detokenize", {"tokens": [[1]]}, "tokens[0]"),
    ],
)
def test_a_mistake_is_named(http: httpx.Client, path: str, body: dict[str, object], named: str) -> None:
    answer = http.post(path, json=body)
    assert answer.status_code == (404 if "model" in body else 400)
    assert named in answer.json()["error"]["message"]


def test_every_row_of_the_model_has_a_text(http: httpx.Client, model_of: Callable[[str], Path]) -> None:
    told = http.post("/detokenize", json={"tokens": list(range(4096))})
    assert told.status_code == 200
    assert told.json()["prompt"]

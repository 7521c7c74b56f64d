"""/v1/embeddings as OpenAI's client reads it, against the model's own hidden states."""

import base64
import json
import math
import struct
from typing import Any

import httpx
import openai
import pytest
import torch

from kiloq import LLM
from kiloq.model import PackedAttend, ntk_alpha
from kiloq.tokenizer import Tokenizer

TEXTS = ["A cat sat on the mat.", "你好，世界", "x", "word " * 100]


@torch.no_grad()
def _mean_state(llm: LLM, text: str) -> list[float]:
    """The plain definition: all tokens through the model without a cache, averaged, brought to length 1."""
    ids = torch.tensor(llm.tokenizer.encode(text))
    rotation = llm.model.rotation(torch.arange(len(ids)), ntk_alpha(llm.config, len(ids)))
    mean = llm.model(ids, rotation, PackedAttend([0, len(ids)], llm.config.windows)).float().mean(0)
    vector: list[float] = (mean / mean.norm()).tolist()
    return vector


def test_a_vector_is_the_mean_of_the_hidden_states(client: openai.OpenAI, llm: LLM) -> None:
    answer = client.embeddings.create(model="Qwen", input=TEXTS)
    assert [one.index for one in answer.data] == list(range(len(TEXTS)))
    for text, one in zip(TEXTS, answer.data, strict=True):
        assert one.embedding == pytest.approx(_mean_state(llm, text), abs=1e-4)
        assert math.hypot(*one.embedding) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("form", ["text", "texts", "ids", "lists of ids"])
def test_every_form_of_input_gives_the_same_vectors(client: openai.OpenAI, tokenizer: Tokenizer, form: str) -> None:
    ids = [tokenizer.encode(text) for text in TEXTS]
    given: Any = {"text": TEXTS[0], "texts": TEXTS, "ids": ids[0], "lists of ids": ids}[form]
    want = client.embeddings.create(model="Qwen", input=TEXTS).data
    got = client.embeddings.create(model="Qwen", input=given)
    assert len(got.data) == (1 if form in ("text", "ids") else len(TEXTS))
    for one, other in zip(got.data, want, strict=False):
        assert one.embedding == pytest.approx(other.embedding, abs=1e-5)
    assert got.usage.prompt_tokens == got.usage.total_tokens == sum(map(len, ids[: len(got.data)]))


def test_base64_holds_the_same_numbers(server: Any) -> None:
    def ask(form: str) -> Any:
        body = {"model": "Qwen", "input": "Hello", "encoding_format": form}
        answer = httpx.post(f"{server.openai}/embeddings", json=body, trust_env=False)
        return answer.json()["data"][0]["embedding"]

    raw = base64.b64decode(ask("base64"), validate=True)
    numbers = ask("float")
    assert list(struct.unpack(f"<{len(raw) // 4}f", raw)) == pytest.approx(numbers, abs=1e-6)


def test_only_the_models_own_dimensions_are_served(client: openai.OpenAI, llm: LLM) -> None:
    size = llm.config.hidden_size
    assert len(client.embeddings.create(model="Qwen", input="a", dimensions=size).data[0].embedding) == size
    with pytest.raises(openai.BadRequestError, match="dimensions"):
        client.embeddings.create(model="Qwen", input="a", dimensions=size // 2)


def test_vectors_come_while_answers_are_made(client: openai.OpenAI) -> None:
    asked: Any = {"prompt": "Hello", "max_tokens": 300, "extra_body": {"ignore_eos": True}}
    stream = client.completions.create(model="Qwen", stream=True, **asked)
    next(stream)
    assert len(client.embeddings.create(model="Qwen", input=TEXTS * 4).data) == 16
    assert [choice.finish_reason for chunk in stream for choice in chunk.choices][-1] == "length"


MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({}, "input"),
    ({"input": ""}, "input"),
    ({"input": []}, "input"),
    ({"input": ["a", ""]}, "input[1]"),
    ({"input": [[]]}, "input[0]"),
    ({"input": [1, -1]}, "input[1]"),
    ({"input": [[1, 10**20]]}, "input[0][1]"),
    ({"input": 5}, "input"),
    ({"input": ["a"] * 2049}, "2,049"),
    ({"input": "a", "encoding_format": "hex"}, "encoding_format"),
    ({"input": "a", "dimensions": 0}, "dimensions"),
    ({"input": "long " * 20_000}, "maximum context length"),
    ({"input": ["a", "long " * 20_000]}, "maximum context length"),
]


@pytest.mark.parametrize(("body", "named"), MISTAKES, ids=[json.dumps(body)[:50] for body, _ in MISTAKES])
def test_a_mistake_is_a_400_that_names_its_field(server: Any, body: dict[str, Any], named: str) -> None:
    answer = httpx.post(f"{server.openai}/embeddings", json={"model": "Qwen", **body}, timeout=30, trust_env=False)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert named in error["message"]
    assert error["param"], error

"""/v1/models as OpenAI's own client reads it."""

from typing import Any

import httpx
import openai
import pytest

from kiloq.serve.service import ALIASES


@pytest.fixture(params=["qwen1", "qwen2.5", "qwen3"])
def client(request: pytest.FixtureRequest, start_server: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=start_server(request.param).openai, api_key="none")


def test_every_listed_model_can_be_retrieved_and_answers(client: openai.OpenAI) -> None:
    listed = list(client.models.list())
    assert listed
    for model in listed:
        assert client.models.retrieve(model.id) == model
        stream = client.chat.completions.create(
            model=model.id, messages=[{"role": "user", "content": "Hello"}], max_tokens=4, stream=True
        )
        assert "".join(chunk.choices[0].delta.content or "" for chunk in stream)


def test_names_that_clients_know_are_the_served_model(client: openai.OpenAI) -> None:
    (served,) = client.models.list()
    for alias in ALIASES:
        model = client.models.retrieve(alias)
        assert model.id == alias
        assert model.created == served.created
        assert model.max_model_len == served.max_model_len > 0


@pytest.mark.parametrize("name", ["no-such-model", "Qwen/No-Such", "模型", "..", "%00", "a" * 3000])
def test_an_unknown_model_is_not_found(server: Any, name: str) -> None:
    answer = httpx.get(f"{server.openai}/models/{name}", trust_env=False)
    assert answer.status_code in (404, 400), answer.text
    assert answer.json()["error"]["code"] in ("model_not_found", "not_found")
    client = openai.OpenAI(base_url=server.openai, api_key="none", max_retries=0)
    with pytest.raises(openai.NotFoundError) as caught:
        client.completions.create(model=name, prompt="Hello")
    assert caught.value.param == "model"

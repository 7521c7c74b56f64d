"""/v1/models as OpenAI's own client reads it."""

from typing import Any

import openai
import pytest


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


def test_an_unknown_model_is_not_found(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="no-such-model"):
        client.models.retrieve("no-such-model")

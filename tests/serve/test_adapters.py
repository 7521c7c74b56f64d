"""LoRA adapters behind `kiloq serve --lora`: each answers under its own name, and none touches another's answers."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import pytest

from kiloq.checkpoint import bundled
from kiloq.cli.main import run
from tests.engine.test_adapters import v1_adapter

MESSAGES: Any = [{"role": "user", "content": "Tell me a short story about a cat that could not sleep at night."}]
MODELS = ("Qwen", "one", "other")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two adapters, which differ in their strength."""
    root = tmp_path_factory.mktemp("adapters")
    for name in MODELS[1:]:
        v1_adapter(bundled(), root / name)
    settings = root / "other" / "adapter_config.json"
    settings.write_text(settings.read_text().replace('"lora_alpha": 8', '"lora_alpha": 4'))
    return {name: root / name for name in MODELS[1:]}


@pytest.fixture(scope="module")
def url(start_server: Any, folders: dict[str, Path]) -> str:
    lora = [text for name, folder in folders.items() for text in ("--lora", f"{name}={folder}")]
    # fp32: the same rows, computed beside others, give the same numbers
    return str(start_server("qwen1", "--dtype", "float32", *lora).openai)


@pytest.fixture(scope="module")
def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=url, api_key="none", max_retries=0)


def asked(model: str, **more: Any) -> dict[str, Any]:
    return {"model": model, "messages": MESSAGES, "max_tokens": 24, "temperature": 0, **more}


def test_adapters_are_listed_with_the_model_they_change(client: openai.OpenAI) -> None:
    models = {model.id: model for model in client.models.list()}
    assert {name: model.model_extra and model.model_extra["parent"] for name, model in models.items()} == {
        "kiloq-mini-chat": None,
        "one": "kiloq-mini-chat",
        "other": "kiloq-mini-chat",
    }
    assert client.models.retrieve("one") == models["one"]


def test_an_adapter_answers_under_its_own_name_in_every_api_but_embeddings(client: openai.OpenAI) -> None:
    chats = [client.chat.completions.create(**asked(model)).choices[0].message.content for model in MODELS]
    prompt = {"prompt": "Once upon a time", "max_tokens": 8, "temperature": 0}
    texts = [client.completions.create(model=model, **prompt).choices[0].text for model in MODELS]
    asks = {"input": MESSAGES, "max_output_tokens": 24, "temperature": 0}
    responses = [client.responses.create(model=model, **asks).output_text for model in MODELS]
    assert len(set(chats)) == len(set(texts)) == len(MODELS)
    assert responses == chats
    with pytest.raises(openai.BadRequestError, match="one is an adapter"):
        client.embeddings.create(model="one", input="a cat")


def test_requests_of_all_adapters_at_once_get_what_each_gets_alone(url: str, client: openai.OpenAI) -> None:
    alone = [client.chat.completions.create(**asked(model)).choices[0].message.content for model in MODELS]

    async def together() -> list[str | None]:
        async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as several:
            answers = await asyncio.gather(*(several.chat.completions.create(**asked(name)) for name in MODELS * 4))
        return [answer.choices[0].message.content for answer in answers]

    assert asyncio.run(together()) == alone * 4


def test_a_prefix_is_never_shared_across_adapters(client: openai.OpenAI) -> None:
    messages: Any = [{"role": "user", "content": "A question that no other test asks, of some length: how do " * 3}]

    def cached(model: str) -> int:
        usage = client.chat.completions.create(**asked(model) | {"messages": messages}).usage
        assert usage is not None
        assert usage.prompt_tokens_details is not None
        return usage.prompt_tokens_details.cached_tokens or 0

    first, second = [cached(model) for model in MODELS], [cached(model) for model in MODELS]
    assert max(first) <= 16  # at most the system message, which earlier tests had too
    assert min(second) > 16


def test_an_unknown_adapter_is_not_found(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="Served here: kiloq-mini-chat, one, other") as caught:
        client.chat.completions.create(**asked("another"))
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


def broken(folder: Path) -> tuple[str, ...]:
    (folder / "adapter_config.json").write_text("{")
    return (f"tuned={folder}",)


REFUSED: dict[str, tuple[Callable[[Path], tuple[str, ...]], str]] = {
    "no such folder": (lambda folder: (f"tuned={folder}-none",), "adapter"),
    "a broken folder": (broken, "adapter_config.json"),
    "no name": (lambda folder: (str(folder),), "NAME=DIR"),
    "the model's name": (lambda folder: (f"kiloq-mini-chat={folder}",), "given twice"),
    "another adapter's name": (lambda folder: (f"a={folder}", f"a={folder}"), "given twice"),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_what_cannot_be_served_is_one_line_and_exit_code_1(
    fault: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    v1_adapter(bundled(), tmp_path / "adapter")
    given, word = REFUSED[fault]
    lora = [text for one in given(tmp_path / "adapter") for text in ("--lora", one)]
    assert run(["serve", "--port", "0", *lora]) == 1
    out, err = capsys.readouterr()
    (line,) = err.splitlines()
    assert out == ""
    assert word in line

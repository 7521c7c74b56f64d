"""Clients that people really use, unmodified, against a real server; none may speak to anything but loopback."""

import asyncio
import json
import os
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pydantic
import pytest

NPM = Path(__file__).parent / "npm"
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'
PARAMETERS = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
    "additionalProperties": False,
}
FUNCTION = {"name": "get_weather", "description": "Weather of a city", "parameters": PARAMETERS}
TOOL: Any = {"type": "function", "function": FUNCTION}
HELLO: Any = [{"role": "user", "content": "Hello"}]


class Weather(pydantic.BaseModel):
    """What a model that writes JSON may fill in."""

    sunny: bool
    wind: int


@pytest.fixture(scope="module")
def url(start_server: Callable[..., Any]) -> str:
    address: str = start_server("qwen2.5").openai
    return address


@pytest.fixture(autouse=True)
def only_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients like to fetch price lists and to tell how they are used."""
    connect = socket.socket.connect

    def connect_here(self: socket.socket, address: Any) -> None:
        is_here = self.family == socket.AF_UNIX or address[0] in ("127.0.0.1", "::1", "localhost")
        assert is_here, f"a client wanted to speak to {address}"
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", connect_here)


def _says(text: str) -> dict[str, Any]:
    """The rest of a request whose answer is known."""
    return {"temperature": 0, "extra_body": {"guided_choice": [text]}}


# The clients of OpenAI, at once and in turns.


def test_openai_async_streams_do_not_wait_for_each_other(url: str) -> None:
    async def one(client: openai.AsyncOpenAI, text: str) -> str:
        stream = await client.chat.completions.create(model="Qwen", messages=HELLO, stream=True, **_says(text))
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    async def all_of(texts: list[str]) -> list[str]:
        async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
            return await asyncio.gather(*(one(client, text) for text in texts))

    texts = [f"This is answer number {number}." for number in range(12)]
    assert asyncio.run(all_of(texts)) == texts


def test_openai_async_whole_answers_of_every_api(url: str) -> None:
    async def ask() -> tuple[str | None, str, str, int]:
        async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
            chat = await client.chat.completions.create(model="Qwen", messages=HELLO, **_says("one"))
            text = await client.completions.create(model="Qwen", prompt="Hello", **_says("two"))
            response = await client.responses.create(model="Qwen", input="Hello", **_says("three"))
            vectors = await client.embeddings.create(model="Qwen", input=["a", "b"])
            return chat.choices[0].message.content, text.choices[0].text, response.output_text, len(vectors.data)

    assert asyncio.run(ask()) == ("one", "two", "three", 2)


# LangChain.


@pytest.fixture(scope="module")
def langchain(url: str) -> Callable[..., Any]:
    module = pytest.importorskip("langchain_openai", reason="langchain-openai is not installed")

    def model(**more: Any) -> Any:
        return module.ChatOpenAI(base_url=url, api_key="none", model="Qwen", max_retries=0, **more)

    return model


@pytest.mark.parametrize("api", ["chat", "responses"])
def test_langchain_invokes_and_streams_the_same_text(langchain: Callable[..., Any], api: str) -> None:
    model = langchain(use_responses_api=api == "responses", **_says("Hello, world"))
    whole = model.invoke("Hi")
    chunks = list(model.stream("Hi", stream_usage=True) if api == "chat" else model.stream("Hi"))
    assert whole.text == "".join(chunk.text for chunk in chunks) == "Hello, world"
    assert len(chunks) > 2
    usages = [chunk.usage_metadata for chunk in chunks if chunk.usage_metadata]
    assert usages[-1]["total_tokens"] == whole.usage_metadata["total_tokens"] > 0


@pytest.mark.parametrize("api", ["chat", "responses"])
def test_langchain_goes_round_with_a_tool(langchain: Callable[..., Any], api: str) -> None:
    from langchain_core.messages import HumanMessage, ToolMessage

    question = HumanMessage("Weather in Paris?")
    model = langchain(use_responses_api=api == "responses", temperature=0)
    asks = model.bind(extra_body={"guided_choice": [CALL]}).bind(tools=[TOOL])
    answer = asks.invoke([question])
    (call,) = answer.tool_calls
    assert (call["name"], call["args"]) == ("get_weather", {"city": "Paris"})
    streamed = None
    for chunk in asks.stream([question]):
        streamed = chunk if streamed is None else streamed + chunk
    assert streamed is not None
    assert streamed.tool_calls[0]["args"] == {"city": "Paris"}
    says = model.bind(extra_body={"guided_choice": ["It is sunny."]}).bind(tools=[TOOL])
    final = says.invoke([question, answer, ToolMessage("Sunny", tool_call_id=call["id"])])
    assert final.text == "It is sunny."


def test_langchain_binds_functions_and_must_call_them(langchain: Callable[..., Any]) -> None:
    def get_weather(city: str) -> str:
        """Weather of a city."""
        return city

    answer = langchain(temperature=0, max_tokens=100).bind_tools([get_weather], tool_choice="any").invoke("Paris?")
    if answer.response_metadata["finish_reason"] != "length":  # a small model may write a long name
        assert [call["name"] for call in answer.tool_calls] == ["get_weather"]
        assert isinstance(answer.tool_calls[0]["args"]["city"], str)


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_langchain_structured_output_is_of_its_class(langchain: Callable[..., Any], method: str) -> None:
    model = langchain(temperature=0, max_tokens=100).with_structured_output(Weather, method=method)
    assert isinstance(model.invoke("How is the weather?"), Weather)


def test_langchain_embeds(url: str) -> None:
    module = pytest.importorskip("langchain_openai", reason="langchain-openai is not installed")
    # Without the check it sends text; with it, token ids of another vocabulary.
    model = module.OpenAIEmbeddings(base_url=url, api_key="none", model="Qwen", check_embedding_ctx_length=False)
    alone = model.embed_query("a cat")
    several = model.embed_documents(["a cat", "a dog"])
    assert several[0] == pytest.approx(alone, abs=1e-2)
    assert several[0] != several[1]


# LiteLLM.


@pytest.fixture(scope="module")
def litellm(url: str) -> Iterator[Callable[..., Any]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # else its import fetches prices
        module = pytest.importorskip("litellm", reason="litellm is not installed")
        patch.setattr(module, "suppress_debug_info", True)

        def call(function: str, **more: Any) -> Any:
            return getattr(module, function)(model="openai/Qwen", api_base=url, api_key="none", num_retries=0, **more)

        yield call


def test_litellm_completes_and_streams(litellm: Callable[..., Any]) -> None:
    whole = litellm("completion", messages=HELLO, **_says("Hello, world"))
    assert whole.choices[0].message.content == "Hello, world"
    assert whole.usage.total_tokens > 0
    stream = litellm("completion", messages=HELLO, stream=True, **_says("Hello, world"))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == "Hello, world"


@pytest.mark.parametrize("stream", [False, True])
def test_litellm_calls_tools(litellm: Callable[..., Any], stream: bool) -> None:
    import litellm as module

    pytest.importorskip("mcp", reason="mcp is not installed, without which litellm passes no tools on")
    asked: dict[str, Any] = {"messages": HELLO, "tools": [TOOL], "tool_choice": "auto", **_says(CALL)}
    answer = litellm("completion", stream=stream, **asked)
    if stream:
        answer = module.stream_chunk_builder(list(answer))
    (call,) = answer.choices[0].message.tool_calls
    assert call.function.name == "get_weather"
    assert json.loads(call.function.arguments) == {"city": "Paris"}
    assert answer.choices[0].finish_reason == "tool_calls"


def test_litellm_completes_texts(litellm: Callable[..., Any]) -> None:
    answer = litellm("text_completion", prompt="Hello", max_tokens=5, **_says("one two"))
    assert answer.choices[0].text == "one two"
    pieces = litellm("text_completion", prompt="Hello", max_tokens=5, stream=True, **_says("one two"))
    assert "".join(chunk.choices[0].text or "" for chunk in pieces) == "one two"


def test_litellm_embeds(litellm: Callable[..., Any]) -> None:
    answer = litellm("embedding", input=["a cat", "a dog"], encoding_format="float")
    assert [one["index"] for one in answer.data] == [0, 1]
    assert len(answer.data[0]["embedding"]) == len(answer.data[1]["embedding"]) > 0


def test_litellm_knows_our_errors(litellm: Callable[..., Any]) -> None:
    import litellm as module

    with pytest.raises(module.ContextWindowExceededError):
        litellm("completion", messages=[{"role": "user", "content": "long " * 20_000}])
    with pytest.raises(module.BadRequestError):
        litellm("completion", messages=HELLO, temperature=9)


# The npm client of OpenAI: one process goes through all of it, and the tests look at what it says.


@pytest.fixture(scope="module")
def npm(url: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    if not (shutil.which("node") and shutil.which("npm")):
        pytest.skip("node and npm are not installed")
    folder = tmp_path_factory.mktemp("npm")
    for name in ("package.json", "package-lock.json", "client.mjs"):
        shutil.copy(NPM / name, folder)
    install = ["npm", "ci", "--prefer-offline", "--no-audit", "--no-fund", "--ignore-scripts", "--fetch-retries=0"]
    done = subprocess.run(install, check=False, cwd=folder, capture_output=True, text=True, timeout=120)
    if any(word in done.stderr for word in ("ENOTFOUND", "EAI_AGAIN", "ECONNREFUSED", "ETIMEDOUT", "ECONNRESET")):
        pytest.skip("the npm registry cannot be reached")
    assert done.returncode == 0, done.stderr
    run = subprocess.run(
        ["node", "client.mjs", url],
        check=False,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "NO_PROXY": "127.0.0.1"},
    )
    assert run.returncode == 0, run.stderr
    told: dict[str, Any] = json.loads(run.stdout)
    return told


def test_npm_lists_models(npm: dict[str, Any]) -> None:
    assert npm["models"]["retrieved"] == npm["models"]["ids"][0]


def test_npm_chats_and_streams(npm: dict[str, Any]) -> None:
    assert npm["chat"]["choices"][0]["message"]["content"] == npm["chat_stream"]["text"] == "Hello, world"
    assert npm["chat_stream"]["usage"]["total_tokens"] == npm["chat"]["usage"]["total_tokens"]


def test_npm_gets_tool_calls_whole_and_streamed(npm: dict[str, Any]) -> None:
    for choice in npm["chat_tools"].values():
        (call,) = choice["message"]["tool_calls"]
        assert choice["finish_reason"] == "tool_calls"
        assert call["function"]["name"] == "get_weather"
        assert json.loads(call["function"]["arguments"]) == {"city": "Paris"}


def test_npm_completes_texts(npm: dict[str, Any]) -> None:
    assert [choice["text"] for choice in npm["completion"]["choices"]] == ["one two", "one two"]


def test_npm_reads_responses_and_their_events(npm: dict[str, Any]) -> None:
    assert npm["response"]["output_text"] == "Hello, world"
    stream = npm["response_stream"]
    assert stream["types"][0] == "response.created"
    assert stream["types"][-1] == "response.completed"
    assert json.loads(stream["output"][0]["arguments"]) == {"city": "Paris"}


def test_npm_decodes_embeddings(npm: dict[str, Any]) -> None:
    told = npm["embeddings"]
    assert len(told["asked"]) == 2
    for asked, floats in zip(told["asked"], told["floats"], strict=True):
        assert asked == pytest.approx(floats, abs=1e-6)


def test_npm_raises_its_own_errors(npm: dict[str, Any]) -> None:
    assert npm["error"]["name"] == "NotFoundError"
    assert (npm["error"]["status"], npm["error"]["code"]) == (404, "model_not_found")

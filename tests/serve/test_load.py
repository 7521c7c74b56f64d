"""Many different requests at once, some of whose clients go: each answer is the one that its request gets alone."""

import asyncio
import json
import random
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
import uvicorn

from kiloq import LLM
from kiloq.serve.app import create_app
from kiloq.serve.bridge import BridgeConfig, EngineThread
from kiloq.serve.service import ServeConfig, Service

CHAT = "/v1/chat/completions"
TOOLS: Any = [
    {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": {}}}}
    for name in ("look", "listen")
]
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer", "maximum": 99}}, "required": ["a"]}
KINDS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "drawn": {"temperature": 1, "top_p": 0.9, "top_k": 40},
    "several, with log probabilities": {"temperature": 1.2, "n": 2, "logprobs": True, "top_logprobs": 2},
    "stop strings": {"temperature": 1, "stop": [" the", "a ", "。"]},
    "penalties and biases": {"temperature": 0.7, "presence_penalty": 1, "logit_bias": {"11": 5}, "min_p": 0.05},
    "a tool": {"temperature": 1, "tools": TOOLS, "tool_choice": "required"},
    "perhaps a tool": {"temperature": 1, "tools": TOOLS, "n": 2},
    "a schema": {
        "temperature": 1,
        "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}},
    },
    "an expression": {"temperature": 1, "guided_regex": "([a-z]{2,5} ){3}[0-9]{2}", "repetition_penalty": 1.3},
    "characters of several tokens": {"temperature": 0, "guided_choice": ["🙂 好的 👩‍👩‍👧 é한국"]},
}
MEMORY = 6 << 20  # bytes of keys and values
QUESTIONS = ("请讲一个故事。", "What is 17 + 25? " * 12)


def bodies() -> list[dict[str, Any]]:
    """Every kind with every question, each with a seed of its own."""
    asked = [(kind, question) for question in QUESTIONS for kind in KINDS.values()]
    return [
        {"model": "mini", "max_tokens": 64, "seed": seed, "messages": [{"role": "user", "content": question}], **kind}
        for seed, (kind, question) in enumerate(asked)
    ]


@asynccontextmanager
async def served() -> AsyncIterator[tuple[httpx.AsyncClient, EngineThread]]:
    """A server on a port of its own whose engine looks for lost blocks, and a client of it."""
    # fp32: a batch rounds as one row does. Little memory: some answers must give up their room to others.
    llm = LLM(max_batch=12, max_context=1024, dtype="float32", kv_dtype="float32", kv_memory=MEMORY)
    engine = EngineThread(llm, BridgeConfig(check_integrity=True))
    service = Service(llm=llm, engine=engine, config=ServeConfig(names=("mini",), log_format="none"))
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = uvicorn.Server(uvicorn.Config(create_app(service), log_level="error", ws="none"))
        serving = asyncio.create_task(server.serve([listening]))
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        async with httpx.AsyncClient(base_url=url, timeout=300, limits=httpx.Limits()) as client:
            yield client, engine
        server.should_exit = True
        await serving


Told = tuple[list[object], list[float]]


def told(choices: list[dict[str, Any]]) -> Told:
    """What choices say, without the ids of their calls; and their log probabilities."""
    said: list[object] = []
    logprobs: list[float] = []
    for choice in choices:
        message = choice["message"]
        calls = [(call["function"]["name"], call["function"]["arguments"]) for call in message.get("tool_calls", ())]
        tokens = (choice["logprobs"] or {}).get("content", ())
        said += [message["content"] or "", calls, [token["token"] for token in tokens], choice["finish_reason"]]
        logprobs += [token["logprob"] for token in tokens]
    return said, logprobs


async def whole(client: httpx.AsyncClient, body: dict[str, Any]) -> Told:
    response = await client.post(CHAT, json=body)
    assert response.status_code == 200, response.text
    return told(response.json()["choices"])


async def streamed(client: httpx.AsyncClient, body: dict[str, Any], most: int | None = None) -> Told:
    """The same from a stream; `most`: the client goes after so many events."""
    choices: dict[int, dict[str, Any]] = {}
    async with client.stream("POST", CHAT, json={**body, "stream": True}) as stream:
        number = 0
        async for line in stream.aiter_lines():
            if line.startswith("data: {"):
                for choice in json.loads(line.removeprefix("data: "))["choices"]:
                    add(choices.setdefault(choice["index"], {}), choice)
                number += 1
            if number == most:
                break
    return told([choices[index] for index in sorted(choices)])


def add(whole: dict[str, Any], piece: dict[str, Any]) -> None:
    """A piece of a choice to what came before it."""
    message = whole.setdefault("message", {"content": "", "tool_calls": []})
    message["content"] += piece["delta"].get("content", "")
    for call in piece["delta"].get("tool_calls", ()):
        if call["index"] == len(message["tool_calls"]):
            message["tool_calls"].append(call)
        else:
            message["tool_calls"][call["index"]]["function"]["arguments"] += call["function"]["arguments"]
    tokens = whole.setdefault("logprobs", {"content": []})
    tokens["content"] += (piece["logprobs"] or {}).get("content", ())
    whole["finish_reason"] = piece["finish_reason"]


def test_beside_others_every_answer_is_the_one_that_its_request_gets_alone() -> None:
    asked, draw = bodies(), random.Random(0)

    async def test() -> None:
        async with served() as (client, engine):
            alone = [await whole(client, body) for body in asked]
            assert engine.stats.preempted == 0
            together = [streamed(client, body) if draw.random() < 0.5 else whole(client, body) for body in asked]
            going = [streamed(client, body, most=draw.randrange(1, 9)) for body in asked]
            mixed = [one for pair in zip(together, going, strict=True) for one in pair]
            answers = (await asyncio.gather(*mixed))[::2]
            for body, (said, logprobs), (expected, numbers) in zip(asked, answers, alone, strict=True):
                assert said == expected, body
                assert logprobs == pytest.approx(numbers, abs=1e-3)
            stats = await engine.run(lambda llm: llm.engine.stats)
            assert (stats.running, stats.waiting, stats.blocks_available) == (0, 0, stats.blocks)
            assert stats.preempted > 0, "the cache was so large that nothing was hard"
            assert engine.healthy

    asyncio.run(asyncio.wait_for(test(), 300))

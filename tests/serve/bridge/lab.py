"""What tests of the bridge need: an engine's thread, and ways to ask it."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

from kiloq import LLM, SamplingParams
from kiloq.engine import Event
from kiloq.engine.events import EngineStats
from kiloq.serve.bridge import AnswerStream, BridgeConfig, EngineThread

LONG = SamplingParams(max_tokens=400, temperature=0, ignore_eos=True)
SHORT = SamplingParams(max_tokens=4, temperature=0, ignore_eos=True)


@asynccontextmanager
async def engine_of(llm: LLM, **limits: Any) -> AsyncIterator[EngineThread]:
    """A started thread; at the end, nothing may be left of what it was asked."""
    engine = EngineThread(llm, BridgeConfig(check_integrity=True, **limits))
    engine.start()
    try:
        yield engine
        await idle(engine)
    finally:
        engine.stop()


async def idle(engine: EngineThread) -> None:
    """Law: no request is left, and no block is in use."""
    stats = await now(engine)
    assert (stats.running, stats.waiting) == (0, 0)
    assert stats.blocks_available == stats.blocks
    assert engine.healthy


async def now(engine: EngineThread) -> EngineStats:
    """What the engine is doing after all that was asked of it until now."""
    return await engine.run(lambda llm: llm.engine.stats)


async def read(stream: AnswerStream) -> list[Event]:
    return [event async for events in stream for event in events]


def text_of(events: list[Event]) -> str:
    return "".join(event.text for event in events)


def during(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 300))


def prompt(llm: LLM, number: int = 0) -> list[int]:
    return llm.tokenizer.encode(f"{number}. The quick brown fox jumps over the lazy dog, and then it")

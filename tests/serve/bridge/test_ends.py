"""What the event loop gets when steps fail, time runs out or the server ends."""

import asyncio
import dataclasses
import sys
from collections.abc import Generator

import pytest
from torch import Tensor

from kiloq import LLM
from kiloq.engine.params import Constraint
from kiloq.serve.bridge import BridgeConfig, BusyError, EngineThread, RequestTimeoutError
from kiloq.serve.worker import EngineError
from tests.serve.bridge.lab import LONG, SHORT, during, engine_of, now, prompt, read, text_of


class FailingSteps:
    """Fails as often as told, where a step draws."""

    def __init__(self, times: int) -> None:
        self.times = times

    def __call__(self, request_id: str, index: int, length: int, logits: Tensor) -> None:
        if self.times:
            self.times -= 1
            raise ZeroDivisionError


@pytest.fixture
def failing(llm: LLM) -> Generator[FailingSteps]:
    llm.engine._observer = FailingSteps(0)
    yield llm.engine._observer
    llm.engine._observer = None


def test_a_failed_step_ends_its_requests_with_a_clear_error_and_the_engine_goes_on(
    llm: LLM, failing: FailingSteps
) -> None:
    async def test() -> None:
        async with engine_of(llm) as engine:
            alone = text_of(await read(await engine.open(prompt(llm), SHORT)))
            streams = [await engine.open(prompt(llm, number), LONG) for number in range(6)]
            await anext(streams[0])
            failing.times = 1
            for stream in streams[:4]:
                with pytest.raises(EngineError, match="ZeroDivisionError"):
                    await read(stream)
            for stream in streams[4:]:  # these waited
                await anext(stream)
                stream.close()
            assert text_of(await read(await engine.open(prompt(llm), SHORT))) == alone

    during(test)


def test_an_engine_that_fails_and_fails_is_not_healthy_until_it_works_again(llm: LLM, failing: FailingSteps) -> None:
    async def test() -> None:
        async with engine_of(llm) as engine:
            failing.times = 3
            for _ in range(3):
                assert engine.healthy
                with pytest.raises(EngineError):
                    await read(await engine.open(prompt(llm), SHORT))
            await now(engine)
            assert not engine.healthy
            await read(await engine.open(prompt(llm), SHORT))
            await now(engine)
            assert engine.healthy

    during(test)


def test_nobody_waits_for_a_dead_thread(llm: LLM) -> None:
    async def test() -> None:
        engine = EngineThread(llm)
        engine.start()
        stream = await engine.open(prompt(llm), LONG)
        for job in (sys.exit, lambda llm: None):
            with pytest.raises(EngineError):
                await engine.run(job)
        with pytest.raises(EngineError):
            await read(stream)
        assert not engine.healthy
        with pytest.raises(EngineError, match="restart"):
            await engine.open(prompt(llm), SHORT)
        engine.stop()
        llm.engine.cancel(stream.request_id)

    during(test)


def test_a_request_over_its_time_ends_and_frees_its_blocks(llm: LLM) -> None:
    def forever(llm: LLM) -> Generator[None]:
        while True:
            yield

    async def test() -> None:
        engine = EngineThread(llm, BridgeConfig(request_timeout=0.02))
        engine.start()
        streams = [await engine.open(prompt(llm, number), LONG) for number in range(6)]
        for stream in streams:
            with pytest.raises(RequestTimeoutError, match="limit of this server"):
                await read(stream)
        with pytest.raises(RequestTimeoutError):
            await engine.run_parts(forever)
        engine.stop()
        assert llm.engine.stats.blocks_available == llm.engine.stats.blocks

    during(test)


def test_draining_lets_what_runs_end_and_takes_nothing_new(llm: LLM) -> None:
    async def test() -> None:
        engine = EngineThread(llm)
        engine.start()
        stream = await engine.open(prompt(llm), SHORT)
        reading = asyncio.create_task(read(stream))
        draining = asyncio.create_task(engine.drain(60))
        await asyncio.sleep(0)
        with pytest.raises(BusyError, match="shutting down"):
            await engine.open(prompt(llm), SHORT)
        await draining
        assert len(await reading) == 4
        engine.stop()
        engine.stop()
        assert not engine.healthy

    during(test)


def test_what_does_not_end_while_draining_is_cut(llm: LLM) -> None:
    async def test() -> None:
        engine = EngineThread(llm)
        engine.start()
        streams = [await engine.open(prompt(llm), LONG) for _ in range(6)]
        await engine.drain(0)
        for stream in streams:
            with pytest.raises(BusyError, match="shutting down"):
                await read(stream)
        engine.stop()
        assert llm.engine.stats.blocks_available == llm.engine.stats.blocks

    during(test)


def test_a_thread_that_never_started_can_be_stopped(llm: LLM) -> None:
    async def test() -> None:
        EngineThread(llm).stop()

    during(test)


def test_a_request_whose_time_ends_while_its_constraint_is_compiled_leaves_nothing(llm: LLM) -> None:
    words = "|".join(f"x{i}.*y{i}" for i in range(5000))  # takes longer than the request may

    async def test() -> None:
        async with engine_of(llm, request_timeout=0.002) as engine:
            params = dataclasses.replace(LONG, constraint=Constraint("regex", f"({words}|.*)"))
            with pytest.raises(RequestTimeoutError):
                await read(await engine.open(prompt(llm), params))
            engine.config = BridgeConfig()  # what comes now may take its time

    during(test)

"""What the event loop may ask of the engine's thread, and what it gets whatever happens in between."""

import asyncio
import dataclasses
import random
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Generator
from contextlib import asynccontextmanager
from itertools import pairwise
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from torch import Tensor

from kiloq import LLM, SamplingParams
from kiloq.engine import Event
from kiloq.engine.events import EngineStats
from kiloq.engine.params import Constraint
from kiloq.errors import RequestError
from kiloq.serve.bridge import AnswerStream, BridgeConfig, BusyError, EngineThread, RequestTimeoutError
from kiloq.serve.worker import EngineError

LONG = SamplingParams(max_tokens=400, temperature=0, ignore_eos=True)
SHORT = SamplingParams(max_tokens=4, temperature=0, ignore_eos=True)


@pytest.fixture(scope="module")
def loaded() -> LLM:
    return LLM(max_batch=4, max_context=512, dtype="float32", kv_dtype="float32")  # a batch rounds as one row does


@pytest.fixture
def llm(loaded: LLM) -> Generator[LLM]:
    """Its engine has nothing to do, and nothing to tell of an earlier test."""
    yield loaded
    while loaded.engine.has_work:
        loaded.engine.step()


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


def test_many_streams_give_what_the_engine_alone_gives(llm: LLM) -> None:
    """More than run at once; drawn, not greedy."""
    params = [SamplingParams(max_tokens=8, seed=number, n=1 + number % 2) for number in range(8)]
    prompts = [prompt(llm, number) for number in range(8)]
    alone = dict(llm.as_completed(zip(prompts, params, strict=True)))

    async def test() -> None:
        async with engine_of(llm) as engine:
            streams = [await engine.open(ids, one) for ids, one in zip(prompts, params, strict=True)]
            for number, events in enumerate(await asyncio.gather(*map(read, streams))):
                expected = alone[number]
                for index, choice in enumerate(expected.choices):
                    own = [event for event in events if event.index == index]
                    assert text_of(own) == choice.text
                    assert own[-1].finish_reason == choice.finish_reason
                assert [event.usage for event in events if event.usage] == [events[-1].usage]

    during(test)


def test_a_closed_request_holds_nothing_after_the_next_step(llm: LLM) -> None:
    async def test() -> None:
        async with engine_of(llm) as engine:
            streams = [await engine.open(prompt(llm, number), LONG) for number in range(6)]
            await anext(streams[0])
            stats = await now(engine)
            assert (stats.running, stats.waiting) == (4, 2)
            for stream in (streams[0], streams[5]):  # one that runs, one that waits
                stream.close()
                stream.close()
            stats = await now(engine)
            assert (stats.running, stats.waiting) == (4, 0) or (stats.running, stats.waiting) == (3, 1)
            for stream in streams:
                stream.close()
            await idle(engine)

    during(test)


def test_a_client_that_goes_before_it_was_admitted_leaves_nothing(llm: LLM) -> None:
    async def test() -> None:
        async with engine_of(llm) as engine:
            for yields in range(4):  # before the thread hears of it, or after
                opening = asyncio.create_task(engine.open(prompt(llm), LONG))
                for _ in range(yields):
                    await asyncio.sleep(0)
                opening.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await opening
                await idle(engine)

    during(test)


def test_closing_wakes_the_reader(llm: LLM) -> None:
    async def test() -> None:
        async with engine_of(llm) as engine:
            stream = await engine.open(prompt(llm), LONG)
            reading = asyncio.create_task(read(stream))
            await now(engine)
            stream.close()
            assert len(await reading) < 400
            assert await read(stream) == []

    during(test)


def test_random_disconnects_leave_no_block_in_use(llm: LLM) -> None:
    dice = random.Random(0)

    async def client(engine: EngineThread, number: int) -> int:
        params = SamplingParams(max_tokens=dice.randrange(1, 12), seed=number, n=dice.choice((1, 1, 3)))
        stream = await engine.open(prompt(llm, number)[: dice.randrange(1, 20)], params)
        leaves_after = dice.choice((0, 1, 2, 4, 99, 99))
        count = 0
        async for _ in stream:
            if count >= leaves_after:
                stream.close()
            count += 1
        return 1

    async def test() -> None:
        async with engine_of(llm) as engine:
            assert sum(await asyncio.gather(*(client(engine, number) for number in range(50)))) == 50

    during(test)


def test_a_bad_request_is_refused_before_anything_is_answered(llm: LLM) -> None:
    async def test() -> None:
        async with engine_of(llm) as engine:
            with pytest.raises(RequestError, match="limit is 512"):
                await engine.open(prompt(llm) * 100, SHORT)
            with pytest.raises(RequestError, match="token 99999999"):
                await engine.open([99999999], SHORT)

    during(test)


def test_a_full_queue_says_when_to_come_again_and_every_answer_counts(llm: LLM) -> None:
    async def test() -> None:
        async with engine_of(llm, max_queue=3) as engine:
            many = SamplingParams(max_tokens=400, n=20)
            large = await engine.open(prompt(llm), many)  # alone it may be as large as it likes
            with pytest.raises(BusyError, match="20 answers") as refused:
                await engine.open(prompt(llm), SHORT)
            assert refused.value.retry_after >= 1
            with pytest.raises(BusyError):
                await engine.run(lambda llm: None)
            large.close()
            streams = [await engine.open(prompt(llm), LONG) for _ in range(5)]
            two = await engine.open(prompt(llm), SamplingParams(n=2, max_tokens=1))
            with pytest.raises(BusyError, match="7 answers"):
                await engine.open(prompt(llm), SHORT)
            for stream in (*streams, two):
                stream.close()
            assert len(await read(await engine.open(prompt(llm), SHORT))) == 4

    during(test)


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


def test_a_long_job_is_done_a_part_a_step(llm: LLM) -> None:
    def job(llm: LLM) -> Generator[None, None, list[int]]:
        steps = []
        for _ in range(8):
            steps.append(llm.engine.stats.steps)
            yield
        return steps

    async def test() -> None:
        async with engine_of(llm) as engine:
            stream = await engine.open(prompt(llm), LONG)
            one, other = await asyncio.gather(engine.run_parts(job), engine.run_parts(job))
            stream.close()
            together = sorted(one + other)
            assert all(after - before == 1 for before, after in pairwise(together)), together
            assert await engine.run_parts(job) == 8 * [(await now(engine)).steps]

    during(test)


def test_a_jobs_error_reaches_who_asked_and_an_unwanted_job_is_dropped(llm: LLM) -> None:
    parts = []

    def job(llm: LLM) -> Generator[None]:
        while True:
            parts.append(1)
            yield

    async def test() -> None:
        async with engine_of(llm) as engine:
            with pytest.raises(ZeroDivisionError):
                await engine.run(lambda llm: 1 // 0)
            running = asyncio.create_task(engine.run_parts(job))
            await now(engine)
            running.cancel()
            with pytest.raises(asyncio.CancelledError):
                await running
            await now(engine)
            done = len(parts)
            await now(engine)
            assert len(parts) == done

    during(test)


def test_a_second_turn_computes_only_its_new_tokens(llm: LLM) -> None:
    """Also after an answer that was cancelled half-way: what it had said is in the cache."""
    first = prompt(llm) * 4
    params = SamplingParams(max_tokens=40, temperature=0, ignore_eos=True)

    async def turn(engine: EngineThread, ids: list[int], stop_after: int) -> list[int]:
        said: list[int] = []
        stream = await engine.open(ids, params)
        async for events in stream:
            said += [token_id for event in events for token_id in event.token_ids]
            if len(said) >= stop_after:
                stream.close()
        return said

    async def test() -> None:
        async with engine_of(llm) as engine:
            for stop_after in (999, 20):
                ids = [7 + stop_after, *first]
                before = (await now(engine)).computed_tokens
                said = await turn(engine, ids, stop_after)
                after = (await now(engine)).computed_tokens
                assert after - before >= len(ids) + len(said) - 1
                second = [*ids, *said, *prompt(llm, 1)]
                stream = await engine.open(second, SamplingParams(max_tokens=1))
                usage = (await read(stream))[-1].usage
                assert usage is not None
                # All but the last token had gone through the model; the cache shares whole blocks of 16.
                assert usage.cached_tokens == (len(ids) + len(said) - 1) // 16 * 16
                assert (await now(engine)).computed_tokens - after <= len(second) - usage.cached_tokens + 16

    during(test)


def test_metrics_agree_with_what_happened(llm: LLM) -> None:
    async def test() -> None:
        async with engine_of(llm, max_queue=2) as engine:
            large = await engine.open(prompt(llm), SamplingParams(max_tokens=400, n=6, ignore_eos=True))
            for _ in range(2):
                with pytest.raises(BusyError):
                    await engine.open(prompt(llm), SHORT)
            large.close()
            for _ in range(2):
                streams = [await engine.open(prompt(llm), SHORT) for _ in range(6)]
                await asyncio.gather(*map(read, streams))
            await now(engine)
            engine.metrics.http("/v1/models", 200)
            text = engine.metrics.render().decode()
            found = {
                (sample.name, *sample.labels.values()): sample.value
                for family in text_string_to_metric_families(text)
                for sample in family.samples
            }
            assert found["kiloq_http_requests_total", "/v1/models", "200"] == 1
            assert found["kiloq_requests_ended_total", "length"] == 12
            assert found["kiloq_requests_ended_total", "cancelled"] == 1
            assert found["kiloq_requests_refused_total",] == 2
            assert found["kiloq_prompt_tokens_total",] == 13 * len(prompt(llm))
            assert found["kiloq_cached_tokens_total",] >= 6 * 16
            assert found["kiloq_time_to_first_token_seconds_count",] == 12
            assert found["kiloq_inter_token_seconds_count",] == 12 * 3
            assert found["kiloq_inter_token_seconds_bucket", "+Inf"] == 12 * 3
            assert found["kiloq_request_seconds_count",] == 12
            assert found["kiloq_queue_seconds_count",] == 13
            for name in ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc"):
                assert found[name,] == 0
            assert found["kiloq_healthy",] == 1

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

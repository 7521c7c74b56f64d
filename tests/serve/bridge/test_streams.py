"""What the event loop may ask of the engine's thread: requests, jobs, and figures of them."""

import asyncio
import random
from collections.abc import Generator
from itertools import pairwise

import pytest
from prometheus_client.parser import text_string_to_metric_families

from kiloq import LLM, SamplingParams
from kiloq.errors import RequestError
from kiloq.serve.bridge import BusyError, EngineThread
from tests.serve.bridge.lab import LONG, SHORT, during, engine_of, idle, now, prompt, read, text_of


def test_many_streams_give_what_the_engine_alone_gives(llm: LLM) -> None:
    """More than run at once; drawn, not greedy, but not from the tail, where thousands of tokens of 1e-6 lie so close
    that a batch's last bit puts them in another order."""
    params = [SamplingParams(max_tokens=8, seed=number, n=1 + number % 2, top_p=0.9) for number in range(8)]
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

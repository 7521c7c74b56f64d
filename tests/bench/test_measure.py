"""Timing counts what it says: tokens, steps and bytes. Nothing here depends on how long anything took."""

import random

import pytest
import torch

from kiloq.bench.machine import memory_bandwidth
from kiloq.bench.measure import Cell, cache_bytes, engine_for, generate, measure, random_prompts
from kiloq.bench.percentiles import percentile
from kiloq.bench.random_weights import random_model
from kiloq.bench.worker import Job, run_in_child, run_job
from kiloq.errors import KiloqError
from kiloq.model import ModelConfig, Transformer
from kiloq.train.meter import forget_peak, peak_bytes


@pytest.fixture(scope="module")
def model(small: ModelConfig) -> Transformer:
    return random_model(small, "int4")


@pytest.mark.parametrize("batch", [1, 3])
def test_one_step_for_each_token_after_the_first(model: Transformer, batch: int) -> None:
    cell = Cell(prompt_tokens=20, new_tokens=6, batch=batch)
    engine = engine_for(model, cell)
    run = generate(engine, random_prompts(random.Random(1), 500, 20, batch), 6)
    assert len(run.steps) == 5
    assert engine.stats.generated_tokens == 6 * batch
    assert 0 < run.first_token < run.first_token + sum(run.steps) <= run.total * (1 + 1e-9)


def test_no_prompt_is_taken_from_the_cache(model: Transformer) -> None:
    cell = Cell(prompt_tokens=64, new_tokens=2)
    engine = engine_for(model, cell)
    ids = random.Random(1)
    for _ in range(3):
        generate(engine, random_prompts(ids, 500, 64, 1), 2)
    assert engine.stats.computed_tokens == 3 * (64 + 1)


def test_speeds_are_counted_as_they_are_named(model: Transformer) -> None:
    figures = measure(model, Cell(prompt_tokens=10, new_tokens=4, batch=2), repeats=1)
    (run,) = figures.runs
    assert figures.prefill_tok_s == pytest.approx(20 / run.first_token)
    assert figures.average_tok_s == pytest.approx(28 / run.total)
    assert figures.decode_tok_s == pytest.approx(2 / sorted(run.steps)[1])
    assert figures.step_ms["p50"] <= figures.step_ms["p90"] <= figures.step_ms["p99"]
    assert figures.peak_bytes > 10 << 20


def test_one_token_alone_has_no_decode_speed(model: Transformer) -> None:
    figures = measure(model, Cell(prompt_tokens=10, new_tokens=1), repeats=1)
    assert figures.decode_tok_s is None
    assert figures.step_ms == {}


def test_percentiles_are_nearest_ranks() -> None:
    values = [float(v) for v in range(100, 0, -1)]
    assert [percentile(values, p) for p in (1, 50, 99, 100)] == [1, 50, 99, 100]
    assert percentile([7.0], 50) == 7


def test_int8_keeps_half_of_the_cache_and_scales(small: ModelConfig) -> None:
    sixteen, eight = (cache_bytes(small, 100, kv) for kv in ("auto", "int8"))
    assert sixteen == 100 * 2 * 2 * 2 * 32 * 2  # tokens, keys and values, layers, heads, dimensions, bytes
    assert eight == sixteen / 2 + 100 * 2 * 2 * 2 * 2


def test_memory_that_was_taken_shows_in_the_peak() -> None:
    forget_peak()
    before = peak_bytes()
    taken = bytearray(64 << 20)
    assert peak_bytes() - before > 48 << 20
    del taken


def test_the_bandwidth_is_that_of_a_memory() -> None:
    assert 1e8 < memory_bandwidth() < 1e13


def test_a_process_of_its_own_gives_every_cell_and_the_predicted_memory() -> None:
    cells = ({"prompt_tokens": 8, "new_tokens": 2}, {"prompt_tokens": 8, "new_tokens": 3, "batch": 2})
    told = []
    results = run_in_child(Job(precision="int8", cells=cells, repeats=1), lambda: told.append(1))
    assert [result["cell"]["new_tokens"] for result in results] == [2, 3]
    assert len(told) == 2
    assert all(result["peak_bytes"] > result["weight_bytes"] + result["cache_bytes"] for result in results)


def test_an_error_in_the_process_is_the_persons_one_line() -> None:
    job = Job(shape="qwen-9b", precision="int4", cells=({"prompt_tokens": 8, "new_tokens": 2},))
    with pytest.raises(KiloqError, match="qwen-7b"):
        run_in_child(job, lambda: None)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_one_error() -> None:
    with pytest.raises(KiloqError, match="'cuda'"):
        list(run_job(Job(shape="qwen-7b", precision="bf16", cells=(), device="cuda")))

"""Times generation step by step through the engine, sampling and Python included. Knows no file or process."""

import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from kiloq.cache import BLOCK_SIZE
from kiloq.engine import Engine, EngineConfig, SamplingParams
from kiloq.model import ModelConfig, Transformer
from kiloq.ops.layout import PackedWeight
from kiloq.train.meter import forget_peak, peak_bytes

from .percentiles import percentile


@dataclass(frozen=True, kw_only=True)
class Cell:
    """What is generated: `batch` answers of `new_tokens` at once, each to its own random prompt."""

    prompt_tokens: int
    new_tokens: int
    batch: int = 1
    kv: str = "auto"  # how keys and values are kept

    @property
    def context(self) -> int:
        return self.prompt_tokens + self.new_tokens


@dataclass(frozen=True, kw_only=True)
class Run:
    """Seconds of one generation. `steps` are those that gave every sequence one more token."""

    first_token: float  # from the request until every sequence had one
    steps: tuple[float, ...]
    total: float


@dataclass(frozen=True, kw_only=True)
class Figures:
    """One cell, measured. Speeds are of medians; `average_tok_s` is the first Qwen README's: prompt and answer tokens
    together, over the whole time."""

    prefill_tok_s: float
    first_token_s: float
    decode_tok_s: float | None  # None: one token only
    step_ms: dict[str, float]  # p50, p90, p99
    average_tok_s: float
    peak_bytes: int
    step_bytes: int  # of weights and cache that a step in the middle of the answer reads
    step_gb_s: float | None
    runs: tuple[Run, ...]


class OutOfMemoryError(Exception):
    """The cell needs more cache than this machine can give."""


def measure(model: Transformer, cell: Cell, *, repeats: int = 3, seed: int = 0) -> Figures:
    """Generate `repeats` times, after one short generation that is not counted. No two prompts are alike."""
    device = _device(model)
    forget_peak(device)
    try:
        engine = engine_for(model, cell)
        ids = random.Random(seed)
        generate(engine, random_prompts(ids, model.config.vocab_size, min(32, cell.prompt_tokens), 1), 2)
        runs = []
        for _ in range(repeats):
            prompts = random_prompts(ids, model.config.vocab_size, cell.prompt_tokens, cell.batch)
            runs.append(generate(engine, prompts, cell.new_tokens))
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise OutOfMemoryError(str(error)) from error
    return _figures(model, cell, runs, peak_bytes(device))


def random_prompts(ids: random.Random, vocab_size: int, length: int, count: int) -> list[list[int]]:
    return [[ids.randrange(vocab_size) for _ in range(length)] for _ in range(count)]


def generate(engine: Engine, prompts: Sequence[Sequence[int]], new_tokens: int) -> Run:
    """Greedy answers of exactly `new_tokens` to all prompts at once."""
    params = SamplingParams(max_tokens=new_tokens, temperature=0, ignore_eos=True, speculation="none")
    begin = last = time.perf_counter()
    for prompt in prompts:
        engine.add(prompt, params)
    first: float | None = None
    answering: set[str] = set()
    steps = []
    while engine.has_work:
        events = engine.step()
        now = time.perf_counter()
        if first is not None and len(events) == len(prompts):
            steps.append(now - last)
        for event in events:
            if event.error is not None:
                raise event.error
            answering.add(event.request_id)
        if first is None and len(answering) == len(prompts):
            first = now - begin
        last = now
    assert first is not None
    return Run(first_token=first, steps=tuple(steps), total=last - begin)


def weight_bytes_per_step(model: Transformer) -> int:
    """Bytes of weights that one step reads: every matrix once; of an embedding that is no head, only a few rows."""
    total = 0
    for name, module in model.named_modules():
        if name == "embed" and not model.config.tie_embeddings:
            continue
        packed = getattr(module, "packed", None)
        if isinstance(packed, PackedWeight):
            total += packed.nbytes
        total += sum(parameter.nbytes for parameter in module.parameters(recurse=False))
    return total


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all weights in memory."""
    packed = (getattr(module, "packed", None) for module in model.modules())
    matrices = sum(one.nbytes for one in packed if isinstance(one, PackedWeight))
    return matrices + sum(parameter.nbytes for parameter in model.parameters())


def cache_bytes(config: ModelConfig, tokens: int, kv: str) -> int:
    """Keys and values of `tokens` tokens; int8 has an fp16 scale beside each head's."""
    if kv == "int8":
        return tokens * (config.kv_bytes_per_token(1) + 2 * 2 * config.num_layers * config.num_kv_heads)
    return tokens * config.kv_bytes_per_token(2)


def _device(model: Transformer) -> str:
    return str(next(model.parameters()).device)


def engine_for(model: Transformer, cell: Cell) -> Engine:
    """An engine with room for this cell, and for the block more per sequence that the scheduler likes to see free."""
    context = cell.context + BLOCK_SIZE
    engine = Engine(model, EngineConfig(max_context=context, max_batch=cell.batch, kv_dtype=cell.kv))
    blocks, have = cell.batch * -(-context // BLOCK_SIZE), engine.stats.blocks
    if have < blocks:
        raise OutOfMemoryError(f"the cache needs {blocks:,} blocks and {have:,} fit")
    return engine


def _figures(model: Transformer, cell: Cell, runs: Sequence[Run], peak: int) -> Figures:
    first = statistics.median(run.first_token for run in runs)
    steps = [step for run in runs for step in run.steps]
    typical = statistics.median(steps) if steps else None
    middle = cell.batch * (cell.prompt_tokens + cell.new_tokens // 2)
    read = weight_bytes_per_step(model) + cache_bytes(model.config, middle, cell.kv)
    return Figures(
        prefill_tok_s=cell.batch * cell.prompt_tokens / first,
        first_token_s=first,
        decode_tok_s=cell.batch / typical if typical else None,
        step_ms={f"p{p}": 1e3 * percentile(steps, p) for p in (50, 90, 99)} if steps else {},
        average_tok_s=cell.batch * cell.context / statistics.median(run.total for run in runs),
        peak_bytes=peak,
        step_bytes=read,
        step_gb_s=read / typical / 1e9 if typical else None,
        runs=tuple(runs),
    )

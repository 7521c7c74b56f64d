"""kiloq end to end through its engine, in its own venv: peer_kiloq.py SHAPE THREADS bf16|int8|int4 KV_DTYPE."""

import sys

import torch
from worker import serve

import kiloq
from kiloq import ops
from kiloq.bench.measure import generate
from kiloq.bench.random_weights import random_model
from kiloq.bench.shapes import shape_config
from kiloq.engine import Engine, EngineConfig


def main() -> None:
    shape, threads, precision, kv_dtype = sys.argv[1:]
    torch.set_num_threads(int(threads))
    model = random_model(shape_config(shape), precision)
    engine = Engine(model, EngineConfig(max_context=1024, max_batch=8, kv_dtype=kv_dtype))

    def run(prompts: list[list[int]], new_tokens: int) -> list[float]:
        done = generate(engine, prompts, new_tokens)
        return [done.first_token, *done.steps]

    serve({"kiloq": kiloq.__version__, "torch": torch.__version__, "backend": ops.backend()}, run)


main()

"""Paged attention of one layer: decoding against the read bandwidth of the same minute, prompts in arithmetic a second.

python benchmarks/attention.py [--json FILE] [--only decode|prefill] [--shapes NAME ...]

Every measurement walks over enough layers that no cache level holds them, interleaves all that is compared, and takes
the best of its rounds for every layer: other programs can only slow it down.
"""

import argparse
import ctypes
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from kiloq import ops
from kiloq.ops import cpu, paged
from kiloq.ops.paged import PagedLayer, PagedPlaces, PagedSpan
from kiloq.ops.structs import Cache

BLOCK = 16
BEYOND_CACHES = 1.0e9  # bytes that a round of decoding touches at least


@dataclass(frozen=True)
class Shape:
    heads: int
    kv_heads: int
    dim: int


SHAPES = {"1.8B": Shape(16, 16, 128), "0.5B": Shape(14, 2, 64), "7B": Shape(32, 32, 128), "7B-2.5": Shape(28, 4, 128)}
KINDS = {"bf16": torch.bfloat16, "int8": torch.int8}


def make_layer(shape: Shape, kind: str, slots: int, biased_pairs: int = 0) -> PagedLayer:
    size = (slots, shape.kv_heads, shape.dim)
    if kind != "int8":
        keys, values = (torch.randn(size).to(KINDS[kind]) for _ in range(2))
        return PagedLayer(num_heads=shape.heads, rotary_dim=shape.dim, keys=keys, values=values)
    bias = None
    if biased_pairs:
        bias = torch.zeros(shape.kv_heads, shape.dim)
        bias[:, :biased_pairs] = 20.0
    return PagedLayer(
        num_heads=shape.heads,
        rotary_dim=shape.dim,
        keys=torch.randint(-127, 128, size, dtype=torch.int8),
        values=torch.randint(-127, 128, size, dtype=torch.int8),
        key_scales=torch.rand(size[:2]).half() / 127,
        value_scales=torch.rand(size[:2]).half() / 127,
        key_bias=bias,
    )


def angles(shape: Shape, length: int) -> tuple[Tensor, Tensor]:
    speeds = 10_000.0 ** -(torch.arange(0, shape.dim, 2) / shape.dim)
    turned = torch.outer(torch.arange(length).float(), speeds)
    return turned.cos(), turned.sin()


class Step:
    """One call of the kernel with its arguments described once, as the engine does."""

    def __init__(self, shape: Shape, layers: list[PagedLayer], starts: list[int], rows: int) -> None:
        cos, sin = angles(shape, max(starts) + rows)
        blocks = -(-(max(starts) + rows) // BLOCK)
        order = torch.randperm(len(starts) * blocks).to(torch.int32).split(blocks)
        self.spans = [
            PagedSpan(blocks=table, start=start, stop=start + rows, cos=cos, sin=sin)
            for table, start in zip(order, starts, strict=True)
        ]
        at = torch.cat([torch.arange(start, start + rows) for start in starts])
        self.places = PagedPlaces(cos=cos[at], sin=sin[at])
        self.qkv = torch.randn(len(at), (shape.heads + 2 * shape.kv_heads) * shape.dim)
        self.out = torch.empty(len(at), shape.heads * shape.dim)
        self.layers = layers
        self.structs = [paged._layer_struct(layer) for layer in layers]
        self.places_struct = paged._places_struct(self.spans, self.places)

    def calls(self) -> list[Callable[[], object]]:
        """One for each layer."""
        return [partial(self._attend, layer) for layer in self.structs]

    def _attend(self, layer: Cache) -> None:
        library = cpu.library()
        assert library is not None
        qkv, out, places = self.qkv.data_ptr(), self.out.data_ptr(), ctypes.byref(self.places_struct)
        library.kq_attention(ctypes.byref(layer), places, qkv, None, None, 0.0, 0, out)


def best_seconds(runs: dict[str, list[Callable[[], object]]], rounds: int) -> dict[str, float]:
    """Seconds of all calls of each run, every call at its best round."""
    best = {name: [float("inf")] * len(calls) for name, calls in runs.items()}
    for _ in range(rounds):
        for name, calls in runs.items():
            for i, call in enumerate(calls):
                start = time.perf_counter()
                call()
                best[name][i] = min(best[name][i], time.perf_counter() - start)
    return {name: sum(times) for name, times in best.items()}


def decode(name: str, context: int, rounds: int, batch: int = 1) -> dict[str, float | str]:
    """One new token of each of `batch` sequences, over as many layers as no cache holds."""
    shape = SHAPES[name]
    slots = batch * -(-(context + 1) // BLOCK) * BLOCK
    token = 2 * shape.kv_heads * shape.dim
    count = max(2, int(BEYOND_CACHES / (slots * token * 2)))
    runs: dict[str, list[Callable[[], object]]] = {}
    for kind, pairs in (("bf16", 0), ("int8", 0), ("int8 + bias", 8)):
        layers = [make_layer(shape, kind[:4], slots, pairs)]
        layers += [replicate(layers[0]) for _ in range(count - 1)]
        runs[kind] = Step(shape, layers, [context] * batch, 1).calls()
    keys, values = (torch.randn(count, batch, shape.kv_heads, context, shape.dim).bfloat16() for _ in range(2))
    query = torch.randn(batch, shape.heads, 1, shape.dim).bfloat16()
    sdpa = partial(F.scaled_dot_product_attention, enable_gqa=shape.heads != shape.kv_heads)
    runs["torch"] = [partial(sdpa, query, k, v) for k, v in zip(keys, values, strict=True)]
    ruler = torch.ones(int(BEYOND_CACHES) // 4)
    runs["read"] = [piece.sum for piece in ruler.chunk(40)]
    best = best_seconds(runs, rounds)
    read = ruler.nbytes / best.pop("read") / 1e9
    row: dict[str, float | str] = {"shape": name, "context": context, "batch": batch, "read GB/s": read}
    for kind, seconds in best.items():
        size = token * (1 if kind.startswith("int8") else 2) + (4 * shape.kv_heads if kind.startswith("int8") else 0)
        row[f"{kind} us"] = seconds / count * 1e6
        row[f"{kind} GB/s"] = batch * context * size * count / seconds / 1e9
        row[f"{kind} %"] = 100 * row[f"{kind} GB/s"] / read
    return row


def replicate(layer: PagedLayer) -> PagedLayer:
    names = ("keys", "values", "key_scales", "value_scales")
    kept = {name: getattr(layer, name) for name in names}
    return replace(layer, **{name: None if x is None else x.clone() for name, x in kept.items()})


def prefill(name: str, tokens: int, rounds: int) -> dict[str, float | str]:
    """A whole prompt; the arithmetic that counts is that of the causal half."""
    shape = SHAPES[name]
    slots = -(-tokens // BLOCK) * BLOCK
    runs: dict[str, list[Callable[[], object]]] = {}
    for kind, pairs in (("bf16", 0), ("int8", 0), ("int8 + bias", 8)):
        runs[kind] = Step(shape, [make_layer(shape, kind[:4], slots, pairs)], [0], tokens).calls()
    for kind, dtype in (("torch bf16", torch.bfloat16), ("torch fp32", torch.float32)):
        q = torch.randn(1, shape.heads, tokens, shape.dim).to(dtype)
        k, v = (torch.randn(1, shape.kv_heads, tokens, shape.dim).to(dtype) for _ in range(2))
        sdpa = partial(F.scaled_dot_product_attention, is_causal=True, enable_gqa=shape.heads != shape.kv_heads)
        runs[kind] = [partial(sdpa, q, k, v)]
    best = best_seconds(runs, rounds)
    work = 4 * shape.heads * shape.dim * tokens * (tokens + 1) / 2
    row: dict[str, float | str] = {"shape": name, "tokens": tokens}
    for kind, seconds in best.items():
        row[f"{kind} ms"] = seconds * 1e3
        row[f"{kind} GFLOPS"] = work / seconds / 1e9
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", choices=("decode", "prefill"))
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["1.8B", "0.5B", "7B"])
    parser.add_argument("--contexts", nargs="+", type=int, default=[512, 2048, 8192])
    parser.add_argument("--tokens", nargs="+", type=int, default=[512, 2048])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    torch.manual_seed(0)
    rows = []
    for name in args.shapes:
        if args.only != "prefill":
            rows += [decode(name, context, args.rounds, args.batch) for context in args.contexts]
        if args.only != "decode":
            rows += [prefill(name, tokens, args.rounds) for tokens in args.tokens]
    print(f"{ops.backend()}, {torch.get_num_threads()} threads")
    for row in rows:
        print("  ".join(f"{k} {v:,.1f}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()))
    if args.json:
        found = {"backend": ops.backend(), "threads": torch.get_num_threads(), "torch": torch.__version__, "rows": rows}
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()

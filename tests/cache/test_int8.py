"""The int8 cache: rounding that is never worse than half a step, and attention that sees the same keys in any step."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kiloq import ops
from kiloq.cache import BLOCK_SIZE, Angles, KVCache, PagedAttend, Span
from kiloq.model import ModelConfig, PackedAttend, Rope, RopeConfig, rotate

CPU = torch.device("cpu")
LENGTHS, ALPHAS = [5, 40, 17, 33], [1.0, 3.0, 1.0, 3.0]


def config_of(heads: tuple[int, int], windows: tuple[int | None, ...], rotary_dim: int) -> ModelConfig:
    return ModelConfig(
        family="qwen2",
        vocab_size=8,
        hidden_size=8 * heads[0],
        num_layers=len(windows),
        num_heads=heads[0],
        num_kv_heads=heads[1],
        head_dim=8,
        intermediate_size=8,
        qkv_bias=True,
        rope=RopeConfig(rotary_dim=rotary_dim, kind="qwen1", original_length=32),
        windows=windows,
        max_length=64,
    )


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_codes_are_the_nearest_under_the_scale_that_is_kept() -> None:
    x = normal(50, 3, 8, seed=0) * torch.logspace(-3, 3, 50)[:, None, None]
    codes, scales = ops.quantize_heads(x)
    assert (codes.dtype, scales.dtype, codes.abs().amax()) == (torch.int8, torch.float16, 127)
    steps = scales.float()[..., None]
    # The largest value may lie beyond 127 steps, by what the scale lost in fp16: 127 * 2^-11 of a step.
    assert ((codes * steps - x).abs() <= 0.57 * steps).all()


def test_halves_go_to_the_even_code() -> None:
    codes, scales = ops.quantize_heads(torch.tensor([[[127.0, 0.5, 1.5, -2.5]]]))
    assert (scales.item(), codes.flatten().tolist()) == (1.0, [127, 0, 2, -2])


@pytest.mark.parametrize("value", [0.0, 1e-30, 1e-8, 3.0, -7.5, 1e30])
def test_constant_keys_stay_finite(value: float) -> None:
    codes, scales = ops.quantize_heads(torch.full((2, 3, 8), value))
    kept = codes * scales.float()[..., None]
    assert kept.isfinite().all()
    if 1e-3 < abs(value) < 1e6:
        torch.testing.assert_close(kept, torch.full_like(kept, value), rtol=1e-3, atol=0)


def biased_cache(config: ModelConfig) -> KVCache:
    """64 blocks that nobody wrote; the second layer's keys have no bias."""
    biases = [None if layer == 1 else 20 * normal(config.num_kv_heads, 8, seed=layer) for layer in range(3)]
    angles = Angles(Rope(config), CPU)
    cache = KVCache(config, 64, dtype=torch.int8, device=CPU, key_biases=biases[: config.num_layers], angles=angles)
    for scales in (*cache.key_scales, *cache.value_scales):
        scales.fill_(torch.nan)  # what nobody wrote must not matter
    return cache


def expected(config: ModelConfig, cache: KVCache, sequence: int, layer: int) -> Tensor:
    """Attention without a cache over keys and values that were rounded at once."""
    q, k, v = qkv(config, sequence)
    rotation = Rope(config)(torch.arange(LENGTHS[sequence]), ALPHAS[sequence])
    bias = cache.key_biases[layer]
    constant = torch.zeros_like(k) if bias is None else rotate(bias.expand_as(k), rotation)
    (key_codes, key_steps), (codes, steps) = ops.quantize_heads(k - constant), ops.quantize_heads(v)
    k, v = key_codes * key_steps.float()[..., None] + constant, codes * steps.float()[..., None]
    return PackedAttend([0, LENGTHS[sequence]], config.windows)(layer, q, k, v)


def qkv(config: ModelConfig, sequence: int) -> tuple[Tensor, Tensor, Tensor]:
    heads = (config.num_heads, config.num_kv_heads, config.num_kv_heads)
    return tuple(normal(LENGTHS[sequence], n, 8, seed=10 * sequence + i) for i, n in enumerate(heads))


def assert_as_rounded_at_once(config: ModelConfig, cuts: list[list[int]], scatter: bool) -> None:
    cache = biased_cache(config)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0)).tolist() if scatter else list(range(64))
    tables = [[order.pop(0) for _ in range(-(-n // BLOCK_SIZE))] for n in LENGTHS]
    done = [0] * len(LENGTHS)
    outs: dict[tuple[int, int], list[Tensor]] = {}
    for step in range(max(map(len, cuts))):
        parts = [(i, cut[step]) for i, cut in enumerate(cuts) if step < len(cut) and cut[step]]
        if not parts:
            continue
        attend = PagedAttend(
            cache, [Span(tables[i], done[i], done[i] + n, ALPHAS[i]) for i, n in parts], config.windows
        )
        flat = [torch.cat([qkv(config, i)[which][done[i] : done[i] + n] for i, n in parts]) for which in range(3)]
        for layer in range(config.num_layers):
            for (i, _), rows in zip(parts, attend(layer, *flat).split([n for _, n in parts]), strict=True):
                outs.setdefault((i, layer), []).append(rows)
        for i, n in parts:
            done[i] += n
    for (i, layer), rows in outs.items():
        whole = expected(config, cache, i, layer)[: done[i]]
        torch.testing.assert_close(torch.cat(rows), whole, rtol=0, atol=2e-5)


@pytest.mark.parametrize("rotary_dim", [8, 4])
@pytest.mark.parametrize("scatter", [False, True])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)])
def test_prompts_then_decoding_see_what_was_rounded_at_once(heads, scatter: bool, rotary_dim: int) -> None:
    cuts = [[2, 1, 1, 1], [30, *[1] * 10], [16, 1], [10, 20, 1, 1, 1]]
    assert_as_rounded_at_once(config_of(heads, (None, 5, 20), rotary_dim), cuts, scatter)


@settings(max_examples=20, deadline=None)
@given(st.data())
def test_any_cut_sees_what_was_rounded_at_once(data: st.DataObject) -> None:
    cuts = [data.draw(st.lists(st.integers(0, n), max_size=6)) for n in LENGTHS]
    for cut, n in zip(cuts, LENGTHS, strict=True):
        while sum(cut) > n:
            cut.pop()
        cut.append(n - sum(cut))
    assert_as_rounded_at_once(config_of((4, 2), (None, 7), 8), cuts, data.draw(st.booleans()))

"""Paged attention against attention without a cache: the same numbers however blocks lie and steps are cut."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kiloq.cache import BLOCK_SIZE, KVCache, PagedAttend, Span
from kiloq.cache import attend as attend_module
from kiloq.model import ModelConfig, PackedAttend, RopeConfig

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def config_of(num_heads: int, num_kv_heads: int, windows: tuple[int | None, ...]) -> ModelConfig:
    return ModelConfig(
        family="qwen2",
        vocab_size=8,
        hidden_size=8 * num_heads,
        num_layers=len(windows),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=8,
        intermediate_size=8,
        qkv_bias=True,
        rope=RopeConfig(rotary_dim=8, original_length=64),
        windows=windows,
        max_length=64,
    )


def attend_in_steps(
    config: ModelConfig, tensors: list[tuple[Tensor, Tensor, Tensor]], tables: list[list[int]], cuts: list[list[int]]
) -> list[list[Tensor]]:
    """Feed each sequence's tokens step by step, `cuts` many at a time; what each layer gave, put together again."""
    q0 = tensors[0][0]
    cache = KVCache(config, 64, dtype=q0.dtype, device=q0.device)
    for kept in (*cache.keys, *cache.values):
        kept.fill_(torch.nan)  # what nobody wrote must not matter
    done = [0] * len(tensors)
    outs: list[list[list[Tensor]]] = [[[] for _ in tensors] for _ in config.windows]
    for step in range(max(map(len, cuts))):
        parts = [(i, cut[step]) for i, cut in enumerate(cuts) if step < len(cut) and cut[step]]
        if not parts:
            continue
        spans = [Span(tables[i], done[i], done[i] + n) for i, n in parts]
        attend = PagedAttend(cache, spans, config.windows)
        flat = [torch.cat([tensors[i][which][done[i] : done[i] + n] for i, n in parts]) for which in range(3)]
        for layer in range(config.num_layers):
            rows = attend(layer, *flat).split([n for _, n in parts])
            for (i, _), out in zip(parts, rows, strict=True):
                outs[layer][i].append(out)
        for i, n in parts:
            done[i] += n
    return [[torch.cat(pieces) for pieces in layer] for layer in outs]


def random_qkv(config: ModelConfig, length: int, device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    heads = (config.num_heads, config.num_kv_heads, config.num_kv_heads)
    q, k, v = (torch.randn(length, count, config.head_dim).to(device, dtype) for count in heads)
    return q, k, v


def assert_equal_to_packed(
    config: ModelConfig,
    lengths: list[int],
    cuts: list[list[int]],
    scatter: bool,
    device="cpu",
    dtype=torch.float32,
    tolerance=1e-5,
) -> None:
    torch.manual_seed(sum(lengths))
    tensors = [random_qkv(config, n, device, dtype) for n in lengths]
    order = torch.randperm(64).tolist() if scatter else list(range(64))
    tables = []
    for n in lengths:
        count = -(-n // BLOCK_SIZE)
        tables.append(order[:count])
        order = order[count:]
    got = attend_in_steps(config, tensors, tables, cuts)
    for i, (q, k, v) in enumerate(tensors):
        packed = PackedAttend([0, lengths[i]], config.windows)
        for layer in range(config.num_layers):
            torch.testing.assert_close(got[layer][i], packed(layer, q, k, v), rtol=0, atol=tolerance)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
@pytest.mark.parametrize("scatter", [False, True])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 4), (4, 2), (6, 1)])
def test_prompt_then_decode_equals_packed_attention(num_heads, num_kv_heads, scatter, dtype, tolerance, device) -> None:
    config = config_of(num_heads, num_kv_heads, (None, 5, 20))
    lengths = [5, 40, 17, 33]
    cuts = [[2, 1, 1, 1], [30, *[1] * 10], [16, 1], [10, 20, 1, 1, 1]]
    assert_equal_to_packed(config, lengths, cuts, scatter, device, dtype, tolerance)


@pytest.mark.parametrize("together", [0, 3000, 2**20])
def test_how_rows_are_grouped_does_not_matter(monkeypatch: pytest.MonkeyPatch, together: int) -> None:
    monkeypatch.setattr(attend_module, "_TOGETHER_ON_CPU", together)
    config = config_of(4, 2, (None, 9))
    lengths = [3, 20, 20, 31, 50]
    cuts = [[n - 2, 1, 1] for n in lengths]
    for scatter in (False, True):
        assert_equal_to_packed(config, lengths, cuts, scatter)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_cut_of_any_sequences_equals_packed_attention(data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.integers(1, 60), min_size=1, max_size=4))
    cuts = []
    for n in lengths:
        cut = []
        while sum(cut) < n:
            cut.append(data.draw(st.integers(0, n - sum(cut))))
            if len(cut) > 8:
                cut.append(n - sum(cut))
        cuts.append(cut)
    windows = data.draw(st.sampled_from([(None,), (1,), (7, None), (16, 33)]))
    heads = data.draw(st.sampled_from([(2, 2), (4, 2)]))
    assert_equal_to_packed(config_of(*heads, windows), lengths, cuts, data.draw(st.booleans()))


def test_a_broken_sequence_cannot_disturb_another_one() -> None:
    config = config_of(2, 2, (None,))
    good, bad = random_qkv(config, 20, "cpu", torch.float32), random_qkv(config, 37, "cpu", torch.float32)
    for tensor in bad:
        tensor.fill_(torch.nan)
    tables = [[5, 3], [9, 2, 4]]
    cuts = [[18, 1, 1], [35, 1, 1]]
    together = attend_in_steps(config, [good, bad], tables, cuts)[0][0]
    assert together.isfinite().all()
    torch.testing.assert_close(together, PackedAttend([0, 20], (None,))(0, *good), rtol=0, atol=1e-5)

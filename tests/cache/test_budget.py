"""The cache takes what requests can use, and no more than the machine or the caller gives."""

import pytest
import torch

from kiloq.cache import KVCache, cache_dtype, kv_bytes_per_token, pool_blocks
from kiloq.cache.budget import available_memory
from kiloq.errors import ConfigError
from kiloq.model import ModelConfig, RopeConfig, Transformer

CPU = torch.device("cpu")
CONFIG = ModelConfig(
    family="qwen2", vocab_size=8, hidden_size=64, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16,
    intermediate_size=8, qkv_bias=True, rope=RopeConfig(rotary_dim=16, original_length=64), windows=(None, None),
    max_length=64,
)  # fmt: skip
BLOCK_BYTES = 16 * 2 * 2 * 2 * 16 * 4  # tokens, k and v, layers, heads, dims, fp32


def test_the_requests_set_the_size_where_memory_is_plenty() -> None:
    assert pool_blocks(CONFIG, torch.float32, CPU, max_context=1000, max_batch=16) == 16 * 63


def test_given_memory_sets_the_size_where_it_is_short() -> None:
    blocks = pool_blocks(CONFIG, torch.float32, CPU, max_context=10**9, max_batch=16, kv_memory=10 * BLOCK_BYTES + 1)
    assert blocks == 10
    cache = KVCache(CONFIG, blocks, dtype=torch.float32, device=CPU)
    assert sum(kept.numel() * 4 for kept in (*cache.keys, *cache.values)) == 10 * BLOCK_BYTES


def test_half_of_the_free_memory_is_the_limit_otherwise() -> None:
    blocks = pool_blocks(CONFIG, torch.float32, CPU, max_context=10**12, max_batch=16)
    assert 0 < blocks * BLOCK_BYTES < 0.6 * available_memory(CPU)


def test_too_little_memory_is_an_error_with_both_numbers() -> None:
    with pytest.raises(ConfigError, match=rf"{BLOCK_BYTES - 1:,} bytes.*{BLOCK_BYTES:,}"):
        pool_blocks(CONFIG, torch.float32, CPU, max_context=100, max_batch=1, kv_memory=BLOCK_BYTES - 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int8])
def test_the_budget_counts_what_the_tensors_take(dtype: torch.dtype) -> None:
    cache = KVCache(CONFIG, 3, dtype=dtype, device=CPU)
    tensors = (*cache.keys, *cache.values, *cache.key_scales, *cache.value_scales)
    assert sum(kept.nbytes for kept in tensors) == 3 * 16 * kv_bytes_per_token(CONFIG, dtype)


def test_the_cache_keeps_the_models_type_unless_it_is_told_another() -> None:
    model = Transformer(CONFIG).to(torch.float16)
    assert cache_dtype("auto", model) == torch.float16
    names = {"int8": torch.int8, "bf16": torch.bfloat16, "bfloat16": torch.bfloat16, "fp32": torch.float32}
    assert {name: cache_dtype(name, model) for name in names} == names


def test_an_unknown_type_is_an_error_that_names_the_known() -> None:
    with pytest.raises(ConfigError, match=r"'int4'.*int8"):
        cache_dtype("int4", Transformer(CONFIG))

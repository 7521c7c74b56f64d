"""Shares of a network's matrices. That several processes compute and learn the same is in tests/train/test_ranks.py."""

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from kiloq.errors import ConfigError
from kiloq.model import Transformer
from kiloq.model.shard import Cut, plan, split
from kiloq.train.adapters import AdapterConfig, attach_new
from tests.tiny import tiny_config, tiny_network


def network() -> Transformer:
    return tiny_network(
        tiny_config("qwen3", vocab_size=16, num_layers=1, qkv_bias=True, tie_embeddings=True, max_length=64)
    )


@pytest.fixture
def four() -> Iterator[dist.ProcessGroup]:
    """The first of four processes, of which only this one is there."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.parametrize("ways", [1, 2, 4])
@pytest.mark.parametrize("cut", [Cut(0, (8, 4, 4)), Cut(1, (12,)), Cut(0, (8, 8))])
def test_shares_joined_are_the_whole(cut: Cut, ways: int) -> None:
    size = [3, 3]
    size[cut.dim] = sum(cut.parts)
    whole = torch.rand(size)
    shares = [cut.take(whole, rank, ways) for rank in range(ways)]
    assert {share.numel() for share in shares} == {whole.numel() // ways}
    assert torch.equal(cut.join(shares), whole)


def test_a_share_has_whole_heads_with_their_own_keys() -> None:
    # 4 heads of 8 and 2 of keys and of values: the second of two processes has heads 2, 3, key head 1, value head 1.
    assert plan(network().config)["attn.qkv.weight"].ranges(1, 2) == [(16, 32), (40, 48), (56, 64)]


def test_heads_that_cannot_be_shared_are_refused(four: dist.ProcessGroup) -> None:
    with pytest.raises(ConfigError, match="num_kv_heads is 2, which 4 processes"):
        split(network(), four)


def test_adapters_are_refused(four: dist.ProcessGroup) -> None:
    model = network()
    attach_new(model.requires_grad_(False), AdapterConfig(rank=2))
    with pytest.raises(ConfigError, match=r"kind = fsdp"):
        split(model, dist.new_group([0, 1]))

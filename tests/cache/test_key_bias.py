"""Which part of a key bias is left out of an int8 cache."""

import torch

from kiloq.cache.key_bias import largest_pairs


def test_each_head_keeps_its_largest_pairs_and_all_that_does_not_turn():
    bias = torch.randn(3, 80, generator=torch.Generator().manual_seed(0))
    kept = largest_pairs(bias, 64)
    pairs, whole = kept[:, :64].view(3, 2, 32), bias[:, :64].view(3, 2, 32)
    sizes = whole.norm(dim=1)
    for head in range(3):
        chosen = pairs[head].norm(dim=0) > 0
        assert chosen.sum() == 16
        assert sizes[head][chosen].min() > sizes[head][~chosen].max()
        assert torch.equal(pairs[head][:, chosen], whole[head][:, chosen])
    assert torch.equal(kept[:, 64:], bias[:, 64:])


def test_a_small_head_keeps_its_bias_whole():
    bias = torch.randn(2, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(largest_pairs(bias, 16), bias)

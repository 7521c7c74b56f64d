"""NF4: the levels are the paper's quantiles, and codes are those of bitsandbytes."""

import json
from pathlib import Path
from statistics import NormalDist

import pytest
import torch

from kiloq.errors import ConfigError
from kiloq.quant.nf4 import LEVELS, nested_levels, quantize_nf4

GOLDEN = Path(__file__).parents[1] / "data" / "golden" / "nf4.json"


def test_levels_are_quantiles_of_the_normal_distribution() -> None:
    """Section 3: eight quantiles above zero and seven below, zero exact, the largest scaled to one."""
    last = 1 - (1 / 30 + 1 / 32) / 2
    above = [NormalDist().inv_cdf(0.5 + (last - 0.5) * i / 8) for i in range(1, 9)]
    below = [-NormalDist().inv_cdf(0.5 + (last - 0.5) * i / 7) for i in range(1, 8)]
    exact = sorted([0.0, *above, *below])
    assert torch.allclose(torch.tensor(LEVELS), torch.tensor(exact) / max(exact), atol=1e-6)


def test_codes_and_magnitudes_are_those_of_bitsandbytes() -> None:
    """Made by bitsandbytes 0.50.2 on a CPU: quantize_4bit with compress_statistics, blocks of 64 and of 256."""
    golden = json.loads(GOLDEN.read_text())
    weight = torch.tensor(golden["weight_bf16"], dtype=torch.int16).view(torch.bfloat16).view(golden["shape"])
    found = quantize_nf4(weight)
    assert found.codes.flatten().tolist() == [int(digit, 16) for digit in golden["codes"]]
    assert found.magnitude_codes.flatten().tolist() == golden["magnitude_codes"]
    assert torch.allclose(found.steps, torch.tensor(golden["steps"]), rtol=1e-6)
    assert torch.allclose(found.mean, torch.tensor(golden["mean"]), rtol=1e-6)
    blocks = found.dequantize().view(-1, 64)
    assert torch.allclose(blocks.sum(1), torch.tensor(golden["block_sums"]), atol=1e-5)


def test_nested_levels_are_256_that_lie_closer_near_zero() -> None:
    levels = nested_levels()
    assert len(levels) == len(levels.unique()) == 256
    assert levels[0] > -1  # only +1 is kept exactly
    assert float(levels[-1]) == 1
    assert 0 in levels
    assert 10_000 * levels.diff().min() < levels.diff().max()


@pytest.mark.parametrize("columns", [64, 96, 48])
def test_each_weight_becomes_the_nearest_level_of_its_block(columns: int) -> None:
    weight = torch.randn(300, columns, generator=torch.Generator().manual_seed(2)) * 0.05
    weight[3] = 0
    found = quantize_nf4(weight)
    near = found.dequantize()
    gaps = torch.tensor(LEVELS).diff().max() / 2 * found.magnitudes().repeat_interleave(found.block, 1)
    # Half the widest gap, and what eight bits lose of the magnitude.
    assert ((near - weight).abs() <= gaps * 1.02 + 0.02 * weight.abs().max()).all()
    assert (near - weight).norm() < 0.11 * weight.norm()


def test_a_matrix_without_blocks_is_refused() -> None:
    with pytest.raises(ConfigError, match="9 inputs"):
        quantize_nf4(torch.zeros(2, 9))

"""Grids: what rounding to nearest must always do."""

import pytest
import torch

from kiloq.errors import ConfigError
from kiloq.quant.grid import Scheme, find_grid, fit, rtn

SCHEMES = [
    Scheme(bits=4, group_size=32),
    Scheme(bits=4, group_size=64, clip=False),
    Scheme(bits=4, group_size=128, symmetric=False),
    Scheme(bits=4, group_size=32, symmetric=False, clip=False),
    Scheme(bits=8, group_size=None),
    Scheme(bits=8, group_size=128),
    Scheme(bits=8, group_size=None, scale_dtype="bfloat16"),
    Scheme(bits=4, group_size=32, scale_dtype="bfloat16"),
]


def weights(rows: int = 24, columns: int = 256, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator) * torch.rand(rows, 1, generator=generator)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_no_other_code_is_nearer(scheme: Scheme) -> None:
    weight = weights()
    quantized = rtn(weight, scheme)
    lost = (quantized.dequantize() - weight).abs()
    grid = find_grid(weight, scheme)
    size = scheme.group_size or weight.shape[1]
    scales, zeros = (t.repeat_interleave(size, dim=1) for t in (grid.scales, grid.zeros))
    for code in range(grid.low, grid.high + 1):
        assert (((code - zeros) * scales - weight).abs() >= lost * (1 - 1e-5)).all()


@pytest.mark.parametrize(
    "scheme", [Scheme(bits=4, group_size=32, symmetric=False, clip=False), Scheme(bits=8, group_size=None)], ids=str
)
def test_values_on_a_grid_stay(scheme: Scheme) -> None:
    # Symmetric 4-bit grids of this kind are found anew only by luck: their range is 15 steps, but -8 is a code.
    once = rtn(weights(), scheme).dequantize()
    torch.testing.assert_close(rtn(once, scheme).dequantize(), once, rtol=1e-6, atol=0)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_scales_are_exact_in_fp16_and_zero_is_a_value(scheme: Scheme) -> None:
    weight = weights() + 0.3  # mostly positive
    weight[:, ::7] = 0
    quantized = rtn(weight, scheme)
    assert torch.equal(quantized.scales, quantized.scales.half().float())
    assert (quantized.dequantize()[:, ::7] == 0).all()


@pytest.mark.parametrize("size", [1.0, 1e-3, 1e-5])
def test_scales_are_exact_in_the_type_that_a_file_keeps(size: float) -> None:
    for bits, group in ((4, 32), (8, None)):
        scheme = Scheme(bits=bits, group_size=group, scale_dtype="bfloat16")
        scales = rtn(weights() * size, scheme).scales
        assert torch.equal(scales, scales.bfloat16().float())
        assert torch.equal(scales, scales.half().float())


def test_known_grids() -> None:
    values = torch.linspace(-1, 1, 32)[None] * 0.75
    symmetric = find_grid(values, Scheme(bits=4, group_size=32, clip=False))
    assert symmetric.scales.item() == pytest.approx(0.1, rel=1e-3)  # 2 * 0.75 / 15
    assert symmetric.zeros.item() == 8
    asymmetric = find_grid(values + 0.75, Scheme(bits=4, group_size=32, symmetric=False, clip=False))
    assert (asymmetric.scales.item(), asymmetric.zeros.item()) == (pytest.approx(0.1, rel=1e-3), 0)
    eight = rtn(values, Scheme(bits=8, group_size=None))
    assert (eight.codes.min().item(), eight.codes.max().item()) == (-127, 127)


def test_clipping_never_loses_by_its_own_measure_and_gains_where_a_value_stands_out() -> None:
    weight = weights()
    weight[:, 5] *= 6
    clipped, plain = (rtn(weight, Scheme(bits=4, group_size=128, clip=clip)).dequantize() for clip in (True, False))
    loss = [((q - weight).abs() ** 2).view(-1, 128).sum(1) for q in (clipped, plain)]
    assert (loss[0] <= loss[1] * (1 + 1e-5)).all()
    assert loss[0].sum() < 0.9 * loss[1].sum()


def test_the_search_that_stops_early_finds_what_the_whole_search_finds() -> None:
    weight = weights(rows=4)
    for symmetric in (True, False):
        grid = find_grid(weight, Scheme(bits=4, group_size=64, symmetric=symmetric))
        for row in range(4):
            for group in range(4):
                values = weight[row, 64 * group : 64 * group + 64]
                best, scale = torch.inf, 0.0
                for step in range(16):
                    top, bottom = values.max().clamp(min=0), values.min().clamp(max=0)
                    if symmetric:
                        top = max(top, -bottom)
                        bottom = -top
                    trial = ((top - bottom) * (1 - step / 20) / 15).half().float()
                    zero = 8 if symmetric else torch.round(-bottom * (1 - step / 20) / trial)
                    near = (torch.clamp(torch.round(values / trial) + zero, 0, 15) - zero) * trial
                    loss = ((near - values) ** 2).sum().item()
                    if loss < best * (1 - 1e-6):
                        best, scale = loss, trial.item()
                assert grid.scales[row, group].item() == pytest.approx(scale, rel=1e-6)


def test_empty_and_tiny_groups_have_a_grid() -> None:
    weight = torch.zeros(2, 64)
    weight[1] = 1e-9
    for scheme in (Scheme(bits=4, group_size=32), Scheme(bits=8, group_size=None)):
        assert torch.isfinite(rtn(weight, scheme).dequantize()).all()
        assert (rtn(weight, scheme).dequantize()[0] == 0).all()


def test_a_size_without_a_group_gets_eight_bits_and_a_wrong_group_an_error() -> None:
    assert fit("down", 688, 4, 128) == Scheme(bits=8, group_size=None)
    assert fit("down", 688, 8, None) == Scheme(bits=8, group_size=None)
    assert fit("down", 5504, 4, 128) == Scheme(bits=4, group_size=128)
    assert fit("down", 5504, 4, None) == Scheme(bits=4, group_size=128)
    with pytest.raises(ConfigError, match=r"down has 96 inputs, .* 128 .*--group-size 32 would"):
        fit("down", 96, 4, 128)
    with pytest.raises(ConfigError, match="bits is 3"):
        Scheme(bits=3, group_size=128)

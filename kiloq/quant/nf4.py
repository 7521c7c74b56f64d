"""NF4, the 4-bit type of QLoRA (arXiv 2305.14314): levels at the quantiles of a normal distribution.

Blocks of 64 neighbours share their largest magnitude, which is itself kept in 8 bits ("double quantisation", section
3): 4.127 bits a weight. Knows no layer and no file.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kiloq.errors import ConfigError

BLOCKS = (64, 32, 16)
"""Values that share a magnitude; the paper's first, the others for matrices that it does not divide."""

_NESTED = 256  # magnitudes that share a step
_AT_ONCE = 2**20  # values whose levels are looked for at once

# The paper's appendix E.
LEVELS = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634),
    *(0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


@dataclass(frozen=True, kw_only=True, eq=False)
class Nf4Weight:
    """w[j, i] = LEVELS[codes[j, i]] * magnitudes()[j, i // block], N outputs by K inputs."""

    block: int
    codes: Tensor  # [N, K] uint8, 0..15
    magnitude_codes: Tensor  # [N, K / block] uint8, into `nested_levels`
    steps: Tensor  # [ceil(N * K / block / 256)] fp32
    mean: Tensor  # [] fp32

    def magnitudes(self) -> Tensor:
        """[N, K / block] fp32."""
        return nested_magnitudes(self.magnitude_codes, self.steps, self.mean)

    def dequantize(self) -> Tensor:
        """The weights that the codes stand for: fp32 [N, K]."""
        levels = torch.tensor(LEVELS, device=self.codes.device)[self.codes.int()]
        return (levels.view(len(levels), -1, self.block) * self.magnitudes()[..., None]).flatten(1)


def block_for(columns: int) -> int | None:
    """The block of a matrix with so many inputs; None where no block divides them."""
    return next((block for block in BLOCKS if columns % block == 0), None)


def quantize_nf4(weight: Tensor) -> Nf4Weight:
    """Each value of [N, K] to the nearest level under its block's magnitude."""
    columns = weight.shape[1]
    block = block_for(columns)
    if block is None:
        raise ConfigError(f"a matrix of {columns:,} inputs has no blocks of {', '.join(map(str, BLOCKS))} for NF4.")
    levels = torch.tensor(LEVELS, device=weight.device)
    codes, magnitudes = [], []
    for part in torch.split(weight, max(1, _AT_ONCE // columns)):
        blocks = part.float().reshape(len(part), -1, block)
        largest = blocks.abs().amax(2)
        shares = blocks / largest.clamp(min=torch.finfo(torch.float32).tiny)[..., None]
        codes.append(_nearest(shares, levels).flatten(1))
        magnitudes.append(largest)
    nested = _nest(torch.cat(magnitudes))
    return Nf4Weight(block=block, codes=torch.cat(codes), magnitude_codes=nested[0], steps=nested[1], mean=nested[2])


def nested_levels(device: torch.device | str = "cpu") -> Tensor:
    """The 256 values of an 8-bit float whose exponent takes as many bits as it needs, ascending, in -1..1.

    Dynamic trees of arXiv 2110.02861: a decade below 1 has half the numbers of the one above; each is the middle of
    its interval between a tenth and one.
    """
    found = [0.0, 1.0]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2**decade + 1)
        middles = 10.0 ** (decade - 6) * ((edges[1:] + edges[:-1]) / 2)
        found += [*middles.tolist(), *(-middles).tolist()]
    return torch.tensor(sorted(found), device=device)


def nested_magnitudes(codes: Tensor, steps: Tensor, mean: Tensor) -> Tensor:
    """What 8-bit codes of magnitudes stand for, fp32 in their shape."""
    values = nested_levels(codes.device)[codes.flatten().int()]
    return (values * steps.repeat_interleave(_NESTED)[: len(values)] + mean).view(codes.shape)


def _nest(magnitudes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Magnitudes to 8-bit codes, a step for 256 of them, and what they are on average."""
    mean = magnitudes.mean()
    flat = (magnitudes - mean).flatten()
    padded = torch.nn.functional.pad(flat, (0, -len(flat) % _NESTED)).view(-1, _NESTED)
    steps = padded.abs().amax(1)
    shares = padded / steps.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
    codes = _nearest(shares, nested_levels(flat.device)).flatten()[: len(flat)]
    return codes.view(magnitudes.shape), steps, mean


def _nearest(values: Tensor, levels: Tensor) -> Tensor:
    """Which of the ascending levels each value is nearest to, uint8."""
    middles = (levels[1:] + levels[:-1]) / 2
    return torch.bucketize(values, middles, out_int32=True).to(torch.uint8)

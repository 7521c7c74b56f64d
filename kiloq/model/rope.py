"""Where tokens stand: rotary angles (plain, linear, dynamic NTK, YaRN) and LogN. Knows positions, not caches."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .config import ModelConfig
from .rope_config import RopeConfig


class Rotation(NamedTuple):
    """What attention needs to know of T tokens' places, computed once per step and shared by all layers."""

    cos: Tensor  # [T, rotary_dim/2] fp32
    sin: Tensor  # [T, rotary_dim/2] fp32
    q_scale: Tensor | None  # [T] fp32, LogN; None where no token is beyond the trained length


def ntk_alpha(config: ModelConfig, length: int) -> float:
    """The NTK factor of a sequence of `length` tokens; 1.0 unless the model stretches dynamically.

    It grows in steps at powers of two, so that a growing sequence changes it rarely. Qwen v1: 2^ceil(log2(n/L)+1) - 1
    (QWenModel.get_ntk_alpha). "dynamic" is transformers' factor*n/L - (factor-1), with n rounded up to L times a power
    of two.
    """
    rope = config.rope
    if rope.kind not in ("qwen1", "dynamic") or length <= rope.original_length:
        return 1.0
    doublings = math.ceil(math.log2(length / rope.original_length))
    if rope.kind == "qwen1":
        return float(2 ** (doublings + 1) - 1)
    return rope.factor * float(2**doublings) - (rope.factor - 1)


class Rope:
    """Turns positions into a Rotation; keeps one vector of inverse frequencies per NTK factor and device."""

    def __init__(self, config: ModelConfig) -> None:
        self.rope = config.rope
        self.logn_length = config.logn_length
        self._tables: dict[tuple[float, torch.device], Tensor] = {}

    def __call__(self, positions: Tensor, alphas: Tensor | float = 1.0) -> Rotation:
        """positions: [T] int, 0-based within each sequence; alphas: [T], or one for all."""
        at = positions.to(torch.float32)  # [T]
        if isinstance(alphas, Tensor):
            distinct, row = torch.unique(alphas, return_inverse=True)
            table = torch.stack([self._inverse_frequencies(float(a), positions.device) for a in distinct.tolist()])
            angles = at[:, None] * table[row]  # [T, R/2]
        else:
            angles = torch.outer(at, self._inverse_frequencies(alphas, positions.device))
        cos, sin = angles.cos(), angles.sin()
        magnitude = _yarn_magnitude(self.rope)
        if magnitude != 1.0:
            cos, sin = cos * magnitude, sin * magnitude
        return Rotation(cos, sin, self._logn(at))

    def _logn(self, at: Tensor) -> Tensor | None:
        if self.logn_length is None:
            return None
        # A function of the position alone: tokens inside the trained length are scaled by exactly one.
        return torch.clamp(torch.log(at + 1) / math.log(self.logn_length), min=1.0)

    def _inverse_frequencies(self, alpha: float, device: torch.device) -> Tensor:
        key = (alpha, device)
        if key not in self._tables:
            self._tables[key] = _inverse_frequencies(self.rope, alpha).to(device)
        return self._tables[key]


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Turn the first dims of each head, halves paired as in NeoX; in fp32, cast back. x: [T, heads, D]."""
    cos, sin = rotation.cos[:, None], rotation.sin[:, None]  # [T, 1, R/2]
    half = cos.shape[-1]
    low, high = x[..., :half].float(), x[..., half : 2 * half].float()
    turned = torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1).to(x.dtype)
    return turned if 2 * half == x.shape[-1] else torch.cat((turned, x[..., 2 * half :]), dim=-1)


def _inverse_frequencies(rope: RopeConfig, alpha: float) -> Tensor:
    """Radians per token of each pair of dimensions, [rotary_dim/2] fp32."""
    dim = rope.rotary_dim
    base = rope.theta * alpha ** (dim / (dim - 2)) if alpha != 1.0 else rope.theta
    plain = 1.0 / (base ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim))
    if rope.kind == "linear":
        return plain / rope.factor
    if rope.kind == "yarn":
        return _yarn_frequencies(rope, plain)
    return plain


def _yarn_frequencies(rope: RopeConfig, plain: Tensor) -> Tensor:
    # YaRN (arXiv 2309.00071, section 3.2): dimensions that turn often within the trained length keep their speed,
    # those that never complete a turn are slowed by `factor`, with a linear ramp between.
    dim = rope.rotary_dim

    def dim_of(turns: float) -> float:
        return dim * math.log(rope.original_length / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dim_of(rope.beta_fast), dim_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = (torch.arange(dim // 2, dtype=torch.float32) - low) / max(high - low, 0.001)
    slowed = ramp.clamp(0, 1)
    return plain / rope.factor * slowed + plain * (1 - slowed)


def _yarn_magnitude(rope: RopeConfig) -> float:
    if rope.kind != "yarn":
        return 1.0
    if rope.attention_factor is not None:
        return rope.attention_factor

    def mscale(weight: float) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * weight * math.log(rope.factor) + 1.0

    if rope.mscale and rope.mscale_all_dim:
        return mscale(rope.mscale) / mscale(rope.mscale_all_dim)
    return mscale(1.0)

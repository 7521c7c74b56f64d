"""What each op means, in plain PyTorch: the training path and the slow twin of every kernel."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .layout import PackedWeight, unpack


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension; the mean in fp32 (arXiv 1910.07467)."""
    return F.rms_norm(x, weight.shape, weight, eps)


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up, the two halves of the last dimension, gate first (arXiv 2002.05202). [T, 2F] -> [T, F]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def causal_attention(q: Tensor, k: Tensor, v: Tensor, *, window: int | None = None) -> Tensor:
    """Each token attends to itself and its past, at most `window` tokens in all.

    q: [B, S, H, D], k and v: [B, S, K, D] with H a multiple of K -> [B, S, H, D]; scaled by 1/sqrt(D).
    """
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    length = q.shape[2]
    shared = q.shape[1] != k.shape[1]
    if window is None or window >= length:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=shared)
    else:
        place = torch.arange(length, device=q.device)
        behind = place[:, None] - place[None, :]
        visible = (behind >= 0) & (behind < window)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, enable_gqa=shared)
    return out.transpose(1, 2)


def quantize_heads(x: Tensor) -> tuple[Tensor, Tensor]:
    """Keys or values of each token and head to int8: codes [T, K, D] and fp16 scales [T, K], x = codes * scales.

    The scale, absmax / 127, is rounded first: codes are the nearest, halves to even, under the scale that is kept.
    """
    x = x.float()
    scales = (x.abs().amax(-1) / 127).clamp(max=torch.finfo(torch.float16).max).half()
    steps = scales.float()
    inverse = torch.where(steps > 0, 1 / steps, 0)  # a head of zeros, or too small for fp16: codes of zero
    codes = (x * inverse[..., None]).round().clamp(-127, 127).to(torch.int8)
    return codes, scales


def quantize_activations(x: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Rows [M, K] to int8 codes and one scale a group, [M, K / group_size]: absmax / 127 a step, half to even.

    Groups below 1e-30 are zero: 127 / absmax must stay finite where denormals are flushed.
    """
    groups = x.float().reshape(len(x), x.shape[1] // group_size, group_size)  # M may be 0
    absmax = groups.abs().amax(2)
    is_zero = absmax < 1e-30
    # A 0-dim tensor, as PyTorch turns number / tensor into a product with the rounded reciprocal.
    inverse = (torch.tensor(127.0) / absmax).masked_fill(is_zero, 0.0)
    return (groups * inverse[..., None]).round().to(torch.int8).flatten(1), (absmax / 127).masked_fill(is_zero, 0.0)


def quant_linear(x: Tensor, packed: PackedWeight) -> Tensor:
    """x [.., K] times a packed matrix, plus its bias, in the type of x; activations rounded as the kernels round."""
    weight = unpack(packed)
    rows = x.reshape(x.numel() // packed.columns, packed.columns).float()
    if isinstance(weight, Tensor):
        out = rows @ weight.float().T
    else:
        if weight.order is not None:
            rows = rows[:, weight.order.long()]
        codes, scales = quantize_activations(rows, weight.group_size)
        groups = scales.shape[1]
        rounded = (codes.view(len(codes), groups, weight.group_size).float() * scales[..., None]).flatten(1)
        zero = 8.0 if weight.kind == "int4" else 0.0
        zeros = zero if weight.zeros is None else weight.zeros.float()[..., None]
        values = (weight.codes.reshape(len(weight.codes), groups, -1).float() - zeros) * weight.scales[..., None]
        out = rounded @ values.flatten(1).T
    if packed.bias is not None:
        out = out + packed.bias
    return out.view(*x.shape[:-1], packed.rows).to(x.dtype)


def gather_rows(packed: PackedWeight, ids: Tensor) -> Tensor:
    """Rows `ids` [T] of a packed matrix, fp32 [T, K]."""
    weight = unpack(packed)
    return (weight if isinstance(weight, Tensor) else weight.dequantize())[ids].float()

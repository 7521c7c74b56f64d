"""What each op means, in plain PyTorch: the training path and the slow twin of every kernel."""

import torch
import torch.nn.functional as F
from torch import Tensor


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

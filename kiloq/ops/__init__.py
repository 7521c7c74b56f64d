"""Arithmetic on tensors: the kernel interface. Knows no model, cache or request.

One function per op. Today every op has one body, the PyTorch one in `reference`, which is also the training path.
"""

from .reference import causal_attention, quantize_heads, rms_norm, swiglu

__all__ = ["causal_attention", "quantize_heads", "rms_norm", "swiglu"]

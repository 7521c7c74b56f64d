"""A checkpoint becomes a model: plain parameters, or matrices packed for the kernels. Knows no cache and no request."""

from typing import Literal, get_args

import torch
from torch import Tensor

from kiloq import ops
from kiloq.errors import ConfigError
from kiloq.model import Transformer
from kiloq.ops.layout import PackedWeight, QuantWeight
from kiloq.quant.linear import QuantEmbedding, QuantLinear
from kiloq.quant.rounding import group_size_of, round_int4, round_int8

from .reader import Checkpoint
from .weights import DTYPES, Weights, empty_model

Quantization = Literal["int8", "int4"]


def load_model(
    checkpoint: Checkpoint,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "cpu",
    quantization: str | None = None,
) -> Transformer:
    """The model that answers fastest here, in evaluation mode without gradients.

    Where the CPU has kernels, 16-bit weights are packed for them and computed with fp32 activations, unless `dtype`
    says float32 or float16. `quantization` rounds every matrix at load, one after the other: memory peaks at the packed
    model plus one matrix.
    """
    kind = _quantization(quantization)
    weights = Weights(checkpoint.folder, checkpoint.config)
    target = _target_dtype(dtype, weights)
    on_cpu = torch.device(device).type == "cpu"
    if kind is not None:
        if not on_cpu:
            raise ConfigError(f"quantization={kind!r} works on the CPU in this version; pass device='cpu'.")
        return _packed(weights, kind)
    sixteen_bit = target == torch.bfloat16 or (dtype == "auto" and target == torch.float16)
    if on_cpu and sixteen_bit and ops.backend() != "reference":
        return _packed(weights, None)
    return _dense(weights, target, device)


def load_dense(
    checkpoint: Checkpoint, *, dtype: str | torch.dtype = "auto", device: str | torch.device = "cpu"
) -> Transformer:
    """The model as plain PyTorch parameters, without gradients: what training, conversion and comparison take.

    "auto" keeps the type that the weights are stored in; memory peaks at the model in `dtype` plus one tensor.
    """
    weights = Weights(checkpoint.folder, checkpoint.config)
    return _dense(weights, _target_dtype(dtype, weights), device)


def _dense(weights: Weights, dtype: torch.dtype, device: str | torch.device) -> Transformer:
    model = empty_model(weights.config)
    state = {name: weights.read(name, dtype=dtype, device=device) for name in weights.shapes}
    weights.check_tied_head(state["embed.weight"])
    # Assigned, not copied; and Module.to_empty would import half a second of torch's meta kernels.
    model.load_state_dict(state, assign=True)
    return model.eval().requires_grad_(False)


def _packed(weights: Weights, kind: Quantization | None) -> Transformer:
    def linear(name: str, columns: int, rows: int, has_bias: bool) -> QuantLinear:
        bias = weights.read(f"{name}.bias", dtype=torch.float32) if has_bias else None
        matrix = weights.read(f"{name}.weight", dtype=torch.bfloat16)
        return QuantLinear(_pack(matrix, "int8" if kind and name == "head" else kind, bias))

    def embedding(name: str, rows: int, columns: int) -> QuantEmbedding:
        matrix = weights.read(f"{name}.weight", dtype=torch.bfloat16)
        weights.check_tied_head(matrix)
        return QuantEmbedding(_pack(matrix, kind and "int8", None))

    model = Transformer(weights.config, linear=linear, embedding=embedding)
    for name, small in model.named_parameters():
        small.data.copy_(weights.read(name, dtype=torch.float32))
    return model.eval().requires_grad_(False)


def _pack(matrix: Tensor, kind: Quantization | None, bias: Tensor | None) -> PackedWeight:
    return ops.pack(matrix if kind is None else _round(matrix, kind), bias)


def _round(matrix: Tensor, kind: Quantization) -> QuantWeight:
    group_size = group_size_of(matrix.shape[1])
    # A matrix whose rows no group divides keeps eight bits.
    return round_int8(matrix) if kind == "int8" or group_size is None else round_int4(matrix, group_size)


def _quantization(word: str | None) -> Quantization | None:
    match word:
        case None | "int8" | "int4":
            return word
    raise ConfigError(f"quantization is {word!r}; it must be {' or '.join(get_args(Quantization))}.")


def _target_dtype(dtype: str | torch.dtype, weights: Weights) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        return weights.dtype
    if dtype not in DTYPES:
        raise ConfigError(f"dtype is {dtype!r}; it must be auto, {', '.join(DTYPES)}.")
    return DTYPES[dtype]

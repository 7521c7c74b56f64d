"""A checkpoint becomes a model: plain parameters, or matrices packed for the kernels. Knows no cache and no request."""

import dataclasses
import time
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from kiloq import ops
from kiloq.errors import ConfigError
from kiloq.model import Transformer
from kiloq.model.transformer import Embedding, Linear
from kiloq.ops.layout import PackedWeight, QuantWeight
from kiloq.quant.frozen import FrozenLinear
from kiloq.quant.grid import fit, rtn
from kiloq.quant.linear import Packed, QuantEmbedding, QuantLinear
from kiloq.quant.nf4 import Nf4Weight, block_for, quantize_nf4
from kiloq.quant.pack import stack

from .merge import AnyWeights, weights_of
from .names import SCORE
from .packed_file import packed_file
from .reader import Checkpoint
from .weights import DTYPES, Weights, empty_model

Quantization = Literal["int8", "int4"]
FrozenKind = Literal["auto", "int8", "int4", "nf4"]

LONG_LOAD = 5.0  # seconds; what takes longer is kept for the next time
WORTH_KEEPING = 100_000_000  # bytes; a small model is slow to load only while the machine is busy

_ROWS = 4096


def load_model(
    checkpoint: Checkpoint,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "cpu",
    quantization: str | None = None,
) -> Transformer:
    """The model that answers fastest here, in evaluation mode without gradients.

    Where the CPU has kernels, 16-bit weights are packed for them and computed with fp32 activations, unless `dtype`
    says float32 or float16. A quantised checkpoint keeps its codes, unless `dtype` says one of these. `quantization`
    rounds every matrix at load, one after the other: memory peaks at the packed model plus one matrix.
    """
    kind = _quantization(quantization)
    weights = weights_of(checkpoint)
    target = target_dtype(dtype, weights)
    on_cpu = torch.device(device).type == "cpu"
    if kind is not None:
        if not on_cpu:
            raise ConfigError(f"quantization={kind!r} works on the CPU in this version; pass device='cpu'.")
        if weights.is_quantized:
            raise ConfigError(
                f"quantization is {kind!r}, but the checkpoint is quantised already; leave it out to use it as it is."
            )
        if dtype not in ("auto", "bfloat16", torch.bfloat16):
            raise ConfigError(f"quantization is {kind!r} and dtype {dtype}; codes compute in one way. Leave dtype out.")
    sixteen_bit = target == torch.bfloat16 or (dtype == "auto" and target == torch.float16)
    in_few_bits = kind is not None or (weights.is_quantized and dtype == "auto")
    if on_cpu and (in_few_bits or (sixteen_bit and ops.backend() != "reference")):
        return _packed(weights, kind)
    return _dense(weights, target, device)


def load_dense(
    checkpoint: Checkpoint, *, dtype: str | torch.dtype = "auto", device: str | torch.device = "cpu"
) -> Transformer:
    """The model as plain PyTorch parameters, without gradients: what training, conversion and comparison take.

    "auto" keeps the type that the weights are stored in; memory peaks at the model in `dtype` plus one tensor.
    """
    weights = weights_of(checkpoint)
    return _dense(weights, target_dtype(dtype, weights), device)


def load_frozen(
    checkpoint: Checkpoint,
    *,
    kind: FrozenKind = "auto",
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "cpu",
) -> Transformer:
    """The model in few bits, for training what is put beside it (Q-LoRA): gradients flow through, none are kept.

    "auto" keeps the codes of a quantised checkpoint; the other kinds round one of 16 bits, matrix by matrix: memory
    peaks at the codes plus one matrix. All else is kept, and computed with, in `dtype`.
    """
    weights = weights_of(checkpoint)
    if weights.is_quantized != (kind == "auto"):
        raise ConfigError(
            f"quantization is {kind!r}, but {checkpoint.folder} is quantised already; leave it out to use it as it is."
            if weights.is_quantized
            else f"{checkpoint.folder} is not quantised, so that it has no codes to keep; ask for int8, int4 or nf4."
        )
    target = target_dtype(dtype, weights)

    def matrix(name: str, columns: int, rows: int, bias: bool) -> nn.Module:
        found: QuantWeight | Nf4Weight | None = None
        if name != "head":
            stored = f"{name}.weight"
            found = (
                weights.read_codes(stored)
                if kind == "auto"
                else _round(weights.read(stored, dtype=weights.dtype, device=device), kind)
            )
        if found is None:  # the head, or a layer that the file's maker left in 16 bits
            with torch.device("meta"):
                return Linear(columns, rows, bias=bias)
        return FrozenLinear(found, torch.empty(rows) if bias else None).to(device)

    def table(name: str, rows: int, columns: int) -> Embedding:
        with torch.device("meta"):
            return Embedding(name, rows, columns)

    model = Transformer(checkpoint.config, linear=matrix, embedding=table)
    state = {name: weights.read(name, dtype=target, device=device) for name, _ in model.named_parameters()}
    weights.check_tied_head(state["embed.weight"])
    model.load_state_dict(state, assign=True)
    return model.eval().requires_grad_(False)


def _round(matrix: Tensor, kind: FrozenKind) -> QuantWeight | Nf4Weight:
    if kind == "nf4" and block_for(matrix.shape[1]):
        return quantize_nf4(matrix)
    return round_rows(matrix, "int4" if kind == "int4" else "int8")


def load_scored(
    checkpoint: Checkpoint, *, dtype: str | torch.dtype = "auto", device: str | torch.device = "cpu"
) -> tuple[Transformer, Tensor]:
    """A reward model: the network, whose own head is of no use, and the row that scores a hidden state, [1, hidden]."""
    config = dataclasses.replace(checkpoint.config, tie_embeddings=True)  # so it needs no head
    weights = Weights(checkpoint.folder, config, checkpoint.quantization, scored=True)
    target = target_dtype(dtype, weights)
    model = empty_model(config)
    state = {name: weights.read(name, dtype=target, device=device) for name in weights.shapes}
    score = state.pop(SCORE)
    model.load_state_dict(state, assign=True)
    return model.eval().requires_grad_(False), score


def _dense(weights: AnyWeights, dtype: torch.dtype, device: str | torch.device) -> Transformer:
    model = empty_model(weights.config)
    state = {name: weights.read(name, dtype=dtype, device=device) for name in weights.shapes}
    weights.check_tied_head(state["embed.weight"])
    # Assigned, not copied; and Module.to_empty would import half a second of torch's meta kernels.
    model.load_state_dict(state, assign=True)
    return model.eval().requires_grad_(False)


def _packed(weights: AnyWeights, kind: Quantization | None) -> Transformer:
    # The embedding and the head lie between a token and all others: they keep 8 bits where the rest has fewer.
    outer: Quantization | None = "int8" if kind or weights.is_quantized else None
    kept = packed_file(weights.folder, weights.files, kind or ("codes" if weights.is_quantized else "bf16"))
    native = ops.backend() != "reference" and bool(weights.files)
    start = time.monotonic()
    found = (kept.read() if native else None) or {}

    def packed(name: str, rows: int, columns: int, *, has_bias: bool) -> PackedWeight:
        one = found.pop(name, None)
        if one is not None and (one.rows, one.columns, one.bias is not None) == (rows, columns, has_bias):
            return one
        matrix = weights.read_matrix(f"{name}.weight")
        if name == "embed" and isinstance(matrix, Tensor):
            weights.check_tied_head(matrix)
        bias = weights.read(f"{name}.bias", dtype=torch.float32) if has_bias else None
        return _pack(matrix, outer if name in ("embed", "head") else kind, bias)

    was_found = bool(found)
    model = Transformer(
        weights.config,
        linear=lambda name, columns, rows, bias: QuantLinear(packed(name, rows, columns, has_bias=bias)),
        embedding=lambda name, rows, columns: QuantEmbedding(packed(name, rows, columns, has_bias=False)),
    )
    for name, small in model.named_parameters():
        small.data.copy_(weights.read(name, dtype=torch.float32))
    if native and not was_found and time.monotonic() - start > LONG_LOAD:
        matrices = {name: module.packed for name, module in model.named_modules() if isinstance(module, Packed)}
        if sum(one.data.nbytes for one in matrices.values()) > WORTH_KEEPING:
            kept.write(matrices)
    return model.eval().requires_grad_(False)


def _pack(matrix: Tensor | QuantWeight, kind: Quantization | None, bias: Tensor | None) -> PackedWeight:
    if isinstance(matrix, Tensor) and kind is not None:
        matrix = round_rows(matrix, kind)
    return ops.pack(matrix, bias)


def round_rows(matrix: Tensor, kind: Quantization) -> QuantWeight:
    """Each row of a matrix to the nearest codes; 8 bits where no group size divides its length for 4."""
    scheme = fit("matrix", matrix.shape[1], 4 if kind == "int4" else 8, None)
    # Some rows at a time: the fp32 copy of a vocabulary's matrix never exists whole.
    return stack([rtn(rows, scheme) for rows in torch.split(matrix, _ROWS)], "matrix")


def _quantization(word: str | None) -> Quantization | None:
    match word:
        case None | "int8" | "int4":
            return word
    raise ConfigError(f"quantization is {word!r}; it must be {' or '.join(get_args(Quantization))}.")


def target_dtype(dtype: str | torch.dtype, weights: AnyWeights) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        return weights.dtype
    if dtype not in DTYPES:
        raise ConfigError(f"dtype is {dtype!r}; it must be auto, {', '.join(DTYPES)}.")
    return DTYPES[dtype]

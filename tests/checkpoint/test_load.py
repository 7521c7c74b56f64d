"""Loading for answers: matrices are packed, rounded on the way if asked, and mean what the checkpoint says."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from kiloq import ops
from kiloq.checkpoint import load_dense, load_model, open_checkpoint
from kiloq.checkpoint.load import round_rows
from kiloq.errors import ConfigError
from kiloq.model import Transformer
from kiloq.model.config import Family
from kiloq.quant.linear import Packed, is_packed

Write = Callable[..., tuple[Path, Transformer]]
IDS = torch.arange(30)
NATIVE = pytest.mark.skipif(ops.backend() == "reference", reason="no kernels here")


def distance(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


def dequantized(packed: ops.PackedWeight) -> torch.Tensor:
    known = ops.unpack(packed)
    return known.float() if isinstance(known, torch.Tensor) else known.dequantize()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("family", ["qwen", "qwen2", "qwen3"])
def test_rounding_at_load_is_rounding_of_each_matrix(family: Family, kind: str, tied: bool, write: Write) -> None:
    folder, _ = write(family, dtype=torch.bfloat16, tie_embeddings=tied)
    checkpoint = open_checkpoint(folder)
    model = load_model(checkpoint, quantization=kind)
    dense = load_dense(checkpoint, dtype="float32")
    found = 0
    for name, module in model.named_modules():
        if isinstance(module, Packed):
            exact = dense.get_parameter(f"{name}.weight")
            exact.copy_(round_rows(exact, "int8" if name in ("embed", "head") else kind).dequantize())
            assert torch.allclose(dequantized(module.packed), exact, rtol=1e-6, atol=0)
            found += 1
    assert found == 4 * 2 + (1 if tied else 2)
    assert distance(model.logits(IDS), dense.logits(IDS)) < 0.1  # activations are rounded too


@NATIVE
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_weights_are_packed_where_there_are_kernels(dtype: torch.dtype, write: Write) -> None:
    checkpoint = open_checkpoint(write(dtype=dtype)[0])
    model = load_model(checkpoint)
    assert is_packed(model)
    assert distance(model.logits(IDS), load_dense(checkpoint, dtype="float32").logits(IDS)) < 0.02
    for plain in ("float32", "float16"):
        assert not is_packed(load_model(checkpoint, dtype=plain))


def test_fp32_weights_stay_plain(write: Write) -> None:
    assert not is_packed(load_model(open_checkpoint(write()[0])))


def test_an_unknown_quantization_is_an_error(write: Write) -> None:
    checkpoint = open_checkpoint(write()[0])
    with pytest.raises(ConfigError, match="quantization is 'int3'; it must be int8 or int4"):
        load_model(checkpoint, quantization="int3")
    with pytest.raises(ConfigError, match="works on the CPU"):
        load_model(checkpoint, quantization="int4", device="cuda")
    with pytest.raises(ConfigError, match="quantization is 'int4' and dtype float32"):
        load_model(checkpoint, quantization="int4", dtype="float32")

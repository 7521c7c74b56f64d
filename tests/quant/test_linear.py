"""Layers over packed matrices: they multiply as the codes say, stay out of the state, and go nowhere."""

import pytest
import torch

from kiloq import ops
from kiloq.errors import ConfigError
from kiloq.model import Transformer
from kiloq.quant.grid import Scheme, rtn
from kiloq.quant.linear import QuantEmbedding, QuantLinear, is_packed
from tests.tiny import tiny_config

CONFIG = tiny_config(vocab_size=50, num_layers=1, intermediate_size=96, tie_embeddings=True, max_length=64)

EIGHT, FOUR = Scheme(bits=8, group_size=None), Scheme(bits=4, group_size=32)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.fixture
def packed_model() -> Transformer:
    def linear(name: str, columns: int, rows: int, has_bias: bool) -> QuantLinear:
        return QuantLinear(ops.pack(rtn(random(rows, columns), EIGHT), random(rows) if has_bias else None))

    def embedding(name: str, rows: int, columns: int) -> QuantEmbedding:
        return QuantEmbedding(ops.pack(rtn(random(rows, columns), EIGHT)))

    model = Transformer(CONFIG, linear=linear, embedding=embedding)
    model.init_weights(torch.Generator().manual_seed(0))
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize("kind", ["bf16", "int8", "int4"])
def test_a_layer_multiplies_by_what_its_codes_stand_for(kind: str) -> None:
    weight, bias, x = random(48, 64), random(48), random(5, 64)
    known = {"bf16": weight.bfloat16(), "int8": rtn(weight, EIGHT), "int4": rtn(weight, FOUR)}[kind]
    exact = known.float() if isinstance(known, torch.Tensor) else known.dequantize()
    ours = QuantLinear(ops.pack(known, bias))(x)
    assert ours.dtype == torch.float32
    expected = x @ exact.T + bias
    # Activations are rounded: to 8 bits, or to bf16 by a matrix unit.
    assert (ours - expected).norm() < 0.01 * expected.norm()


def test_an_embedding_gives_rows_and_multiplies_by_them() -> None:
    weight = rtn(random(40, 64), EIGHT)
    table = QuantEmbedding(ops.pack(weight))
    ids = torch.tensor([3, 0, 39, 3])
    assert torch.allclose(table(ids), weight.dequantize()[ids], atol=1e-6)
    x = random(2, 64)
    expected = x @ weight.dequantize().T
    assert (table.project(x) - expected).norm() < 0.01 * expected.norm()


def test_a_packed_model_holds_its_small_parameters_only(packed_model: Transformer) -> None:
    assert is_packed(packed_model)
    assert not is_packed(Transformer(CONFIG))
    assert all(name.endswith("norm.weight") for name in packed_model.state_dict())
    assert {parameter.dtype for parameter in packed_model.parameters()} == {torch.float32}
    logits = packed_model.logits(torch.tensor([1, 2, 3]))
    assert logits.shape == (3, CONFIG.vocab_size)
    assert logits.isfinite().all()


@pytest.mark.parametrize("where", [torch.bfloat16, torch.float64, "meta"])
def test_a_packed_model_goes_nowhere(where: torch.dtype | str, packed_model: Transformer) -> None:
    with pytest.raises(ConfigError, match=r"packed weights cannot become .*load the checkpoint again"):
        packed_model.to(where)
    assert {parameter.dtype for parameter in packed_model.parameters()} == {torch.float32}
    assert packed_model.to("cpu", torch.float32) is packed_model

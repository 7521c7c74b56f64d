"""Random models have the sizes of the real ones, zero mean, and hidden states of ordinary size."""

import pytest
import torch

from kiloq.bench.measure import weight_bytes_per_step
from kiloq.bench.random_weights import RandomMatrices, random_model
from kiloq.bench.shapes import SHAPES, shape_config
from kiloq.errors import ConfigError
from kiloq.model import ModelConfig
from kiloq.ops import QuantWeight

PUBLISHED = {
    "qwen-1.8b": 1_836_828_672,
    "qwen-7b": 7_721_324_544,
    "qwen-14b": 14_167_290_880,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-0.6b": 596_049_920,
}


@pytest.mark.parametrize(("name", "parameters"), PUBLISHED.items())
def test_a_shape_has_as_many_weights_as_the_published_model(name: str, parameters: int) -> None:
    assert shape_config(name).num_parameters == parameters


@pytest.mark.parametrize("name", SHAPES)
def test_every_shape_is_a_model(name: str) -> None:
    config = shape_config(name)
    assert config.hidden_size % 64 == config.intermediate_size % 64 == 0


def test_an_unknown_shape_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"Did you mean qwen2\.5-7b\?"):
        shape_config("qwen2.5-7")


@pytest.mark.parametrize("precision", ["bf16", "int8", "int4"])
def test_random_matrices_have_zero_mean_and_the_spread_of_untrained_weights(precision: str) -> None:
    matrix = RandomMatrices(torch.Generator().manual_seed(1))(600, 1024, precision)
    weights = matrix.dequantize() if isinstance(matrix, QuantWeight) else matrix.float()
    error = 0.02 / (600 * 1024) ** 0.5
    assert abs(weights.mean().item()) < 5 * error
    assert weights.std().item() == pytest.approx(0.02, rel=0.02)
    assert not torch.equal(weights[0], weights[1])


def test_no_two_matrices_begin_alike() -> None:
    draw = RandomMatrices(torch.Generator().manual_seed(1))
    first, second = (draw(8, 64, "bf16") for _ in range(2))
    assert isinstance(first, torch.Tensor)
    assert isinstance(second, torch.Tensor)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("precision", ["bf16", "int8", "int4"])
def test_hidden_states_of_a_random_model_are_finite_and_of_ordinary_size(precision: str, small: ModelConfig) -> None:
    model = random_model(small, precision)
    logits = model.logits(torch.arange(40))
    assert torch.isfinite(logits).all()
    assert 1e-2 < logits.std().item() < 1e2
    # Tokens differ: a direction that all share would make every row alike.
    assert (logits - logits.mean(0)).std() > 0.2 * logits.std()


def test_a_step_reads_every_matrix_once_but_only_rows_of_an_embedding_that_is_no_head(small: ModelConfig) -> None:
    model = random_model(small, "int8")
    linear = small.num_parameters - small.vocab_size * small.hidden_size
    read = weight_bytes_per_step(model)
    assert linear <= read < 1.2 * linear  # scales, and the padding of the head to 16 rows

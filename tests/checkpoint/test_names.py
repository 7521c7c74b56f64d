"""The tables of names: complete, without overlap, and equal to what real files and transformers use."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import transformers

from kiloq.checkpoint.names import is_harmless, layer_of, parts
from kiloq.checkpoint.weights import empty_model, parameter_shapes
from kiloq.model import ModelConfig
from kiloq.model.config import Family


@pytest.mark.parametrize("family", ["qwen", "qwen2", "qwen3"])
def test_parts_cover_every_row_of_every_parameter_once(family: Family, make_config: Callable[..., ModelConfig]) -> None:
    config = make_config(family)
    shapes = parameter_shapes(empty_model(config))
    next_row = dict.fromkeys(shapes, 0)
    for part in parts(config, shapes):
        assert part.start == next_row[part.parameter]
        assert part.shape[1:] == shapes[part.parameter][1:]
        next_row[part.parameter] += part.shape[0]
    assert next_row == {name: shape[0] for name, shape in shapes.items()}


def test_names_and_bytes_equal_the_published_index_of_qwen_7b(shared_data: Path) -> None:
    folder = shared_data / "tokenizer" / "Qwen-7B"
    config = ModelConfig.from_hf(json.loads((folder / "config.json").read_text()))
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert {part.tensor for part in parts(config, parameter_shapes(empty_model(config)))} == set(index["weight_map"])
    assert 2 * config.num_parameters == index["metadata"]["total_size"]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_names_and_shapes_equal_those_of_transformers(
    family: Family, tied: bool, make_config: Callable[..., ModelConfig]
) -> None:
    config = make_config(family, tie_embeddings=tied)
    kind = {"qwen2": transformers.Qwen2ForCausalLM, "qwen3": transformers.Qwen3ForCausalLM}[family]
    theirs = {name: tuple(p.shape) for name, p in kind(kind.config_class.from_dict(config.to_hf())).named_parameters()}
    assert {part.tensor: part.shape for part in parts(config, parameter_shapes(empty_model(config)))} == theirs


@pytest.mark.parametrize(
    "name",
    [
        "transformer.rotary_emb.inv_freq",
        "transformer.h.3.attn.bias",
        "transformer.h.3.attn.masked_bias",
        "model.layers.0.self_attn.rotary_emb.inv_freq",
    ],
)
def test_buffers_of_old_files_are_harmless(name: str) -> None:
    assert is_harmless(name)


@pytest.mark.parametrize("name", ["transformer.h.3.attn.c_attn.bias", "model.layers.0.self_attn.q_proj.bias"])
def test_biases_of_projections_are_not_harmless(name: str) -> None:
    assert not is_harmless(name)


def test_layer_of_a_tensor() -> None:
    assert layer_of("transformer.h.31.mlp.w1.weight") == 31
    assert layer_of("model.layers.5.mlp.up_proj.weight") == 5
    assert layer_of("lm_head.weight") is None

"""config.json of every generation <-> ModelConfig: round trips, published sizes, and one clear error for each fault."""

import json
from pathlib import Path

import pytest
import transformers

from kiloq.errors import ConfigError
from kiloq.model import ModelConfig

QWEN1 = {
    "model_type": "qwen",
    "vocab_size": 151_936,
    "hidden_size": 2048,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "kv_channels": 128,
    "intermediate_size": 11_008,
    "seq_length": 8192,
    "max_position_embeddings": 8192,
}
QWEN2 = {
    "model_type": "qwen2",
    "vocab_size": 151_936,
    "hidden_size": 896,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "intermediate_size": 4864,
    "max_position_embeddings": 32_768,
    "rope_theta": 1e6,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}
SHAPE = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
SIZES = {  # published v1 shapes and their exact parameter counts
    "1.8B": ((2048, 24, 16, 11_008, 151_936), 1_836_828_672),
    "7B": ((4096, 32, 32, 22_016, 151_936), 7_721_324_544),
    "14B": ((5120, 40, 40, 27_392, 152_064), 14_167_290_880),
    "72B": ((8192, 80, 64, 49_152, 152_064), 72_287_920_128),
}
TINY = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def published(size: str) -> ModelConfig:
    return ModelConfig.from_hf(QWEN1 | dict(zip(SHAPE, SIZES[size][0], strict=True)))


@pytest.mark.parametrize("size", SIZES)
def test_published_v1_sizes_have_their_published_parameter_counts(size: str) -> None:
    assert published(size).num_parameters == SIZES[size][1]


def test_parameter_count_equals_the_weights_of_transformers() -> None:
    for theirs in (
        transformers.Qwen2Config(**TINY, tie_word_embeddings=True),
        transformers.Qwen3Config(**TINY, head_dim=12),
    ):
        model = transformers.AutoModelForCausalLM.from_config(theirs)
        assert ModelConfig.from_hf(theirs.to_dict()).num_parameters == sum(p.numel() for p in model.parameters())


def test_cache_bytes_per_token_of_the_published_sizes() -> None:
    assert [published(size).kv_bytes_per_token() for size in SIZES] == [196_608, 524_288, 819_200, 2_621_440]


@pytest.mark.parametrize(
    "hf",
    [
        QWEN1,
        QWEN1 | {"use_dynamic_ntk": False, "use_logn_attn": False, "rotary_pct": 0.5},
        QWEN2,
        QWEN2 | {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8192}},
        QWEN2 | {"use_sliding_window": True, "sliding_window": 512, "max_window_layers": 12},
        QWEN2 | {"model_type": "qwen3", "head_dim": 128, "rope_theta": 1e6},
    ],
)
def test_writing_and_reading_gives_the_same_configuration(hf: dict[str, object]) -> None:
    config = ModelConfig.from_hf(hf)
    assert ModelConfig.from_hf(json.loads(json.dumps(config.to_hf()))) == config


@pytest.mark.parametrize("hf", [QWEN2, QWEN2 | {"model_type": "qwen3", "head_dim": 128}])
def test_transformers_reads_what_we_write(hf: dict[str, object], tmp_path: Path) -> None:
    config = ModelConfig.from_hf(hf)
    (tmp_path / "config.json").write_text(json.dumps(config.to_hf()))
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    assert ModelConfig.from_hf(theirs.to_dict()) == config


def test_both_spellings_of_v1_load(shared_data: Path) -> None:
    old, new = (
        ModelConfig.from_hf(json.loads((shared_data / "tokenizer" / name / "config.json").read_text()))
        for name in ("Qwen-7B-Chat", "Qwen-7B")
    )
    assert old.num_parameters == new.num_parameters == 7_721_324_544
    assert (old.rope.original_length, old.max_length) == (2048, 6144)
    assert (new.rope.original_length, new.max_length) == (8192, 32_768)


@pytest.mark.parametrize(
    ("hf", "words"),
    [
        (QWEN2 | {"model_type": "qwen2_moe"}, "qwen2_moe"),
        ({"hidden_size": 4}, "model_type is None"),
        (QWEN2 | {"hidden_size": "896"}, "hidden_size"),
        (QWEN2 | {"num_key_value_heads": 5}, "14 attention heads cannot share 5"),
        (QWEN2 | {"rope_scaling": {"type": "longrope"}}, "longrope"),
        (QWEN2 | {"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        (QWEN2 | {"torch_dtype": "int8"}, "int8"),
        (QWEN2 | {"model_type": "qwen3", "attention_bias": True}, "attention_bias"),
        (QWEN2 | {"num_hidden_layers": 0}, "num_layers is 0"),
        (QWEN2 | {"layer_types": ["full_attention"]}, "layer_types"),
        (QWEN2 | {"layer_types": [[]] * 24}, "layer_types"),
        (QWEN2 | {"num_hidden_layers": 10**12}, "num_hidden_layers is 1,000,000,000,000"),
        (QWEN1 | {"num_hidden_layers": 10_001}, "at most 10,000"),
        (QWEN2 | {"hidden_size": 2**31}, "at most 2,147,483,647"),
        (QWEN2 | {"vocab_size": 10**5000}, "vocab_size"),
        (QWEN2 | {"sliding_window": -5, "use_sliding_window": True}, "sliding_window is -5"),
        (QWEN2 | {"rope_theta": 10**400}, "rope_theta"),
        (QWEN2 | {"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        (QWEN2 | {"rope_scaling": {"type": "dynamic", "original_max_position_embeddings": 0}}, "original"),
        (QWEN2 | {"hidden_size": 14 * 2**27, "vocab_size": 2**31 - 1}, "weights"),
        (QWEN1 | {"kv_channels": 64}, "hidden_size is 2048"),
        (QWEN1 | {"no_bias": False}, "no_bias"),
        ({k: v for k, v in QWEN1.items() if k != "hidden_size"}, "hidden_size or n_embd is None"),
    ],
)
def test_a_faulty_config_is_one_clear_error(hf: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        ModelConfig.from_hf(hf)

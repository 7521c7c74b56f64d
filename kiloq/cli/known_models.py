"""The shapes of Qwen v1, so that `kiloq info` answers without a download. Data only."""

import re

_COMMON: dict[str, object] = {
    "model_type": "qwen",
    "kv_channels": 128,
    "layer_norm_epsilon": 1e-6,
    "no_bias": True,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}


def _shape(vocabulary: int, hidden: int, layers: int, width: int) -> dict[str, object]:
    return _COMMON | {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 128,
        "intermediate_size": width,
    }


# config.json of each published size; the lengths are those of the checkpoints of late 2023.
_QWEN_V1 = {
    "1_8b": _shape(151_936, 2048, 24, 11_008) | {"seq_length": 8192, "max_position_embeddings": 8192},
    "7b": _shape(151_936, 4096, 32, 22_016) | {"seq_length": 8192, "max_position_embeddings": 32_768},
    "14b": _shape(152_064, 5120, 40, 27_392) | {"seq_length": 2048, "max_position_embeddings": 8192},
    "72b": _shape(152_064, 8192, 80, 49_152)
    | {
        "seq_length": 32_768,
        "max_position_embeddings": 32_768,
        "rotary_emb_base": 1_000_000,
        "use_dynamic_ntk": False,
        "use_logn_attn": False,
    },
}
_NAME = re.compile(r"(?:(?:hf|huggingface|ms|modelscope):)?(?:qwen/)?qwen-(1[._]8|7|14|72)b(?:-chat)?(?:-int[48])?")


def known_config(name: str) -> dict[str, object] | None:
    """The config.json of a Qwen v1 model by its hub id, in either hub's spelling, or None for any other name."""
    match = _NAME.fullmatch(name.lower())
    return _QWEN_V1[match[1].replace(".", "_") + "b"] if match else None

"""What our parameters are called on disk. The only place that knows; knows no files and no values."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from kiloq.model.config import Family, ModelConfig


@dataclass(frozen=True)
class Part:
    """One tensor on disk and where it lies in ours: rows [start, start + shape[0]) of `parameter`."""

    parameter: str
    tensor: str
    start: int
    shape: tuple[int, ...]


# Our fused parameters hold these blocks of rows, in this order.
_QKV = ("q", "k", "v")
_GATE_UP = ("gate", "up")

SCORE = "score.weight"
"""The row by which a reward model turns a hidden state into a number; transformers' name for it."""

# Per family: name in our model -> names on disk, one for each block of rows. `{i}` is the layer.
_Table = dict[str, tuple[str, ...]]

# Qwen v1: c_attn is fused on disk already; w2 is the gate, w1 the up projection.
_QWEN1: _Table = {
    "embed.weight": ("transformer.wte.weight",),
    "blocks.{i}.attn_norm.weight": ("transformer.h.{i}.ln_1.weight",),
    "blocks.{i}.attn.qkv.weight": ("transformer.h.{i}.attn.c_attn.weight",),
    "blocks.{i}.attn.qkv.bias": ("transformer.h.{i}.attn.c_attn.bias",),
    "blocks.{i}.attn.out.weight": ("transformer.h.{i}.attn.c_proj.weight",),
    "blocks.{i}.mlp_norm.weight": ("transformer.h.{i}.ln_2.weight",),
    "blocks.{i}.mlp.gate_up.weight": ("transformer.h.{i}.mlp.w2.weight", "transformer.h.{i}.mlp.w1.weight"),
    "blocks.{i}.mlp.down.weight": ("transformer.h.{i}.mlp.c_proj.weight",),
    "norm.weight": ("transformer.ln_f.weight",),
    "head.weight": ("lm_head.weight",),
    SCORE: (SCORE,),
}

# Qwen 1.5, 2, 2.5 and 3 share one naming; a generation uses the lines that its model has.
_QWEN2: _Table = {
    "embed.weight": ("model.embed_tokens.weight",),
    "blocks.{i}.attn_norm.weight": ("model.layers.{i}.input_layernorm.weight",),
    "blocks.{i}.attn.qkv.weight": tuple(f"model.layers.{{i}}.self_attn.{x}_proj.weight" for x in _QKV),
    "blocks.{i}.attn.qkv.bias": tuple(f"model.layers.{{i}}.self_attn.{x}_proj.bias" for x in _QKV),
    "blocks.{i}.attn.q_norm.weight": ("model.layers.{i}.self_attn.q_norm.weight",),
    "blocks.{i}.attn.k_norm.weight": ("model.layers.{i}.self_attn.k_norm.weight",),
    "blocks.{i}.attn.out.weight": ("model.layers.{i}.self_attn.o_proj.weight",),
    "blocks.{i}.mlp_norm.weight": ("model.layers.{i}.post_attention_layernorm.weight",),
    "blocks.{i}.mlp.gate_up.weight": tuple(f"model.layers.{{i}}.mlp.{x}_proj.weight" for x in _GATE_UP),
    "blocks.{i}.mlp.down.weight": ("model.layers.{i}.mlp.down_proj.weight",),
    "norm.weight": ("model.norm.weight",),
    "head.weight": ("lm_head.weight",),
    SCORE: (SCORE,),
}

_TABLES: dict[Family, _Table] = {"qwen": _QWEN1, "qwen2": _QWEN2, "qwen3": _QWEN2}

# Buffers that old files carry and that say nothing: rotary frequencies, causal masks (v1: h.{i}.attn.bias).
_HARMLESS = re.compile(r"\b(rotary_emb\.(inv_freq|cos_cached|sin_cached)|attn\.(bias|masked_bias|logn_tensor))$")

_OUR_LAYER = re.compile(r"^blocks\.(\d+)\.")
_LAYER = re.compile(r"^(?:transformer\.h|model\.layers)\.(\d+)\.")


def parts(config: ModelConfig, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[Part]:
    """Every tensor that a checkpoint holds on disk, for our parameters `shapes` of a model of this configuration."""
    table = _TABLES[config.family]
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    for parameter, (rows, *rest) in shapes.items():
        tensors = table[_OUR_LAYER.sub("blocks.{i}.", parameter)]
        heights = (q, kv, kv) if len(tensors) == len(_QKV) else (rows // len(tensors),) * len(tensors)
        layer = _OUR_LAYER.match(parameter)
        start = 0
        for tensor, height in zip(tensors, heights, strict=True):
            yield Part(parameter, tensor.format(i=layer[1] if layer else ""), start, (height, *rest))
            start += height


def is_harmless(tensor: str) -> bool:
    """True for tensors on disk that no model needs."""
    return _HARMLESS.search(tensor) is not None


def layer_of(tensor: str) -> int | None:
    """The layer that a tensor on disk belongs to; None for embeddings, final norm and head."""
    found = _LAYER.match(tensor)
    return int(found[1]) if found else None

"""Every dense Qwen generation as data. Knows config.json's words, not tensors or files."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from kiloq.errors import ConfigError

from .fields import Fields
from .rope_config import RopeConfig, rope_from_hf, rope_to_hf

Family = Literal["qwen", "qwen2", "qwen3"]

_MOST_LAYERS = 10_000  # far beyond any model, and still a short list of windows
_MOST_WEIGHTS = 2**50


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shape of one Transformer. `intermediate_size` is the true width of the MLP (v1 files hold twice that).

    `windows[i]` is how many tokens layer i looks back, itself included; None sees everything. `logn_length` is the
    length beyond which LogN scales the queries, None for models without it. `dtype` is the one the weights were
    published in.
    """

    family: Family
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    norm_eps: float = 1e-6
    qkv_bias: bool
    qk_norm: bool = False
    tie_embeddings: bool = False
    rope: RopeConfig
    logn_length: int | None = None
    windows: tuple[int | None, ...]
    max_length: int
    initializer_range: float = 0.02
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim")
        for name in (*sizes, "intermediate_size", "max_length"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"{self.num_heads} attention heads cannot share {self.num_kv_heads} key-value heads evenly; "
                "num_attention_heads must be a multiple of num_key_value_heads."
            )
        if self.rope.rotary_dim % 2 or not 0 < self.rope.rotary_dim <= self.head_dim:
            raise ConfigError(
                f"rotary embedding covers {self.rope.rotary_dim} of {self.head_dim} dimensions; it must be even "
                "and no more than head_dim."
            )
        if len(self.windows) != self.num_layers:
            raise ConfigError(f"attention windows are given for {len(self.windows)} of {self.num_layers} layers.")
        if self.num_parameters > _MOST_WEIGHTS:
            raise ConfigError(f"these sizes make a model of {self.num_parameters:.2g} weights; no machine holds it.")

    @classmethod
    def from_hf(cls, hf: Mapping[str, object]) -> "ModelConfig":
        """The configuration that a config.json describes; ConfigError for an unknown or contradictory one."""
        model_type = hf.get("model_type")
        if model_type == "qwen":
            return _from_qwen1(Fields(hf))
        if model_type in ("qwen2", "qwen3"):
            return _from_qwen2(Fields(hf), model_type)
        raise ConfigError(
            f"model_type is {model_type!r}; kiloq runs the dense models {', '.join(get_args(Family))} "
            "(Qwen v1, 1.5, 2, 2.5 and 3). Mixture-of-experts and vision models are not among them."
        )

    def to_hf(self) -> dict[str, object]:
        """The config.json that `from_hf` reads back to an equal configuration, in the family's own words."""
        return _to_qwen1(self) if self.family == "qwen" else _to_qwen2(self)

    @property
    def num_parameters(self) -> int:
        """How many weights the model has; a tied embedding counts once."""
        qkv_width = (self.num_heads + 2 * self.num_kv_heads) * self.head_dim
        attention = self.hidden_size * (qkv_width + self.num_heads * self.head_dim)
        attention += qkv_width * self.qkv_bias + 2 * self.head_dim * self.qk_norm
        layer = attention + 3 * self.hidden_size * self.intermediate_size + 2 * self.hidden_size
        tables = self.vocab_size * self.hidden_size * (1 if self.tie_embeddings else 2)
        return tables + self.num_layers * layer + self.hidden_size

    def kv_bytes_per_token(self, bytes_per_value: int = 2, *, scale_bytes: int = 0) -> int:
        """Bytes of keys and values that one token keeps in the cache; int8 has a scale for each key and value."""
        return 2 * self.num_layers * self.num_kv_heads * (self.head_dim * bytes_per_value + scale_bytes)


def _from_qwen1(f: Fields) -> ModelConfig:
    # The first release (2023-08) used GPT-style key names; both spellings load. Specification: QWenConfig.
    hidden_size = f.integer("hidden_size", "n_embd")
    num_heads = f.integer("num_attention_heads", "n_head")
    head_dim = f.integer("kv_channels", default=hidden_size // max(num_heads, 1))
    if head_dim * num_heads != hidden_size:
        raise ConfigError(
            f"config.json: kv_channels {head_dim} x num_attention_heads {num_heads} is {head_dim * num_heads}, "
            f"but hidden_size is {hidden_size}; Qwen v1 needs them equal."
        )
    if not f.flag("no_bias", default=True):
        raise ConfigError("config.json: no_bias is false; Qwen v1 has a bias on the query, key and value only.")
    trained_length = f.integer("seq_length", default=8192)
    num_layers = f.integer("num_hidden_layers", "n_layer", most=_MOST_LAYERS)
    return ModelConfig(
        family="qwen",
        vocab_size=f.integer("padded_vocab_size", "vocab_size"),
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=head_dim,
        intermediate_size=f.integer("intermediate_size", "ffn_hidden_size") // 2,
        norm_eps=f.number("layer_norm_epsilon", default=1e-6),
        qkv_bias=True,
        tie_embeddings=f.flag("tie_word_embeddings"),
        rope=RopeConfig(
            theta=f.number("rotary_emb_base", default=10_000.0),
            rotary_dim=int(head_dim * f.number("rotary_pct", default=1.0)),
            kind="qwen1" if f.flag("use_dynamic_ntk", default=True) else "plain",
            original_length=trained_length,
        ),
        logn_length=trained_length if f.flag("use_logn_attn", default=True) else None,
        windows=(None,) * num_layers,
        max_length=max(trained_length, f.integer("max_position_embeddings", "n_positions", default=trained_length)),
        initializer_range=f.number("initializer_range", default=0.02),
        # Published v1 files leave bf16/fp16/fp32 false and say nothing; their weights are bfloat16.
        dtype=f.dtype("torch_dtype", "dtype", "params_dtype") if f.first("torch_dtype", "dtype") else "bfloat16",
    )


def _to_qwen1(c: ModelConfig) -> dict[str, object]:
    if c.num_kv_heads != c.num_heads or c.qk_norm or not c.qkv_bias or c.windows != (None,) * c.num_layers:
        raise ConfigError("the Qwen v1 format has no grouped heads, qk-norm or windows; write the model as qwen2.")
    if c.rope.kind not in ("plain", "qwen1"):
        raise ConfigError(f"the Qwen v1 format has no {c.rope.kind} rotary scaling; write the model as qwen2.")
    return {
        "architectures": ["QWenLMHeadModel"],
        "model_type": "qwen",
        "vocab_size": c.vocab_size,
        "hidden_size": c.hidden_size,
        "num_hidden_layers": c.num_layers,
        "num_attention_heads": c.num_heads,
        "kv_channels": c.head_dim,
        "intermediate_size": 2 * c.intermediate_size,
        "layer_norm_epsilon": c.norm_eps,
        "rotary_emb_base": c.rope.theta,
        "rotary_pct": c.rope.rotary_dim / c.head_dim,
        "seq_length": c.rope.original_length,
        "max_position_embeddings": c.max_length,
        "use_dynamic_ntk": c.rope.kind == "qwen1",
        "use_logn_attn": c.logn_length is not None,
        "no_bias": True,
        "tie_word_embeddings": c.tie_embeddings,
        "initializer_range": c.initializer_range,
        "attn_dropout_prob": 0.0,
        "emb_dropout_prob": 0.0,
        "scale_attn_weights": True,
        "use_cache": True,
        "use_flash_attn": "auto",
        "bf16": False,
        "fp16": False,
        "fp32": False,
        "torch_dtype": c.dtype,
        "tokenizer_class": "QWenTokenizer",
    }


def _from_qwen2(f: Fields, family: Family) -> ModelConfig:
    hidden_size = f.integer("hidden_size")
    num_heads = f.integer("num_attention_heads")
    num_layers = f.integer("num_hidden_layers", most=_MOST_LAYERS)
    max_length = f.integer("max_position_embeddings", default=32_768)
    default_head_dim = hidden_size // max(num_heads, 1) if family == "qwen2" else 128
    head_dim = f.integer("head_dim", default=default_head_dim)
    if family == "qwen3" and f.flag("attention_bias"):
        raise ConfigError(
            "config.json: attention_bias is true; no Qwen3 model has biases, and kiloq does not run them."
        )
    if f.first("hidden_act") not in (None, "silu"):
        raise ConfigError(f"config.json: hidden_act is {f.first('hidden_act')!r}; Qwen models use silu.")
    return ModelConfig(
        family=family,
        vocab_size=f.integer("vocab_size"),
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=f.integer("num_key_value_heads", default=num_heads),
        head_dim=head_dim,
        intermediate_size=f.integer("intermediate_size"),
        norm_eps=f.number("rms_norm_eps", default=1e-6),
        qkv_bias=family == "qwen2",
        qk_norm=family == "qwen3",
        tie_embeddings=f.flag("tie_word_embeddings"),
        rope=rope_from_hf(f, head_dim, max_length),
        windows=_windows_of_qwen2(f, num_layers),
        max_length=max_length,
        initializer_range=f.number("initializer_range", default=0.02),
        dtype=f.dtype("dtype", "torch_dtype"),
    )


def _windows_of_qwen2(f: Fields, num_layers: int) -> tuple[int | None, ...]:
    window = f.integer("sliding_window", default=4096) if f.flag("use_sliding_window") else None
    kinds = f.first("layer_types")
    if isinstance(kinds, list | tuple):
        if len(kinds) != num_layers or any(kind not in ("full_attention", "sliding_attention") for kind in kinds):
            raise ConfigError(
                f"config.json: layer_types must be full_attention or sliding_attention for each of {num_layers} layers."
            )
        return tuple(window if kind == "sliding_attention" else None for kind in kinds)
    first = f.integer("max_window_layers", default=num_layers)
    return tuple(window if layer >= first else None for layer in range(num_layers))


def _to_qwen2(c: ModelConfig) -> dict[str, object]:
    if (c.qk_norm, c.qkv_bias) != (c.family == "qwen3", c.family == "qwen2"):
        raise ConfigError(f"a {c.family} file cannot hold qk_norm={c.qk_norm} with qkv_bias={c.qkv_bias}.")
    window = next((w for w in c.windows if w is not None), None)
    if any(w not in (None, window) for w in c.windows):
        raise ConfigError("a qwen2/qwen3 file holds one window size; the layers have several.")
    hf: dict[str, object] = {
        "architectures": [f"{c.family.capitalize()}ForCausalLM"],
        "model_type": c.family,
        "vocab_size": c.vocab_size,
        "hidden_size": c.hidden_size,
        "num_hidden_layers": c.num_layers,
        "num_attention_heads": c.num_heads,
        "num_key_value_heads": c.num_kv_heads,
        "head_dim": c.head_dim,
        "intermediate_size": c.intermediate_size,
        "rms_norm_eps": c.norm_eps,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "max_position_embeddings": c.max_length,
        "tie_word_embeddings": c.tie_embeddings,
        "use_sliding_window": window is not None,
        "sliding_window": window,
        "layer_types": ["full_attention" if w is None else "sliding_attention" for w in c.windows],
        "initializer_range": c.initializer_range,
        "use_cache": True,
        "torch_dtype": c.dtype,
        # Both spellings: readers before and after transformers 5.
        "rope_theta": c.rope.theta,
        "rope_scaling": rope_to_hf(c.rope, c.head_dim),
    }
    if c.family == "qwen3":
        hf["attention_bias"] = False
    return hf

"""How far a rotary embedding turns, as data, and its words in the config.json of Qwen2 and later."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from kiloq.errors import ConfigError

from .fields import Fields

RopeKind = Literal["plain", "linear", "dynamic", "qwen1", "yarn"]

# Words of rope_scaling / rope_parameters in config.json and what we call them.
_ROPE_KINDS: dict[str, RopeKind] = {"default": "plain", "linear": "linear", "dynamic": "dynamic", "yarn": "yarn"}


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding: how far each pair of dimensions turns per token.

    `kind` says how it stretches beyond `original_length` tokens: "linear" (positions divided by `factor`), "yarn"
    (arXiv 2309.00071), "dynamic" (NTK by sequence length, as transformers has it), "qwen1" (NTK of Qwen v1).
    """

    theta: float = 10_000.0
    rotary_dim: int
    kind: RopeKind = "plain"
    factor: float = 1.0
    original_length: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True


def rope_from_hf(f: Fields, head_dim: int, max_length: int) -> RopeConfig:
    """The rotary embedding that a config.json describes."""
    # transformers 5 writes rope_parameters; every earlier file has rope_theta and perhaps rope_scaling.
    raw = f.first("rope_parameters", "rope_scaling") or {}
    if not isinstance(raw, Mapping):
        raise ConfigError(f"config.json: rope_scaling is {raw!r}; an object is needed.")
    r = Fields(raw)
    word = str(r.first("rope_type", "type") or "default")
    if word not in _ROPE_KINDS:
        raise ConfigError(f"config.json: rope scaling {word!r} is unknown; known are {', '.join(_ROPE_KINDS)}.")
    kind = _ROPE_KINDS[word]
    original_length = r.integer("original_max_position_embeddings", default=max_length)
    if original_length < 1:
        raise ConfigError("config.json: original_max_position_embeddings is 0; it must be at least 1.")
    return RopeConfig(
        theta=r.number("rope_theta", default=f.number("rope_theta", default=10_000.0)),
        rotary_dim=int(head_dim * r.number("partial_rotary_factor", default=1.0)),
        kind=kind,
        factor=r.number("factor", default=max_length / original_length),
        original_length=original_length,
        beta_fast=r.number("beta_fast", default=32.0),
        beta_slow=r.number("beta_slow", default=1.0),
        attention_factor=r.optional_number("attention_factor"),
        mscale=r.optional_number("mscale"),
        mscale_all_dim=r.optional_number("mscale_all_dim"),
        truncate=r.flag("truncate", default=True),
    )


def rope_to_hf(rope: RopeConfig, head_dim: int) -> dict[str, object] | None:
    """The rope_scaling that `rope_from_hf` reads back; None where there is nothing to say."""
    # Qwen v1's NTK has no word in this format: such a model is written for its trained length only.
    word = {kind: word for word, kind in _ROPE_KINDS.items()}.get(rope.kind, "default")
    if word == "default" and rope.rotary_dim == head_dim:
        return None
    scaling: dict[str, object] = {"rope_type": word, "rope_theta": rope.theta}
    if rope.rotary_dim != head_dim:
        scaling["partial_rotary_factor"] = rope.rotary_dim / head_dim
    if word != "default":
        scaling |= {"factor": rope.factor, "original_max_position_embeddings": rope.original_length}
    if word == "yarn":
        scaling |= {"beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow, "truncate": rope.truncate}
        extras = ("attention_factor", "mscale", "mscale_all_dim")
        scaling |= {name: getattr(rope, name) for name in extras if getattr(rope, name) is not None}
    return scaling

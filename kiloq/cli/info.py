"""`kiloq info`: what a model's configuration says about its size. Reads no weights."""

import json
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from kiloq.checkpoint.files import read_quantization
from kiloq.cli.known_models import known_config
from kiloq.cli.options import Json
from kiloq.errors import CheckpointError, ConfigError
from kiloq.model.config import ModelConfig

MIB, GIB = 2**20, 2**30
# Bits per weight of a linear layer; int4 carries an fp16 scale for each group of 128. Embedding and head keep 8.
LINEAR_BITS = {"float32": 32.0, "bfloat16": 16.0, "int8": 8.0, "int4": 4.125}

_SCALING = {"linear": "linear scaling", "dynamic": "dynamic NTK", "qwen1": "dynamic NTK", "yarn": "YaRN"}


def info(
    model: Annotated[
        str,
        Parameter(name=["--model", "-m"], help="A folder, a hub id, or a config.json; no weights are needed."),
    ] = "kiloq-mini-chat",
    *,
    context: Annotated[
        int | None, Parameter(help="Tokens in the cache for the memory estimate; default: the trained length.")
    ] = None,
    json_: Json = False,
) -> None:
    """Parameters, bytes per token and memory of a model."""
    config = config_of(model)
    context = config.rope.original_length if context is None else context
    if context < 0:
        raise ConfigError(f"--context is {context:,}; it must be 0 or more.")
    if json_:
        row = {"model": model, **describe(config, context), "config": asdict(config)}
        print(json.dumps(row, ensure_ascii=False, indent=1))
    else:
        print(as_text(model, config, context))
        folder = Path(model).expanduser()
        if folder.is_dir() and (stored := read_quantization(folder)) is not None:
            groups = "a scale a row" if stored.group_size is None else f"groups of {stored.group_size}"
            print(f"stored as     int{stored.bits}, {groups} ({stored.format})")


def config_of(model: str) -> ModelConfig:
    """A model's configuration: from a folder, else from what is known, else from its hub."""
    path = Path(model).expanduser()
    known = None if path.exists() else known_config(model)
    if known is not None:
        return ModelConfig.from_hf(known)
    if not path.exists():
        path = _fetch_config(model)
    file = path / "config.json" if path.is_dir() else path
    try:
        return ModelConfig.from_hf(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {file}: {error}. A model folder holds a config.json.") from error
    except ConfigError as error:
        raise CheckpointError(f"{file}: {error}") from error


def describe(config: ModelConfig, context: int) -> dict[str, object]:
    """Exact counts, and bytes of weights and cache (bfloat16) for `context` tokens at each precision."""
    cache = config.kv_bytes_per_token() * context
    return {
        "parameters": config.num_parameters,
        "kv_bytes_per_token": config.kv_bytes_per_token(),
        "kv_bytes_per_token_int8": _int8_bytes(config),
        "context": context,
        "memory_bytes": {name: weight_bytes(config, bits) + cache for name, bits in LINEAR_BITS.items()},
        "read_bytes_per_token": {name: read_bytes(config, bits) for name, bits in LINEAR_BITS.items()},
    }


def weight_bytes(config: ModelConfig, linear_bits: float) -> int:
    """Bytes of the weights when the linear layers of the blocks take `linear_bits` each, and the rest at least 8."""
    attention = (2 * config.num_heads + 2 * config.num_kv_heads) * config.head_dim * config.hidden_size
    linear = config.num_layers * (attention + 3 * config.hidden_size * config.intermediate_size)
    return int(linear * linear_bits + (config.num_parameters - linear) * max(linear_bits, 8.0)) // 8


def read_bytes(config: ModelConfig, linear_bits: float) -> int:
    """Bytes of the weights that one new token reads: all but the embedding, where the head is not the same matrix."""
    unread = 0 if config.tie_embeddings else config.vocab_size * config.hidden_size
    return weight_bytes(config, linear_bits) - int(unread * max(linear_bits, 8.0)) // 8


def as_text(model: str, config: ModelConfig, context: int) -> str:
    """The same for people: thousands separated, units named."""
    cache = config.kv_bytes_per_token() * context
    scaling = "" if config.rope.kind == "plain" else f", {_SCALING[config.rope.kind]} beyond"
    lines = [
        f"{model}  ({config.family}, {config.dtype})",
        f"layers        {config.num_layers} x hidden {config.hidden_size:,}, feed-forward {config.intermediate_size:,}",
        f"attention     {config.num_heads} heads of {config.head_dim}, {config.num_kv_heads} for keys and values",
        f"vocabulary    {config.vocab_size:,} rows{', tied with the head' if config.tie_embeddings else ''}",
        f"context       {config.rope.original_length:,} tokens trained{scaling}, {config.max_length:,} at most",
        f"parameters    {config.num_parameters:,}",
        f"KV cache      {config.kv_bytes_per_token():,} bytes per token (bfloat16), {_int8_bytes(config):,} (int8)",
        f"memory for {context:,} tokens (weights + KV cache, estimated):",
    ]
    unit, unit_name = (GIB, "GiB") if config.num_parameters > GIB / 2 else (MIB, "MiB")
    for name, bits in LINEAR_BITS.items():
        weights = weight_bytes(config, bits)
        total = (weights + cache) / unit
        read = f"a token reads {read_bytes(config, bits) / unit:.2f}"
        lines.append(f"  {name:<11} {weights / unit:7.2f} + {cache / unit:.2f} = {total:.2f} {unit_name}, {read}")
    return "\n".join(lines)


def _int8_bytes(config: ModelConfig) -> int:
    return config.kv_bytes_per_token(1, scale_bytes=2)


def _fetch_config(model: str) -> Path:
    """A hub id's config.json without its weights; what cannot be had like that is for `resolve` to find or explain."""
    from kiloq.checkpoint.hub import parse_id, resolve

    if "/" in model and (model_id := parse_id(model)).hub == "huggingface":
        from huggingface_hub import hf_hub_download

        with suppress(OSError):  # what the hub library's errors have in common
            return Path(hf_hub_download(model_id.repo, "config.json"))
    return resolve(model)

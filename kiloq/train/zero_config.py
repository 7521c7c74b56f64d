"""A DeepSpeed file beside a recipe: "auto" filled from the recipe, and nothing in it that the recipe contradicts."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kiloq.errors import ConfigError

from .settings import TrainConfig

_TOP = {
    "fp16",
    "bf16",
    "optimizer",
    "scheduler",
    "zero_optimization",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "steps_per_print",
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "wall_clock_breakdown",
}
_ZERO = {
    "stage",
    "offload_optimizer",
    "offload_param",
    "allgather_partitions",
    "allgather_bucket_size",
    "overlap_comm",
    "reduce_scatter",
    "reduce_bucket_size",
    "contiguous_gradients",
    "sub_group_size",
    "stage3_prefetch_bucket_size",
    "stage3_param_persistence_threshold",
    "stage3_max_live_parameters",
    "stage3_max_reuse_distance",
    "stage3_gather_16bit_weights_on_model_save",
}


def read_zero_config(path: Path) -> dict[str, Any]:
    """The file as it is, once all of it is known; ConfigError names what this trainer does otherwise."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"parallel.config {path} cannot be read: {error}.") from error
    if not isinstance(raw, dict) or not isinstance(raw.get("zero_optimization"), dict):
        raise ConfigError(f"{path} has no zero_optimization table; give a DeepSpeed file for ZeRO-2 or ZeRO-3.")
    zero = raw["zero_optimization"]
    _known(path, "", raw, _TOP)
    _known(path, "zero_optimization.", zero, _ZERO)
    if zero.get("stage") not in (2, 3):
        raise ConfigError(f"{path}: zero_optimization.stage is {zero.get('stage')!r}; it must be 2 or 3.")
    for key in ("offload_optimizer", "offload_param"):
        device = zero.get(key, {}).get("device", "none")
        if device != "none":
            raise ConfigError(f"{path}: zero_optimization.{key}.device is {device!r}; only none is supported here.")
    for key in ("fp16", "bf16"):
        if raw.get(key, {}).get("enabled", "auto") not in ("auto", False):
            raise ConfigError(
                f"{path}: {key}.enabled is true. Weights stay in fp32 and loop.precision says what products run in; "
                'write "auto".'
            )
    return raw


def filled(raw: Mapping[str, Any], path: Path, config: TrainConfig, *, world: int, hidden: int) -> dict[str, Any]:
    """What deepspeed.initialize takes. The recipe's AdamW, rates and precision are handed to it as objects, so the
    entries for them are compared and left out."""
    optim, micro = config.optim, config.batch.accumulate // world
    optimizer, scheduler = raw.get("optimizer", {}), raw.get("scheduler", {})
    if optim.kind != "adamw" or optim.offload:
        raise ConfigError(
            f"optim.kind is {optim.kind} and offload {optim.offload} with parallel.kind deepspeed; it moves weights by "
            "adamw without offload."
        )
    if optimizer.get("type", "AdamW") != "AdamW":
        raise ConfigError(f"{path}: optimizer.type is {optimizer['type']!r}; it must be AdamW.")
    wanted = {"lr": optim.lr, "betas": list(optim.betas), "eps": optim.eps, "weight_decay": optim.weight_decay}
    params = optimizer.get("params", {})
    _known(path, "optimizer.params.", params, set(wanted))
    for key, value in params.items():
        _value(path, f"optimizer.params.{key}", value, wanted[key])
    for key, value in scheduler.get("params", {}).items():
        if value != "auto":
            raise ConfigError(
                f'{path}: scheduler.params.{key} is {value!r}; the recipe\'s [optim] says how rates move, write "auto".'
            )
    # A micro-batch of flat tokens is one sample to DeepSpeed.
    sizes = {
        "gradient_accumulation_steps": micro,
        "gradient_clipping": optim.clip,
        "train_batch_size": micro * world,
        "train_micro_batch_size_per_gpu": 1,
    }
    for key, value in sizes.items():
        _value(path, key, raw.get(key, "auto"), value)
    rest = {key: raw[key] for key in ("steps_per_print", "wall_clock_breakdown") if key in raw}
    return {**rest, **sizes, "zero_optimization": _zero(raw["zero_optimization"], path, hidden)}


def _zero(raw: Mapping[str, Any], path: Path, hidden: int) -> dict[str, Any]:
    auto = {
        "reduce_bucket_size": hidden * hidden,
        "stage3_prefetch_bucket_size": hidden * hidden * 9 // 10,
        "stage3_param_persistence_threshold": 10 * hidden,
    }
    found: dict[str, Any] = {}
    for key, value in raw.items():
        if value == "auto" and key not in auto:
            raise ConfigError(f"{path}: zero_optimization.{key} is auto, which has no meaning there; give a value.")
        chosen = auto[key] if value == "auto" else value
        found[key] = int(chosen) if isinstance(chosen, float) else chosen  # JSON's 2e8
    return found


def _known(path: Path, where: str, table: Mapping[str, Any], known: set[str]) -> None:
    if unknown := sorted(table.keys() - known):
        raise ConfigError(
            f"{path}: {where}{unknown[0]} is not supported here; remove it. Known are {', '.join(sorted(known))}."
        )


def _value(path: Path, key: str, found: object, wanted: object) -> None:
    if found not in ("auto", wanted):
        raise ConfigError(f'{path}: {key} is {found!r}, and the recipe has {wanted!r}; write "auto".')

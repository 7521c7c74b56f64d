"""LoRA adapters in PEFT's format become updates of our fused matrices. Knows files and names, no arithmetic of models.

Format: adapter_config.json and adapter_model.safetensors, as peft (github.com/huggingface/peft) writes them.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from kiloq.errors import CheckpointError
from kiloq.model import ModelConfig
from kiloq.model.lora import LowRank

from .files import StoredTensor, list_safetensors, read_json, read_tensor
from .names import Part, parts
from .weights import DTYPES, empty_model, parameter_shapes

_PREFIX = "base_model.model."
_LARGEST_RANK = 1024
# What changes the arithmetic in a way that these files' other parts do not show.
_REFUSED = (
    "use_dora",
    "fan_in_fan_out",
    "modules_to_save",
    "alora_invocation_tokens",
    "use_qalora",
    "lora_bias",
    "layer_replication",
)
# Ways to begin that take a part out of the model's own weights, which the update gives back.
_CHANGES_WEIGHTS = ("pissa", "corda", "olora")


@dataclass(frozen=True)
class _Scales:
    """By how much each layer's update counts."""

    alpha: float
    patterns: Mapping[str, float]
    is_rank_stabilised: bool

    def of(self, module: str, rank: int) -> float:
        """rsLoRA (arXiv 2312.03732) divides by the root of the rank. A pattern is a name, or a regular expression's end
        of one, as in PEFT."""
        matching = [value for key, value in self.patterns.items() if re.fullmatch(rf"(.*\.)?({key})", module)]
        alpha = matching[0] if matching else self.alpha
        return alpha / (math.sqrt(rank) if self.is_rank_stabilised else rank)


def read_adapter(folder: str | Path, config: ModelConfig) -> dict[str, LowRank]:
    """The updates of a model of this configuration, fp32, by the names of our modules."""
    folder = Path(folder)
    scales = _scales(folder)
    file = folder / "adapter_model.safetensors"
    if not file.is_file():
        hint = (
            " It has adapter_model.bin; save it again with safe_serialization."
            if file.with_suffix(".bin").is_file()
            else ""
        )
        raise CheckpointError(f"{folder} has no adapter_model.safetensors.{hint}")
    stored = {tensor.name: tensor for tensor in list_safetensors(file)}
    found: dict[str, list[tuple[Part, LowRank]]] = {}
    shapes = parameter_shapes(empty_model(config))
    matrices = {name: shape for name, shape in shapes.items() if name.startswith("blocks.") and len(shape) == 2}
    for part in parts(config, matrices):
        stem = part.tensor.removesuffix(".weight")
        down, up = (stored.pop(f"{_PREFIX}{stem}.lora_{x}.weight", None) for x in "AB")
        if down is not None and up is not None:
            update = _read(down, up, part, scales, stem)
            found.setdefault(part.parameter.removesuffix(".weight"), []).append((part, update))
        elif down is not None or up is not None:
            raise CheckpointError(f"{file}: the update of {stem} has only one of lora_A and lora_B. Download it again.")
    if stored:
        name = min(stored)
        raise CheckpointError(
            f"{file}: tensor {name} belongs to no linear layer of this {config.family} model. kiloq serves LoRA "
            "updates of the layers' matrices; merge an adapter that holds others into the model."
        )
    if not found:
        raise CheckpointError(f"{file} holds no LoRA update of this {config.family} model.")
    return {module: _fused(listed, shapes[f"{module}.weight"][0]) for module, listed in found.items()}


def _scales(folder: Path) -> _Scales:
    path = folder / "adapter_config.json"
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is no folder; give that of an adapter in PEFT's format.")
    raw = read_json(path)
    if raw.get("peft_type") != "LORA":
        raise CheckpointError(f"{path}: peft_type is {raw.get('peft_type')!r}; kiloq reads LORA.")
    for key in _REFUSED:
        if raw.get(key):
            raise CheckpointError(f"{path}: {key} is {raw[key]!r}, which kiloq cannot serve; merge it into the model.")
    begun = str(raw.get("init_lora_weights", True)).lower()
    if begun.startswith(_CHANGES_WEIGHTS):
        raise CheckpointError(
            f"{path}: init_lora_weights is {begun!r}, which belongs to changed weights of the model. Save the adapter "
            "with path_initial_model_for_weight_conversion, which makes a plain one of it."
        )
    if raw.get("bias", "none") != "none":
        raise CheckpointError(f"{path}: bias is {raw['bias']!r}; kiloq serves adapters that train no bias.")
    patterns = raw.get("alpha_pattern") or {}
    if not isinstance(patterns, Mapping):
        raise CheckpointError(f"{path}: alpha_pattern is no object.")
    return _Scales(
        alpha=_number(path, "lora_alpha", raw.get("lora_alpha")),
        patterns={_pattern(path, key): _number(path, f"alpha_pattern.{key}", value) for key, value in patterns.items()},
        is_rank_stabilised=raw.get("use_rslora") is True,
    )


def _number(path: Path, key: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise CheckpointError(f"{path}: {key} is {value!r}; it must be a number.")
    return float(value)


def _pattern(path: Path, key: str) -> str:
    # A regular expression from outside could take for ever; PEFT's own files hold names of modules.
    if not re.fullmatch(r"[\w.]{1,200}", key):
        raise CheckpointError(f"{path}: alpha_pattern has {key!r:.200}; kiloq takes names of modules there.")
    return re.escape(key)


def _read(down: StoredTensor, up: StoredTensor, part: Part, scales: _Scales, stem: str) -> LowRank:
    rows, columns = part.shape
    rank = down.shape[0] if down.shape else 0
    if down.shape != (rank, columns) or up.shape != (rows, rank) or not 0 < rank <= _LARGEST_RANK:
        raise CheckpointError(
            f"{down.file}: the update of {stem} has shapes {list(down.shape)} and {list(up.shape)}; the matrix is "
            f"[{rows:,}, {columns:,}] here. The adapter was made for another model."
        )
    for tensor in (down, up):
        if tensor.dtype not in DTYPES:
            raise CheckpointError(
                f"{tensor.file}: tensor {tensor.name} is {tensor.dtype}; kiloq reads {', '.join(DTYPES)}."
            )
    a, b = read_tensor(down).float(), read_tensor(up).float() * scales.of(stem, rank)
    if not (a.isfinite().all() and b.isfinite().all()):
        raise CheckpointError(f"{down.file}: the update of {stem} holds numbers that are not finite.")
    return LowRank(a, b)


def _fused(listed: list[tuple[Part, LowRank]], rows: int) -> LowRank:
    """One update of a fused matrix: the parts' A above each other, their B in their own rows."""
    down = torch.cat([update.down for _, update in listed])
    up: Tensor = torch.zeros(rows, len(down))
    at = 0
    for part, update in listed:
        rank = len(update.down)
        up[part.start : part.start + part.shape[0], at : at + rank] = update.up
        at += rank
    return LowRank(down, up)

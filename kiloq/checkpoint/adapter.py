"""LoRA adapters in PEFT's format: what they hold, and as updates of our fused matrices. Knows files and names.

Format: adapter_config.json and adapter_model.safetensors, as peft (github.com/huggingface/peft) writes them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from kiloq.errors import CheckpointError
from kiloq.model import ModelConfig
from kiloq.model.lora import LowRank

from .adapter_config import CONFIG_FILE, AdapterSettings, read_settings
from .files import StoredTensor, list_safetensors, read_json, read_tensor
from .names import Part, parts
from .weights import DTYPES, empty_model, parameter_shapes

WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
ROWS = ".token_adapter.trainable_tokens_delta"

LARGEST_RANK = 1024
# What no update beside the model's own weights can say.
_NOT_SERVED = ("use_dora", "modules_to_save", "trainable_token_indices")


@dataclass(frozen=True)
class PartUpdate:
    """What an adapter does to one matrix on disk, [n, K]: `down` is A, [r, K]; `up` is B, [n, r], without its scale.

    `magnitude`, [n], is DoRA's (arXiv 2402.09353): the length that each row has in the end.
    """

    part: Part
    down: Tensor
    up: Tensor
    scale: float
    magnitude: Tensor | None = None

    def merged(self, weight: Tensor) -> Tensor:
        """The matrix with the update in it, fp32."""
        whole = weight.float() + self.scale * (self.up @ self.down)
        if self.magnitude is not None:
            whole *= (self.magnitude / whole.norm(dim=1))[:, None]
        return whole


@dataclass(frozen=True)
class TokenRows:
    """New rows of a token table, [n, h], in the order of the ids."""

    ids: tuple[int, ...]
    values: Tensor


@dataclass(frozen=True, kw_only=True)
class StoredAdapter:
    """All that an adapter's folder holds, under our names, in fp32.

    `rows` and `tables` are by table, "embed" or "head"; a tied model has "embed" alone, unless a file brings two tables
    that differ. `rank`, `alpha` and `dropout` are what training goes on with.
    """

    updates: Mapping[str, tuple[PartUpdate, ...]]  # by module, such as "blocks.0.attn.qkv"
    rows: Mapping[str, TokenRows] = field(default_factory=dict)
    tables: Mapping[str, Tensor] = field(default_factory=dict)
    rank: int
    alpha: float
    dropout: float = 0.0
    is_rank_stabilised: bool = False

    @property
    def is_dora(self) -> bool:
        """Whether its rows have magnitudes."""
        return any(update.magnitude is not None for listed in self.updates.values() for update in listed)


def read_adapter(folder: str | Path, config: ModelConfig) -> dict[str, LowRank]:
    """The updates of a model of this configuration, fp32, by the names of our modules: what can be served beside it."""
    folder = Path(folder)
    path = folder / CONFIG_FILE
    if folder.is_dir():
        raw = read_json(path)
        for key in _NOT_SERVED:
            if raw.get(key):
                raise CheckpointError(
                    f"{path}: {key} is {raw[key]!r}, which kiloq cannot serve; merge it into the model."
                )
    shapes = parameter_shapes(empty_model(config))
    updates = read_stored_adapter(folder, config).updates
    return {module: _fused(listed, shapes[f"{module}.weight"][0]) for module, listed in updates.items()}


def read_stored_adapter(folder: str | Path, config: ModelConfig) -> StoredAdapter:
    """Everything in the folder of an adapter for a model of this configuration: what merging and more training take."""
    folder = Path(folder)
    settings = read_settings(folder)
    file = folder / WEIGHTS_FILE
    if not file.is_file():
        hint = (
            " It has adapter_model.bin; save it again with safe_serialization."
            if file.with_suffix(".bin").is_file()
            else ""
        )
        raise CheckpointError(f"{folder} has no {WEIGHTS_FILE}.{hint}")
    stored = {tensor.name: tensor for tensor in list_safetensors(file)}
    found: dict[str, list[PartUpdate]] = {}
    for part in matrix_parts(config):
        update = _take_update(stored, part, settings, file)
        if update is not None:
            found.setdefault(part.parameter.removesuffix(".weight"), []).append(update)
    rows, tables = _take_tables(stored, config, settings)
    if stored:
        name = min(stored)
        raise CheckpointError(
            f"{file}: tensor {name} belongs to no linear layer of this {config.family} model. kiloq reads LoRA "
            "updates of the layers' matrices, and rows or all of the embedding and the head."
        )
    for key, is_told, there in (
        ("trainable_token_indices", bool(settings.token_ids), rows),
        ("modules_to_save", settings.has_tables, tables),
    ):
        if is_told and not there:
            raise CheckpointError(f"{file} lacks what {CONFIG_FILE} names in {key}. Take both from one save.")
    if not found and not rows and not tables:
        raise CheckpointError(f"{file} holds no LoRA update of this {config.family} model.")
    return StoredAdapter(
        updates={module: tuple(listed) for module, listed in found.items()},
        rows=rows,
        tables=tables,
        rank=settings.rank,
        alpha=settings.alpha,
        dropout=settings.dropout,
        is_rank_stabilised=settings.is_rank_stabilised,
    )


def matrix_parts(config: ModelConfig) -> list[Part]:
    """What an update can be of: the matrices of every linear layer of the blocks, as they lie on disk."""
    shapes = parameter_shapes(empty_model(config))
    matrices = {name: shape for name, shape in shapes.items() if name.startswith("blocks.") and len(shape) == 2}
    return list(parts(config, matrices))


def _take_update(
    stored: dict[str, StoredTensor], part: Part, settings: AdapterSettings, file: Path
) -> PartUpdate | None:
    """The update of one matrix, whose tensors are taken out of `stored`."""
    stem = part.tensor.removesuffix(".weight")
    down, up = (stored.pop(f"{PREFIX}{stem}.lora_{x}.weight", None) for x in "AB")
    if down is None and up is None:
        return None
    if down is None or up is None:
        raise CheckpointError(f"{file}: the update of {stem} has only one of lora_A and lora_B. Download it again.")
    magnitude = None
    if settings.is_dora:
        name = f"{PREFIX}{stem}.lora_magnitude_vector"
        # Before PEFT 0.11 it lay in a module of its own.
        vector = stored.pop(name, None) or stored.pop(f"{name}.weight", None)
        if vector is None or vector.shape != part.shape[:1]:
            raise CheckpointError(f"{file}: use_dora is true, but {name} is no vector of {part.shape[0]:,} numbers.")
        magnitude = _values(vector)
    rows, columns = part.shape
    rank = down.shape[0] if down.shape else 0
    if down.shape != (rank, columns) or up.shape != (rows, rank) or not 0 < rank <= LARGEST_RANK:
        raise CheckpointError(
            f"{file}: the update of {stem} has shapes {list(down.shape)} and {list(up.shape)}; the matrix is "
            f"[{rows:,}, {columns:,}] here. The adapter was made for another model."
        )
    if rank not in settings.ranks:
        raise CheckpointError(
            f"{file}: the update of {stem} has rank {rank:,}, but {CONFIG_FILE} says r {settings.rank:,}. The two "
            "files are of different adapters."
        )
    scale = settings.scale(stem, rank)
    a, b = _values(down), _values(up)
    if not (b * scale).isfinite().all():
        raise CheckpointError(f"{file}: the update of {stem} holds numbers that are not finite.")
    return PartUpdate(part, a, b, scale, magnitude)


def _take_tables(
    stored: dict[str, StoredTensor], config: ModelConfig, settings: AdapterSettings
) -> tuple[dict[str, TokenRows], dict[str, Tensor]]:
    """Rows and whole copies of embedding and head, whose tensors are taken out of `stored`."""
    rows: dict[str, TokenRows] = {}
    tables: dict[str, Tensor] = {}
    shape = (config.vocab_size, config.hidden_size)
    for part in parts(config, {"embed.weight": shape, "head.weight": shape}):
        table, stem = part.parameter.removesuffix(".weight"), part.tensor.removesuffix(".weight")
        if (whole := stored.pop(f"{PREFIX}{part.tensor}", None)) is not None:
            if whole.shape != shape:
                raise CheckpointError(
                    f"{whole.file}: {whole.name} is {list(whole.shape)}, but the model's is {list(shape)}."
                )
            tables[table] = _values(whole)
        if (delta := stored.pop(f"{PREFIX}{stem}{ROWS}", None)) is not None:
            ids = settings.token_ids.get(stem.rpartition(".")[2], settings.token_ids.get("", ()))
            if delta.shape != (len(ids), config.hidden_size) or any(i >= config.vocab_size for i in ids):
                raise CheckpointError(
                    f"{delta.file}: {delta.name} is {list(delta.shape)}, but trainable_token_indices names {len(ids)} "
                    f"tokens of a vocabulary of {config.vocab_size:,}, and rows are {config.hidden_size:,} wide."
                )
            rows[table] = TokenRows(ids, _values(delta))
    if config.tie_embeddings and "head" in tables:
        # PEFT writes a tied matrix twice; a head that it was not asked to tie is one of its own.
        same = torch.equal(tables["head"], tables["embed"]) if "embed" in tables else settings.is_tied
        tables = {"embed": tables["head"]} if same else tables
    return rows, tables


def _values(tensor: StoredTensor) -> Tensor:
    """In fp32."""
    if tensor.dtype not in DTYPES:
        raise CheckpointError(
            f"{tensor.file}: tensor {tensor.name} is {tensor.dtype}; kiloq reads {', '.join(DTYPES)}."
        )
    values = read_tensor(tensor).float()
    if not values.isfinite().all():
        raise CheckpointError(f"{tensor.file}: tensor {tensor.name} holds numbers that are not finite.")
    return values


def _fused(listed: tuple[PartUpdate, ...], rows: int) -> LowRank:
    """One update of a fused matrix: the parts' A above each other, their B in their own rows."""
    down = torch.cat([update.down for update in listed])
    up: Tensor = torch.zeros(rows, len(down))
    at = 0
    for update in listed:
        part, rank = update.part, len(update.down)
        up[part.start : part.start + part.shape[0], at : at + rank] = update.up * update.scale
        at += rank
    return LowRank(down, up)

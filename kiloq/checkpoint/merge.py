"""A checkpoint read through an adapter: the same weights with its updates in them, for whoever reads, loads or writes.

Values are computed in fp32, parameter by parameter, when they are asked for; two models are never in memory. Knows
files and names, nothing of training.
"""

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from kiloq.errors import NumericsError
from kiloq.model import ModelConfig
from kiloq.ops.layout import QuantWeight

from .adapter import StoredAdapter, read_stored_adapter
from .generation import GenerationDefaults
from .names import parts
from .reader import Checkpoint
from .weights import Weights, empty_model, parameter_shapes

_GENERATION = "generation_config.json"


def with_adapter(checkpoint: Checkpoint, folder: str | Path) -> Checkpoint:
    """The model that a checkpoint and an adapter are together, in full precision; its settings are the adapter's where
    it has some: one that taught a base model to chat makes a chat model of it."""
    folder = Path(folder)
    adapter = read_stored_adapter(folder, checkpoint.config)
    generation = checkpoint.generation
    if (folder / _GENERATION).is_file():
        generation = GenerationDefaults.from_files(checkpoint.folder, checkpoint.tokenizer, settings=folder)
    return dataclasses.replace(
        checkpoint,
        config=merged_config(checkpoint.config, adapter),
        generation=generation,
        quantization=None,
        base=checkpoint,
        adapter=adapter,
    )


def merged_config(config: ModelConfig, adapter: StoredAdapter) -> ModelConfig:
    """A tied model that gets a head of its own is tied no more, and must say so (transformers#45127)."""
    has_head = "head" in adapter.rows or "head" in adapter.tables
    return dataclasses.replace(config, tie_embeddings=config.tie_embeddings and not has_head)


def adapter_digest(adapter: StoredAdapter) -> str:
    """The same for two adapters with the same values."""
    digest = hashlib.sha256()
    for name, listed in adapter.updates.items():
        for one in listed:
            digest.update(f"{name} {one.part.tensor} {one.scale}".encode())
            for tensor in (one.down, one.up, one.magnitude):
                digest.update(b"" if tensor is None else tensor.numpy().tobytes())
    for name, rows in adapter.rows.items():
        digest.update(f"{name} {rows.ids}".encode() + rows.values.numpy().tobytes())
    for name, table in adapter.tables.items():
        digest.update(name.encode() + table.numpy().tobytes())
    return digest.hexdigest()


class MergedWeights:
    """What Weights says and gives of a checkpoint, with an adapter in it. Nothing is quantised any more."""

    is_quantized = False
    files: Sequence[Path] = ()  # what is packed of it is not kept: the checkpoint's own would be lost

    def __init__(self, base: Checkpoint, adapter: StoredAdapter) -> None:
        self.folder = base.folder
        self.config = merged_config(base.config, adapter)
        self.shapes = parameter_shapes(empty_model(self.config))
        self._base = Weights(base.folder, base.config, base.quantization)
        self._adapter = adapter

    @property
    def dtype(self) -> torch.dtype:
        """The type that the base's weights are stored in, or their scales."""
        return self._base.dtype

    def read(self, name: str, *, dtype: torch.dtype, device: str | torch.device = "cpu") -> Tensor:
        """The values of a parameter of ours, rounded once."""
        values = self._read(name, dtype).to(dtype)
        if not values.isfinite().all():
            raise NumericsError(f"{name} with the adapter in it has values beyond {dtype}; choose another type.")
        return values.to(device)

    def read_stored(self, name: str) -> Mapping[str, Tensor]:
        """The tensors of a parameter under their names on disk."""
        values = self.read(name, dtype=self.dtype)
        listed = parts(self.config, {name: self.shapes[name]})
        return {part.tensor: values[part.start : part.start + part.shape[0]] for part in listed}

    def read_matrix(self, name: str) -> Tensor:
        """A weight matrix for the kernels."""
        return self.read(name, dtype=torch.bfloat16)

    def read_codes(self, name: str) -> QuantWeight | None:
        """None: codes that an update has been added to are codes no more."""
        return None

    def check_tied_head(self, embedding: Tensor) -> None:
        """A head that repeats the tied embedding was compared with the base's."""

    def _read(self, name: str, dtype: torch.dtype) -> Tensor:
        """In fp32 where the adapter changes it."""
        stem = name.removesuffix(".weight")
        updates = self._adapter.updates.get(stem, ())
        rows = self._adapter.rows.get(stem)
        if (whole := self._adapter.tables.get(stem)) is None:
            stored = "embed.weight" if name not in self._base.shapes else name  # a head that was the embedding
            whole = self._base.read(stored, dtype=torch.float32 if updates or rows else dtype)
        for update in updates:
            at = slice(update.part.start, update.part.start + update.part.shape[0])
            whole[at] = update.merged(whole[at])
        if rows is not None:
            whole = whole.index_copy(0, torch.tensor(rows.ids), rows.values)
        return whole


AnyWeights = Weights | MergedWeights


def weights_of(checkpoint: Checkpoint) -> AnyWeights:
    """The weights of a checkpoint, read through its adapter if it has one."""
    if checkpoint.base is not None and checkpoint.adapter is not None:
        return MergedWeights(checkpoint.base, checkpoint.adapter)
    return Weights(checkpoint.folder, checkpoint.config, checkpoint.quantization)

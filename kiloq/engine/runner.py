"""Batches through the model. Owns the cache's tensors; knows no requests."""

from collections.abc import Mapping

import torch
from torch import Tensor

from kiloq.cache import KVCache, PagedAttend
from kiloq.model import Transformer
from kiloq.model.lora import Adapter, AdapterRows, adapted
from kiloq.quant.linear import is_packed

from .batch import Batch
from .native import plan_of


class Runner:
    """A model and its cache on one device; by the kernels in one call a step where they can, else op by op."""

    def __init__(self, model: Transformer, cache: KVCache, adapters: Mapping[str, Adapter] | None = None) -> None:
        adapters = adapters or {}
        if is_packed(model):  # the kernels keep updates in bf16; so does their slow twin
            adapters = {name: {at: one.rounded() for at, one in adapter.items()} for name, adapter in adapters.items()}
        self._rows = AdapterRows()
        self._model = adapted(model, adapters, self._rows) if adapters else model
        self._cache = cache
        self._windows = model.config.windows
        self._native = plan_of(model, cache, adapters)

    @property
    def is_native(self) -> bool:
        """Whether the kernels do whole steps."""
        return self._native is not None

    @torch.inference_mode()
    def logits(self, batch: Batch) -> Tensor:
        """Write the batch's keys and values; logits of the rows it asks for, [N, vocab_size]."""
        if self._native is not None:
            return self._native.logits(batch)
        attend = PagedAttend(self._cache, batch.spans, self._windows)
        self._rows.runs = batch.adapters
        rotation = self._model.rotation(batch.positions, batch.alphas)
        hidden = self._model(batch.ids, rotation, attend)  # [T, hidden_size]
        if batch.logit_rows is not None:
            hidden = hidden.index_select(0, batch.logit_rows)
        return self._model.head(hidden)

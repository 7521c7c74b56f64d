"""A packed model as a plan of pointers for csrc/step.cpp: one call a step, from ids to logits.

Knows how a Transformer and its cache lie in memory, not what is asked of them. The model itself, op by op, is the slow
twin: `plan_of` gives None where only that can run.
"""

import ctypes
from array import array
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kiloq import ops
from kiloq.cache import BLOCK_SIZE, KVCache
from kiloq.cache import Span as CacheSpan
from kiloq.model import ModelConfig, Transformer
from kiloq.model.lora import Adapter, AdapterRun
from kiloq.model.rope import Rope
from kiloq.model.transformer import Block, RMSNorm
from kiloq.ops import PackedWeight, cpu
from kiloq.ops.structs import Adapted, Cache, Layer, LayerUpdates, Model, Places, Span, Step
from kiloq.quant.linear import QuantEmbedding, QuantLinear

from .batch import Batch

_CACHE_KINDS = {torch.bfloat16: 0, torch.int8: 1, torch.float32: 2}  # kq_cache_kind
_SHORTEST = 1024  # positions in a new table of angles

Floats = NDArray[np.float32]


class NativeModel:
    """The plan of one model and one cache; holds every tensor that it points into."""

    def __init__(
        self,
        model: Transformer,
        matrices: list[list[PackedWeight]],
        cache: KVCache,
        adapters: Mapping[str, Adapter],
    ) -> None:
        config = model.config
        self._config = config
        self._kept: list[object] = [model, cache]
        library = cpu.library()
        assert library is not None
        self._run = library.kq_run_step
        self._layers = (Layer * config.num_layers)()
        for i, packed in enumerate(matrices[:-1]):
            self._fill(i, _block(model, i), packed, cache)
        embed, head = matrices[-1]
        self._model = Model(
            num_layers=config.num_layers,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            eps=config.norm_eps,
            layers=self._layers,
            embed=cpu.weight_struct(embed),
            head=cpu.weight_struct(head),
            norm=self._gain(model.norm),
        )
        self._updates = {name: self._updates_of(adapter) for name, adapter in adapters.items()}
        self._step = Step()
        self._has_biases = any(bias is not None for bias in cache.key_biases)
        self._angles = _Angles(config, model.rope)

    def logits(self, batch: Batch) -> Tensor:
        """Write the batch's keys and values; logits of the rows it asks for, fp32 [N, vocab_size]."""
        num_rows, rows = len(batch.ids), batch.logit_rows
        if rows is None:
            rows = torch.arange(num_rows)
        logits = torch.empty(len(rows), self._config.vocab_size)
        # `blocks`, `spans` and `angles` have names so that they outlive the call, which sees only their addresses.
        blocks, spans = array("i"), (Span * len(batch.spans))()
        angles = [self._angles.upto(span.stop, span.alpha) for span in batch.spans]
        places = self._angles.of_rows(batch.spans, angles, num_rows)
        for span in batch.spans:
            blocks.extend(span.blocks[: -(-span.stop // BLOCK_SIZE)])
        row, at = 0, blocks.buffer_info()[0]
        for span, table, into in zip(batch.spans, angles, spans, strict=True):
            into.first_row, into.start, into.stop, into.blocks = row, span.start, span.stop, at
            if self._has_biases:
                into.cos, into.sin = table.at[:2]
            row += span.stop - span.start
            at += -(-span.stop // BLOCK_SIZE) * blocks.itemsize
        step = self._step
        step.ids, step.logit_rows, step.logits = batch.ids.data_ptr(), rows.data_ptr(), logits.data_ptr()
        step.num_logits, step.places = len(rows), Places(num_rows, *(*places, None)[:3], len(spans), spans)
        adapted = (Adapted * len(batch.adapters))(*map(self._adapted, batch.adapters))
        step.num_adapted, step.adapted = len(adapted), adapted
        done = self._run(self._model, step)
        if done == -2:
            raise MemoryError(f"no memory for a step of {num_rows:,} tokens")
        assert done == 0, "an id or a row is out of range"
        return logits

    def _fill(self, i: int, block: Block, packed: list[PackedWeight], cache: KVCache) -> None:
        into = self._layers[i]
        into.qkv, into.out, into.gate_up, into.down = (cpu.weight_struct(one) for one in packed)
        into.attn_norm, into.mlp_norm = self._gain(block.attn_norm), self._gain(block.mlp_norm)
        into.q_norm, into.k_norm = self._gain(block.attn.q_norm), self._gain(block.attn.k_norm)
        into.window = self._config.windows[i] or 0
        keys, values, bias = cache.keys[i], cache.values[i], cache.key_biases[i]
        assert keys.is_contiguous(), i
        assert values.is_contiguous(), i
        into.cache = Cache(
            kind=_CACHE_KINDS[cache.dtype],
            block_size=BLOCK_SIZE,
            num_heads=self._config.num_heads,
            num_kv_heads=self._config.num_kv_heads,
            head_dim=self._config.head_dim,
            rotary_dim=self._config.rope.rotary_dim,
            keys=keys.data_ptr(),
            values=values.data_ptr(),
            key_scales=cache.key_scales[i].data_ptr() if cache.key_scales else None,
            value_scales=cache.value_scales[i].data_ptr() if cache.value_scales else None,
            key_bias=None if bias is None else bias.data_ptr(),
        )

    def _updates_of(self, adapter: Adapter) -> tuple[ctypes.Array[LayerUpdates], int]:
        """An adapter's matrices, packed, layer by layer, and its largest rank."""
        layers = (LayerUpdates * self._config.num_layers)()
        for name, update in adapter.items():
            _, layer, _, matrix = name.split(".")
            down, up = (ops.pack(one.to(torch.bfloat16)) for one in (update.down, update.up))
            into = getattr(layers[int(layer)], matrix)
            into.down, into.up = cpu.weight_struct(down), cpu.weight_struct(up)
            self._kept += [down, up]
        return layers, max(len(update.down) for update in adapter.values())

    def _adapted(self, run: AdapterRun) -> Adapted:
        layers, rank = self._updates[run.adapter]
        return Adapted(run.start, run.stop - run.start, rank, layers)

    def _gain(self, norm: object) -> int | None:
        """Where a norm's gains lie; None for a layer without that norm."""
        if not isinstance(norm, RMSNorm):
            return None
        gain = norm.weight.detach().float().contiguous()
        self._kept.append(gain)
        address: int = gain.data_ptr()
        return address


def plan_of(model: Transformer, cache: KVCache, adapters: Mapping[str, Adapter]) -> NativeModel | None:
    """The plan of a model whose every matrix is packed and stands on a processor that has kernels; else None."""
    matrices = _matrices(model)
    if matrices is None or not _fits(model.config, cache) or cpu.library() is None:
        return None
    return NativeModel(model, matrices, cache, adapters)


def _matrices(model: Transformer) -> list[list[PackedWeight]] | None:
    """Of each layer qkv, out, gate_up and down; then embedding and head. None if one is not packed."""
    found: list[list[PackedWeight]] = []
    for i in range(model.config.num_layers):
        block = _block(model, i)
        modules = (block.attn.qkv, block.attn.out, block.mlp.gate_up, block.mlp.down)
        found.append([module.packed for module in modules if isinstance(module, QuantLinear)])
    if not isinstance(model.embed, QuantEmbedding):
        return None
    head = model.head.packed if isinstance(model.head, QuantLinear) else model.embed.packed
    if not model.config.tie_embeddings and not isinstance(model.head, QuantLinear):
        return None
    return [*found, [model.embed.packed, head]] if all(len(packed) == 4 for packed in found) else None


def _block(model: Transformer, i: int) -> Block:
    block = model.blocks[i]
    assert isinstance(block, Block), type(block)
    return block


def _fits(config: ModelConfig, cache: KVCache) -> bool:
    """What the kernels ask of shapes: whole tiles of the MLP, heads of whole half vectors, a cache type they know."""
    if cache.device.type != "cpu" or cache.dtype not in _CACHE_KINDS:
        return False
    return config.intermediate_size % 16 == 0 and config.head_dim % 8 == 0 and config.head_dim <= 256


class _Table:
    """Cosines, sines and LogN's factors of positions from 0 on under one NTK factor, and their addresses."""

    __slots__ = ("arrays", "at", "length")

    def __init__(self, rope: Rope, length: int, alpha: float) -> None:
        rotation = rope(torch.arange(length), alpha)
        self.length = length
        self.arrays: list[Floats] = [x.contiguous().view(length, -1).numpy() for x in rotation if x is not None]
        self.at = [_address(x) for x in self.arrays]


class _Angles:
    """Angles by position: a table per NTK factor that grows by doubling."""

    def __init__(self, config: ModelConfig, rope: Rope) -> None:
        half = config.rope.rotary_dim // 2
        self._rope = rope
        self._widths = (half, half, 1) if config.logn_length is not None else (half, half)
        self._tables: dict[float, _Table] = {}
        self._rows: list[Floats] = [np.empty((0, width), np.float32) for width in self._widths]

    def upto(self, length: int, alpha: float) -> _Table:
        """The angles of positions 0..length-1 at least."""
        table = self._tables.get(alpha)
        if table is None or table.length < length:
            size = max(_SHORTEST, 1 << (length - 1).bit_length())
            table = self._tables[alpha] = _Table(self._rope, size, alpha)
        return table

    def of_rows(self, spans: Sequence[CacheSpan], tables: Sequence[_Table], num_rows: int) -> list[int]:
        """Addresses of cos, sin and LogN's factors of a step's rows: in place if they are neighbours, else copied."""
        if len(spans) == 1:
            return [at + 4 * width * spans[0].start for at, width in zip(tables[0].at, self._widths, strict=True)]
        if len(self._rows[0]) < num_rows:
            self._rows = [np.empty((2 * num_rows, width), np.float32) for width in self._widths]
        row = 0
        for span, table in zip(spans, tables, strict=True):
            stop = row + span.stop - span.start
            for rows, angles in zip(self._rows, table.arrays, strict=True):
                rows[row:stop] = angles[span.start : span.stop]
            row = stop
        return [_address(rows) for rows in self._rows]


def _address(values: Floats) -> int:
    address: int = values.__array_interface__["data"][0]
    return address

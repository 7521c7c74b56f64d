"""How much memory a run will take, before any weight is read: the run's own code over tensors that have only a shape.

Knows no recipe and no file. What the code allocates is what is counted, so that a change of the code changes the plan.
"""

import dataclasses
import functools
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kiloq.model import ModelConfig, Recompute, Transformer

from . import adapters
from .adapters import AdapterConfig
from .data import Batch
from .forward import Forward, Runtime, head_of, share_tied_gradient
from .losses import columns_at_once, trained_log_probs
from .meter import matrix_weights

# Python, torch and kiloq themselves: 300 MiB once imported, and the kernels that oneDNN makes for each shape of a
# product. On a GPU its context, which torch's own counter leaves out; that one is judged.
_PROGRAM = {"cpu": 380 << 20, "cuda": 500 << 20}
# Of what a step allocates on a CPU, what lies free between its tensors. A tensor is aligned, and for that glibc looks
# for a place 96 bytes longer than it, while autograd's own small objects come to lie in the rests between the places:
# one that was freed does not do for the next tensor of its size. Knuth's fifty-percent rule (TAOCP 1, 2.5) says that
# half as much as is in use lies free then; measured 0.5 to 0.8 (docs/measurements, fine-tuning: memory).
_FREE_BETWEEN = 0.6
_COMPILER = 350 << 20  # what torch.compile keeps in the process
_SAMPLE_LAYERS = (2, 3)
_CODE_BYTES = {"int8": 1.001, "int4": 0.516, "nf4": 0.516}  # of a weight, with its share of the scales
_SLAB = 2**24  # weights that kiloq.quant.frozen writes out at once


@dataclass(frozen=True, kw_only=True)
class Load:
    """What a step computes: a network, what of it is trained, and how. `samples` is how many pieces lie in a row."""

    config: ModelConfig
    runtime: Runtime
    seq_len: int
    tokens: int
    accumulate: int = 1
    adapter: AdapterConfig | None = None
    trained_share: float = 1.0  # of the tokens
    recompute: Recompute = "none"
    state_bytes: float = 8.0  # of the optimiser, for each trained value
    state_on_cpu: bool = False


@dataclass(frozen=True)
class Plan:
    """Bytes by what holds them at the moment of a step when most is held."""

    parts: Mapping[str, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        return sum(self.parts.values())


@functools.lru_cache(maxsize=256)
def plan(load: Load) -> Plan:
    """The memory of a run's steps on one device. Compiled steps take somewhat less: what is fused is never held."""
    few, more = (_measure(load, layers) for layers in _SAMPLE_LAYERS)
    steps = (load.config.num_layers - _SAMPLE_LAYERS[0]) / (_SAMPLE_LAYERS[1] - _SAMPLE_LAYERS[0])
    # All is a straight line in the number of layers; which phase of a step holds most is not.
    whole = {name: round(few[name] + (more[name] - few[name]) * steps) for name in few}
    weights, gradients, values = (whole.pop(name) for name in ("weights", "gradients", "values"))
    allocated = max(0, max(whole.values()) - weights)
    activations = max(0, allocated - gradients)
    if load.adapter is not None and load.adapter.quantization is not None:
        # Codes and scales in place of the blocks' matrices, which are written out a slab at a time.
        itemsize = load.runtime.dtype.itemsize
        blocks = matrix_weights(load.config) - load.config.vocab_size * load.config.hidden_size
        weights -= round(blocks * (itemsize - _CODE_BYTES[load.adapter.quantization]))
        activations += 2 * min(_SLAB, _largest_matrix(load.config)) * itemsize
    on_gpu = load.runtime.device != "cpu"
    program = _PROGRAM["cuda" if on_gpu else "cpu"] + (_COMPILER if load.runtime.compiled else 0)
    return Plan(
        {
            "weights": weights,
            "gradients": gradients,
            "optimiser": 0 if load.state_on_cpu and on_gpu else round(values * load.state_bytes),
            "activations": activations,
            "heap": 0 if on_gpu else round(allocated * _FREE_BETWEEN),
            "program": program,
        }
    )


def _largest_matrix(config: ModelConfig) -> int:
    """Weights of the largest one in a block."""
    heads = config.num_heads + 2 * config.num_kv_heads
    return config.hidden_size * max(heads * config.head_dim, 2 * config.intermediate_size)


def _measure(load: Load, layers: int) -> dict[str, int]:
    """The sizes of a network of that many layers, and the most that each phase of its step holds."""
    config = dataclasses.replace(load.config, num_layers=layers, windows=load.config.windows[:layers])
    with FakeTensorMode(), _Held() as held:
        model = blank_network(config, load.adapter, load.runtime.dtype).train()
        share_tied_gradient(model, load.runtime)
        weights = sum(one.nbytes() for one in _storages(model))
        trained = [one for one in model.parameters() if one.requires_grad]
        if load.accumulate > 1:
            for one in trained:
                one.grad = torch.empty_like(one)
        phases = _step(model, load, held)
    sizes = {"gradients": sum(one.nbytes for one in trained), "values": sum(one.numel() for one in trained)}
    return {"weights": weights, **sizes, **phases}


def blank_network(config: ModelConfig, adapter: AdapterConfig | None, dtype: torch.dtype) -> Transformer:
    """A network as a run would read it, with unset weights: fp32 where all is trained, else frozen in `dtype` beside
    new updates."""
    if adapter is None:
        return Transformer(config).requires_grad_(True)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        model = Transformer(config).requires_grad_(False)
    finally:
        torch.set_default_dtype(before)
    adapters.attach_new(model, adapter)
    return model


def _step(model: Transformer, load: Load, held: "_Held") -> dict[str, int]:
    """Forward and backward over one micro-batch: the peaks of the forward pass, of the loss, of the blocks, of the
    embedding."""
    targets = max(1, round(load.tokens * load.trained_share))
    # The sizes are those of any device; fake tensors are on the one that every machine has.
    runtime = Runtime("cpu", load.runtime.dtype, False)
    forward = Forward(model, runtime, seq_len=load.seq_len, checkpointing=load.recompute)
    ids = torch.empty(load.tokens, dtype=torch.int64)
    phases: dict[str, int] = {}

    def begin(after: str) -> None:
        phases[after], held.peak = held.peak, held.now

    def at_embedding(_module: nn.Module, _inputs: Any, out: Tensor) -> None:
        if out.requires_grad:
            out.register_hook(lambda _gradient: begin("blocks"))

    model.get_submodule("embed").register_forward_hook(at_embedding)
    held.peak = held.now
    hidden = forward(Batch(ids, ids, ids, list(range(0, load.tokens + 1, load.seq_len))))
    begin("forward")
    hidden.register_hook(lambda _gradient: begin("loss"))
    columns = columns_at_once(targets, load.runtime.device.partition(":")[0])
    found = trained_log_probs(hidden[:targets], head_of(model), ids[:targets], columns=columns)
    del hidden
    found.sum().backward()
    begin("embedding" if "blocks" in phases else "blocks")
    return {"embedding": 0, **phases}


def _storages(model: nn.Module) -> list[torch.UntypedStorage]:
    """What the parameters and buffers lie in, each once."""
    found: dict[int, torch.UntypedStorage] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        storage = tensor.untyped_storage()
        found[storage._cdata] = storage
    return list(found.values())


class _Held(TorchDispatchMode):
    """Counts the bytes of all tensors that are alive, `now` and at the `peak`."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's, untyped
        self.now = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._add(leaf.untyped_storage())
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen:
            return
        self._seen.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size

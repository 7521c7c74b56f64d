"""Frozen codes compute what nn.Linear over the same numbers does, forward and backward, and keep nothing of a step."""

import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from kiloq.ops.layout import QuantWeight
from kiloq.quant import frozen
from kiloq.quant.frozen import FrozenLinear
from kiloq.quant.grid import Scheme, rtn
from kiloq.quant.nf4 import Nf4Weight, quantize_nf4

ROWS, COLUMNS = 48, 128


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def shuffled(weight: QuantWeight) -> QuantWeight:
    return replace(weight, order=torch.randperm(COLUMNS, generator=torch.Generator().manual_seed(1)).int())


def eight_bits_with_zeros(weight: Tensor) -> QuantWeight:
    """What AutoGPTQ wrote when asked for 8 asymmetric bits; no kernel of ours takes it."""
    found = rtn(weight, Scheme(bits=8, group_size=32))
    return replace(found, zeros=torch.randint(-9, 9, found.scales.shape, dtype=torch.int8))


MATRICES: dict[str, Callable[[Tensor], QuantWeight | Nf4Weight]] = {
    "int4": lambda w: rtn(w, Scheme(bits=4, group_size=32)),
    "int4-zeros": lambda w: rtn(w, Scheme(bits=4, group_size=64, symmetric=False)),
    "int4-order": lambda w: shuffled(rtn(w, Scheme(bits=4, group_size=32))),
    "int8": lambda w: rtn(w, Scheme(bits=8, group_size=None)),
    "int8-order": lambda w: shuffled(rtn(w, Scheme(bits=8, group_size=None))),
    "int8-groups": lambda w: rtn(w, Scheme(bits=8, group_size=32)),
    "int8-groups-zeros": eight_bits_with_zeros,
    "nf4": quantize_nf4,
}


def pair(kind: str, *, bias: bool = True) -> tuple[FrozenLinear, nn.Linear]:
    """The layer, and the dense one over the same numbers."""
    matrix = MATRICES[kind](random(ROWS, COLUMNS))
    offset = random(ROWS) if bias else None
    dense = nn.Linear(COLUMNS, ROWS, bias=bias)
    dense.weight = nn.Parameter(matrix.dequantize())
    if offset is not None:
        dense.bias = nn.Parameter(offset.clone())
    return FrozenLinear(matrix, offset), dense


def outcome(layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Its outputs, and the gradient of x under weights that differ everywhere."""
    x = x.clone().requires_grad_()
    out = layer(x)
    (out * torch.linspace(-1, 1, out.numel()).view(out.shape).to(out)).sum().backward()
    assert x.grad is not None
    return out.detach(), x.grad


@pytest.mark.parametrize("slab", [2**24, 1500])  # all at once, and a few rows or columns at a time
@pytest.mark.parametrize("kind", MATRICES)
def test_it_is_the_linear_layer_of_what_its_codes_stand_for(
    kind: str, slab: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frozen, "_SLAB", slab)
    layer, dense = pair(kind)
    assert torch.equal(layer.dense(), dense.weight)
    assert torch.equal(layer.dense_rows(7, 20), dense.weight[7:20])
    for ours, exact in zip(outcome(layer, random(5, COLUMNS)), outcome(dense, random(5, COLUMNS)), strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["int4", "int8", "nf4"])
def test_in_bf16_each_weight_is_rounded_once(kind: str) -> None:
    layer, dense = pair(kind)
    x = random(5, COLUMNS).bfloat16()
    exact = outcome(dense.bfloat16(), x)
    for ours, theirs in zip(outcome(layer, x), exact, strict=True):
        assert ours.dtype == torch.bfloat16
        torch.testing.assert_close(ours, theirs, rtol=2**-7, atol=2**-7)


def test_under_autocast_it_computes_in_that_type_and_hands_back_gradients_in_its_inputs() -> None:
    layer, dense = pair("int4")
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = outcome(layer, random(5, COLUMNS)), outcome(dense, random(5, COLUMNS))
    assert (ours[0].dtype, ours[1].dtype) == (theirs[0].dtype, theirs[1].dtype) == (torch.bfloat16, torch.float32)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=2**-6, atol=2**-6)


def test_a_change_of_type_changes_no_weight_and_the_state_holds_no_codes() -> None:
    for kind in MATRICES:
        layer, dense = pair(kind)
        layer.to(torch.bfloat16)
        assert torch.equal(layer.dense(), dense.weight), kind
        assert set(layer.state_dict()) == {"bias"}
        assert not any(parameter.requires_grad for parameter in layer.parameters())


def test_nothing_of_the_forward_pass_is_saved() -> None:
    layer, _ = pair("int4")
    saved: list[Tensor] = []
    x = random(5, COLUMNS).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda _: None):
        out = layer(x)
    assert out.requires_grad
    assert not saved
    assert not layer(x.detach()).requires_grad


class Peak(TorchDispatchMode):
    """The most bytes that new tensors held at one time within it."""

    def __init__(self) -> None:
        super().__init__()
        self.live: Counter[int] = Counter()  # tensors of a storage
        self.held = self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        known = {x.untyped_storage().data_ptr() for x in args if isinstance(x, Tensor)} - self.live.keys()
        for one in out if isinstance(out, tuple | list) else [out]:
            if isinstance(one, Tensor) and (at := one.untyped_storage().data_ptr()) not in known:
                size = one.untyped_storage().nbytes()
                self.held += 0 if self.live[at] else size
                self.live[at] += 1
                weakref.finalize(one, self.drop, at, size)
        self.most = max(self.most, self.held)
        return out

    def drop(self, at: int, size: int) -> None:
        self.live[at] -= 1
        if not self.live[at]:
            del self.live[at]
            self.held -= size


@pytest.mark.parametrize("kind", ["int4", "int8", "nf4"])
def test_a_step_never_holds_a_dense_copy_of_the_matrices(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frozen, "_SLAB", 2**11)
    monkeypatch.setattr(frozen, "_CHUNK", 2**10)
    layers = nn.Sequential(*(FrozenLinear(MATRICES[kind](random(128, 128))) for _ in range(4)))
    x = random(2, 128).requires_grad_()
    with Peak() as peak:
        layers(x).sum().backward()
    dense = sum(4 * 128 * 128 for _ in layers)
    codes = sum(layer.nbytes for layer in layers if isinstance(layer, FrozenLinear))
    assert codes < dense / (7 if kind != "int8" else 3.9)
    assert 0 < peak.most < dense / 4


@pytest.mark.slow  # the compiler alone takes seconds to import
def test_a_compiled_layer_computes_the_same() -> None:
    layer, _ = pair("int4")
    compiled = torch.compile(layer, backend="aot_eager")
    for ours, exact in zip(outcome(compiled, random(5, COLUMNS)), outcome(layer, random(5, COLUMNS)), strict=True):
        torch.testing.assert_close(ours, exact)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", MATRICES)
def test_a_gpu_computes_what_the_cpu_does(kind: str) -> None:
    layer, _ = pair(kind)
    exact = outcome(layer, random(5, COLUMNS))
    for ours, theirs in zip(outcome(layer.cuda(), random(5, COLUMNS).cuda()), exact, strict=True):
        torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-4, atol=1e-4)

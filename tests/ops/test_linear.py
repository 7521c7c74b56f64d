"""Packed matrices: what is packed comes back, and every backend multiplies as the reference says."""

import ctypes
from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from kiloq import ops
from kiloq.ops import PackedWeight, QuantWeight, cpu, reference
from kiloq.ops.structs import Weight

ROWS = (1, 2, 3, 5, 8, 16, 17, 33, 130)
INT4 = [(group, zeros, order) for group in (32, 64, 128) for zeros in (False, True) for order in (False, True)]


class Kind(NamedTuple):
    name: str
    group_size: int = 0
    zeros: bool = False
    order: bool = False


KINDS = [Kind("bf16"), Kind("int8"), Kind("int8", order=True), *(Kind("int4", *each) for each in INT4)]


@pytest.fixture(params=cpu.NATIVE)
def native(request: pytest.FixtureRequest) -> Iterator[ctypes.CDLL]:
    if request.param not in cpu.available():
        pytest.skip(f"this machine has no {request.param}")
    torch.manual_seed(0)
    with cpu.using(request.param):
        library = cpu.library()
        assert library is not None
        library.kq_set_threads(1)  # a second thread on a busy machine waits its turn in every call
        yield library


def make_weight(kind: Kind, rows: int, columns: int) -> QuantWeight | Tensor:
    if kind.name == "bf16":
        return torch.randn(rows, columns).bfloat16()
    order = torch.randperm(columns, dtype=torch.int32) if kind.order else None
    if kind.name == "int8":
        codes = torch.randint(-127, 128, (rows, columns), dtype=torch.int8)
        return QuantWeight(kind="int8", group_size=columns, codes=codes, scales=torch.rand(rows, 1) + 0.1, order=order)
    groups = columns // kind.group_size
    return QuantWeight(
        kind="int4",
        group_size=kind.group_size,
        codes=torch.randint(0, 16, (rows, columns), dtype=torch.uint8),
        scales=(torch.rand(rows, groups) + 0.1).half().float(),
        zeros=torch.randint(0, 16, (rows, groups), dtype=torch.uint8) if kind.zeros else None,
        order=order,
    )


def floats(weight: QuantWeight | Tensor) -> Tensor:
    return weight.float() if isinstance(weight, Tensor) else weight.dequantize()


def error(found: Tensor, wanted: Tensor, x: Tensor, weight: QuantWeight | Tensor) -> float:
    """The largest difference, relative to the sizes of the terms that were summed."""
    return float(((found - wanted).abs() / (1 + x.abs() @ floats(weight).abs().T)).max())


def limit(kind: Kind) -> float:
    """Integer dot products are exact and only scales round; the matrix unit rounds bf16 inputs too."""
    return 2**-8 if kind.name == "bf16" and ops.backend() == "amx" else 1e-6


def shapes(kind: Kind) -> list[tuple[int, int]]:
    # A row of 100 or 33 inputs is no whole number of vectors; 96 is none of 64.
    step = kind.group_size
    all_shapes = [(16, 64), (17, 128), (48, 192), (100, 896), (32, 96), (100, 100), (35, 33)]
    return [(n, k) for n, k in all_shapes if not step or k % step == 0]


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.usefixtures("native")
def test_a_matrix_multiplies_as_the_reference_says_at_any_number_of_rows(kind: Kind) -> None:
    for n, k in shapes(kind):
        weight, bias = make_weight(kind, n, k), torch.randn(n)
        packed = cpu.pack(weight, bias)
        for m in ROWS:
            x = torch.randn(m, k)
            assert error(cpu.linear(x, packed), reference.quant_linear(x, packed), x, weight) < limit(kind), (n, k, m)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.usefixtures("native")
def test_what_is_packed_comes_back_and_rows_are_gathered_from_it(kind: Kind) -> None:
    for n, k in shapes(kind):
        weight = make_weight(kind, n, k)
        packed = cpu.pack(weight, None)
        back = cpu.unpack(packed)
        assert torch.equal(floats(back), floats(weight))
        assert not isinstance(back, QuantWeight) or (back.zeros is None) == (not kind.zeros)
        ids = torch.randint(0, n, (5,))
        torch.testing.assert_close(cpu.gather_rows(packed, ids), floats(weight)[ids], rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", [Kind("bf16"), Kind("int8"), Kind("int4", 128)], ids=str)
@pytest.mark.usefixtures("native")
def test_a_row_gives_the_same_bits_alone_and_among_others(kind: Kind) -> None:
    packed = cpu.pack(make_weight(kind, 100, 256), torch.randn(100))
    x = torch.randn(33, 256)
    if ops.backend() == "amx" and kind.name == "bf16":
        pytest.skip("few rows are multiplied in fp32, many by the matrix unit")
    together = cpu.linear(x, packed)
    for m in (1, 2, 4, 7, 13, 32):
        assert torch.equal(cpu.linear(x[:m], packed), together[:m]), m


@pytest.mark.parametrize("kind", [Kind("bf16"), Kind("int8"), Kind("int4", 32, True)], ids=str)
def test_strides_are_respected_and_sums_go_onto_what_was_there(native: ctypes.CDLL, kind: Kind) -> None:
    weight = make_weight(kind, 50, 96)
    packed = cpu.pack(weight, torch.randn(50))
    for m in (1, 6, 40):
        x, y = torch.randn(m, 120), torch.randn(m, 70)
        before = y.clone()
        native.kq_linear(ctypes.byref(cpu.weight_struct(packed)), x.data_ptr(), 120, m, y.data_ptr(), 70, 1)
        wanted = before[:, :50] + reference.quant_linear(x[:, :96], packed)
        assert error(y[:, :50], wanted, x[:, :96], weight) < limit(kind)
        assert torch.equal(y[:, 50:], before[:, 50:]), "columns beyond the matrix were written"


@pytest.mark.parametrize("kind", [Kind("bf16"), Kind("int8"), Kind("int4", 64)], ids=str)
@pytest.mark.usefixtures("native")
def test_swiglu_of_the_halves_is_swiglu_of_the_product(kind: Kind) -> None:
    packed = cpu.pack(make_weight(kind, 2 * 80, 192), torch.randn(160))
    for m in (1, 7, 60):
        x = torch.randn(m, 192) / 50
        # Relative to the product itself: halves come from the same kernels, and only exp is approximated.
        wanted = reference.swiglu(cpu.linear(x, packed))
        torch.testing.assert_close(cpu.linear_swiglu(x, packed), wanted, rtol=4e-6, atol=1e-6)


@pytest.mark.parametrize("kind", [Kind("bf16"), Kind("int8"), Kind("int4", 128)], ids=str)
def test_threads_share_tiles_and_rows_and_change_no_bit(native: ctypes.CDLL, kind: Kind) -> None:
    packed = cpu.pack(make_weight(kind, 2 * 80, 8192), None)
    x = torch.randn(110, 8192)  # more rows than a core's cache holds: cut into parts
    alone = cpu.linear(x, packed)
    gated = cpu.linear_swiglu(x[:50], packed) if kind.name == "int8" else None
    native.kq_set_threads(3)
    assert torch.equal(cpu.linear(x, packed), alone)
    assert torch.equal(cpu.linear(x[:1], packed), alone[:1]) or ops.backend() == "amx"
    assert gated is None or torch.equal(cpu.linear_swiglu(x[:50], packed), gated)
    native.kq_set_threads(1)


@pytest.mark.parametrize("kind", [Kind("int8"), Kind("int4", 32)], ids=str)
@pytest.mark.usefixtures("native")
def test_odd_inputs_round_as_the_reference_says(kind: Kind) -> None:
    packed = cpu.pack(make_weight(kind, 20, 64), None)
    x = torch.randn(6, 64)
    x[0] = 0
    x[1] = 1e-38  # 127 / absmax would overflow
    x[2, :32] = torch.arange(32) / 2 - 8  # ties
    x[2, 0] = 63.5
    x[3, 5] = 1e30
    x[4, 7] = float("nan")
    x[5] = -3.0
    found, wanted = cpu.linear(x, packed), reference.quant_linear(x, packed)
    assert bool(found[4].isnan().all()), "a NaN must not turn into a number"
    keep = [0, 1, 2, 3, 5]
    assert error(found[keep], wanted[keep], x[keep], cpu.unpack(packed)) < 1e-6


@pytest.mark.parametrize(
    "shape",
    [
        {"kind": 3, "n": 16, "k": 64},
        {"kind": 0, "n": 0, "k": 64},
        {"kind": 1, "n": 16, "k": -64},
        {"kind": 1, "n": 16, "k": 64, "group": 32},
        {"kind": 2, "n": 16, "k": 64, "group": 0},
        {"kind": 2, "n": 16, "k": 64, "group": 48},
        {"kind": 2, "n": 16, "k": 64, "group": 128},
        {"kind": 2, "n": 16, "k": 96, "group": 64},
        {"kind": 1, "n": 16, "k": 64, "has_zeros": 1},
        {"kind": 1, "n": 16, "k": 1 << 40},
        {"kind": 1, "n": 1 << 62, "k": 64},
    ],
    ids=str,
)
def test_an_impossible_shape_is_refused(native: ctypes.CDLL, shape: dict[str, int]) -> None:
    described = Weight(**shape)
    assert native.kq_packed_bytes(ctypes.byref(described)) == -1
    assert native.kq_pack(ctypes.byref(described), None, None, None) == -1
    assert native.kq_unpack(ctypes.byref(described), None, None, None) == -1


def test_missing_buffers_are_refused(native: ctypes.CDLL) -> None:
    packed = cpu.pack(make_weight(Kind("int4", 32, True), 16, 64), None)
    described = cpu.weight_struct(packed)
    codes, scales = torch.zeros(16, 64, dtype=torch.uint8), torch.ones(16, 2)
    assert native.kq_pack(ctypes.byref(described), codes.data_ptr(), scales.data_ptr(), None) == -1
    assert native.kq_pack(ctypes.byref(described), codes.data_ptr(), None, codes.data_ptr()) == -1
    assert native.kq_pack(ctypes.byref(described), None, scales.data_ptr(), codes.data_ptr()) == -1


def exact(weight: PackedWeight, x: Tensor) -> Tensor:
    """The formula of kiloq.h, group by group, in fp64."""
    codes_of = cpu.unpack(weight)
    assert isinstance(codes_of, QuantWeight)
    codes, scales = reference.quantize_activations(x, codes_of.group_size)
    size = codes_of.group_size
    out = torch.zeros(len(x), weight.rows, dtype=torch.float64)
    for g in range(codes_of.scales.shape[1]):
        part = slice(g * size, (g + 1) * size)
        zero = 8.0 if codes_of.zeros is None else codes_of.zeros[:, g].double()[:, None]
        dot = codes[:, part].double() @ (codes_of.codes[:, part].double() - zero).T
        out += scales[:, g, None].double() * codes_of.scales[:, g].double() * dot
    return out


def test_the_reference_is_the_formula() -> None:
    torch.manual_seed(0)
    for zeros in (False, True):
        weight = make_weight(Kind("int4", 32, zeros), 24, 128)
        x = torch.randn(5, 128)
        packed = cpu.pack(weight, None) if cpu.library() else ops.pack(weight)
        found = reference.quant_linear(x, packed).double()
        assert error(found, exact(packed, x), x, weight) < 1e-6


@pytest.mark.usefixtures("native")
def test_swiglu_holds_from_one_end_of_fp32_to_the_other() -> None:
    gate = torch.cat([torch.linspace(-120, 120, 4000), torch.tensor([0.0, -0.0, 1e-20, -3e38, 3e38, float("nan")])])
    count = len(gate) + -len(gate) % 16
    gate = torch.nn.functional.pad(gate, (0, count - len(gate)))
    # An identity of bf16 would round the gate: the bias carries it, and the inputs are zero.
    packed = cpu.pack(torch.zeros(2 * count, 8), torch.cat([gate, torch.full((count,), 0.5)]))
    found = cpu.linear_swiglu(torch.zeros(1, 8), packed)[0]
    wanted = reference.swiglu(torch.cat([gate, torch.full((count,), 0.5)]).double()).float()
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-30, equal_nan=True)


@pytest.mark.parametrize("kind", [Kind("bf16"), Kind("int8"), Kind("int4", 32)], ids=str)
def test_no_rows_are_none_times_a_matrix(kind: Kind) -> None:
    for name in cpu.available():
        with cpu.using(name):
            packed = ops.pack(make_weight(kind, 32, 64), torch.randn(32))
            assert ops.linear(torch.empty(0, 64), packed).shape == (0, 32)
            assert ops.linear_swiglu(torch.empty(0, 64), packed).shape == (0, 16)
            assert ops.gather_rows(packed, torch.empty(0, dtype=torch.int64)).shape == (0, 64)

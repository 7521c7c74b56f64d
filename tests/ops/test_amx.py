"""Products on the matrix unit: the same numbers as the vector kernels, for every shape of rows, outputs and inputs."""

import ctypes

import pytest
import torch

from kiloq import ops
from kiloq.ops import QuantWeight, cpu

pytestmark = pytest.mark.skipif("amx" not in cpu.available(), reason="this processor has no AMX, or no kernels built")

ROWS = (9, 16, 17, 32, 33, 47, 48, 49, 79, 101)  # full and partial tiles of rows, and all numbers of them
WEIGHTS = [
    *(("int8", 0, False, n, k) for n, k in ((16, 64), (50, 192), (33, 1100), (272, 72))),
    *(("int4", group, zeros, 50, 640) for group in (32, 64, 128) for zeros in (False, True)),
    *(("int4", 32, False, n, k) for n, k in ((7, 32), (19, 1056))),
    ("int4", 64, True, 300, 1088),
]


def weight_of(kind: str, group_size: int, zeros: bool, rows: int, columns: int, *, order: bool = False) -> QuantWeight:
    generator = torch.Generator().manual_seed(rows * columns)
    group_size = group_size or columns
    groups = columns // group_size
    codes = torch.randint(0, 16, (rows, columns), generator=generator).to(torch.uint8)
    if kind == "int8":
        codes = torch.randint(-127, 128, (rows, columns), generator=generator).to(torch.int8)
    return QuantWeight(
        kind="int4" if kind == "int4" else "int8",
        group_size=group_size,
        codes=codes,
        scales=(torch.rand(rows, groups, generator=generator) + 0.5).half().float() / 64,
        zeros=torch.randint(0, 16, (rows, groups), generator=generator).to(torch.uint8) if zeros else None,
        order=torch.randperm(columns, generator=generator).to(torch.int32) if order else None,
    )


def rows_of(rows: int, columns: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows)) * torch.logspace(-2, 2, columns)


def product(backend: str, x: torch.Tensor, packed: ops.PackedWeight) -> torch.Tensor:
    with cpu.using(backend):
        return ops.linear(x, packed)


@pytest.mark.parametrize(("kind", "group_size", "zeros", "n", "k"), WEIGHTS)
def test_rounded_products_have_the_bits_of_the_vector_kernels(kind, group_size, zeros, n, k):
    packed = ops.pack(weight_of(kind, group_size, zeros, n, k), torch.randn(n))
    for rows in ROWS:
        x = rows_of(rows, k)
        assert torch.equal(product("amx", x, packed), product("avx512", x, packed)), rows


@pytest.mark.parametrize(("kind", "group_size", "zeros", "n", "k"), WEIGHTS)
def test_rounded_products_are_those_of_pytorch(kind, group_size, zeros, n, k):
    weight = weight_of(kind, group_size, zeros, n, k, order=True)
    x, bias = rows_of(37, k), torch.randn(n)
    wanted = ops.reference.quant_linear(x, ops.layout.pack(weight, bias))
    found = product("amx", x, ops.pack(weight, bias))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5 * wanted.abs().max().item())


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_rounded_row_gives_the_same_bits_alone_and_among_many(kind):
    packed = ops.pack(weight_of(kind, 128 if kind == "int4" else 0, False, 48, 1152))
    x = rows_of(40, 1152)
    together = product("amx", x, packed)
    for rows in (slice(0, 1), slice(3, 5), slice(20, 33), slice(39, 40)):
        assert torch.equal(product("amx", x[rows], packed), together[rows])


@pytest.mark.parametrize(("n", "k"), [(16, 64), (50, 200), (33, 1101), (288, 71)])
def test_bf16_products_are_those_of_rows_rounded_to_bf16(n, k):
    generator = torch.Generator().manual_seed(k)
    weight, bias = torch.randn(n, k, generator=generator).bfloat16(), torch.randn(n, generator=generator)
    packed = ops.pack(weight, bias)
    for rows in (16, 17, 32, 45, 100):
        x = torch.randn(rows, k, generator=generator)
        wanted = (x.bfloat16().double() @ weight.double().T + bias.double()).float()
        torch.testing.assert_close(product("amx", x, packed), wanted, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("kind", ["bf16", "int8", "int4"])
def test_accumulating_adds_the_product_to_what_is_there(kind):
    n, k, rows = 40, 256, 21
    packed = ops.pack(torch.randn(n, k) if kind == "bf16" else weight_of(kind, 64 * (kind == "int4"), False, n, k))
    x, before = rows_of(rows, k), torch.randn(rows, n + 3)
    y = before.clone()
    with cpu.using("amx"):
        library = cpu.library()
        assert library is not None
        weight = ctypes.byref(cpu.weight_struct(packed))
        library.kq_linear(weight, x.data_ptr(), x.stride(0), rows, y.data_ptr(), y.stride(0), 1)
    assert torch.equal(y[:, :n], before[:, :n] + product("amx", x, packed))
    assert torch.equal(y[:, n:], before[:, n:])

"""The binding of the kernels: layouts, choice of the backend, errors."""

import dataclasses

import pytest
import torch

from kiloq import ops
from kiloq.errors import ConfigError
from kiloq.ops import QuantWeight, cpu, layout

SHAPES = (
    (1, 64),
    (16, 128),
    (33, 192),
    (50, 384),
    (20, 96),
    (17, 32),
)  # rows and columns that fill tiles, and that do not


def random_codes(kind: str, rows: int, columns: int, group_size: int, *, zeros: bool = False) -> QuantWeight:
    generator = torch.Generator().manual_seed(rows * columns + group_size)
    low, high = (0, 16) if kind == "int4" else (-127, 128)
    groups = columns // group_size
    return QuantWeight(
        kind=kind,
        group_size=group_size,
        codes=torch.randint(low, high, (rows, columns), generator=generator).to(
            torch.uint8 if kind == "int4" else torch.int8
        ),
        scales=(torch.rand(rows, groups, generator=generator) + 0.5).half().float(),
        zeros=torch.randint(0, 16, (rows, groups), generator=generator).to(torch.uint8) if zeros else None,
    )


def all_weights():
    for rows, columns in SHAPES:
        yield torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)).bfloat16()
        yield random_codes("int8", rows, columns, columns)
        order = torch.randperm(columns, generator=torch.Generator().manual_seed(1)).to(torch.int32)
        yield dataclasses.replace(random_codes("int4", rows, columns, 32), order=order)
        for group_size in (32, 64, 128):
            if columns % group_size == 0:
                yield random_codes("int4", rows, columns, group_size)
                yield random_codes("int4", rows, columns, group_size, zeros=True)


def assert_same(found, wanted) -> None:
    if isinstance(wanted, torch.Tensor):
        assert torch.equal(found, wanted)
        return
    for name in ("kind", "group_size"):
        assert getattr(found, name) == getattr(wanted, name)
    for name in ("codes", "scales", "zeros", "order"):
        one, other = getattr(found, name), getattr(wanted, name)
        assert (one is None) == (other is None), name
        assert one is None or torch.equal(one, other), name


def test_pytorchs_layout_gives_back_what_was_packed():
    for weight in all_weights():
        assert_same(layout.unpack(layout.pack(weight)), weight)


def test_the_kernels_pack_as_pytorch_does():
    if cpu.library() is None:
        pytest.skip("no kernels here")
    for weight in all_weights():
        packed = ops.pack(weight)
        assert torch.equal(packed.data, layout.pack(weight).data)
        assert_same(ops.unpack(packed), weight)


def test_an_impossible_backend_is_one_error(monkeypatch):
    monkeypatch.setattr(cpu, "_chosen", cpu._Chosen())
    monkeypatch.setenv("KILOQ_BACKEND", "neon")
    with pytest.raises(ConfigError, match="amx, avx512, avxvnni, avx2, reference"):
        ops.backend()


def test_a_backend_that_was_not_built_is_one_error(monkeypatch, tmp_path):
    monkeypatch.setattr(cpu, "_chosen", cpu._Chosen())
    monkeypatch.setattr(cpu, "LIBRARY", tmp_path / "_native.so")
    monkeypatch.setenv("KILOQ_BACKEND", "avx2")
    with pytest.raises(ConfigError, match="not built"):
        ops.backend()
    monkeypatch.delenv("KILOQ_BACKEND")
    assert ops.backend() == "reference"


def test_every_backend_can_be_had_for_a_while():
    before = ops.backend()
    for name in cpu.available():
        with cpu.using(name):
            assert ops.backend() == name
    assert ops.backend() == before


def test_without_kernels_the_ops_compute_in_pytorch():
    weight = torch.randn(32, 64).bfloat16()
    x = torch.randn(3, 64)
    with cpu.using("reference"):
        packed = ops.pack(weight, bias=torch.ones(32))
        torch.testing.assert_close(ops.linear(x, packed), x @ weight.float().T + 1)
        assert torch.equal(ops.gather_rows(packed, torch.tensor([3, 0])), weight[[3, 0]].float())

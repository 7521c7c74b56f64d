"""The CPU kernels of csrc/ through ctypes: which backend runs, and its functions on tensors. Knows no model or cache.

Nothing happens at import: the library is loaded, KILOQ_BACKEND read and threads counted when an op first needs them.
"""

import ctypes
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from kiloq.errors import ConfigError

from . import layout
from .layout import KINDS, PackedWeight, QuantWeight, WeightKind
from .structs import VERSION, Weight, declare

LIBRARY = Path(__file__).with_name("_native.so")
NATIVE = ("amx", "avx512", "avxvnni", "avx2")  # best first
REFERENCE = "reference"  # PyTorch, everywhere
ALIGNMENT = 64  # bytes; the kernels load whole cache lines
_LARGE_PAGE = 2 * 2**20  # bytes, on x86-64


@dataclass(frozen=True, kw_only=True)
class Backend:
    """What computes, and why that."""

    name: str
    why: str
    library: ctypes.CDLL | None

    @property
    def is_built(self) -> bool:
        """Whether this installation has kernels, for this processor or for others."""
        return LIBRARY.is_file()


@dataclass
class _Chosen:
    backend: Backend | None = None


_chosen = _Chosen()
_structs: WeakKeyDictionary[PackedWeight, Weight] = WeakKeyDictionary()


def active() -> Backend:
    """The backend that runs; chosen at the first call."""
    if _chosen.backend is None:
        _chosen.backend = _choose(os.environ.get("KILOQ_BACKEND", "").strip().lower())
    return _chosen.backend


def available() -> tuple[str, ...]:
    """Every backend that this machine can run, best first."""
    library, _ = _load()
    return (*(name for name in NATIVE if library and library.kq_supports(name.encode())), REFERENCE)


@contextmanager
def using(name: str) -> Iterator[None]:
    """Run one backend for a while, for tests and measurements; ConfigError if this machine cannot."""
    before = active()
    try:
        _chosen.backend = _choose(name)
        yield
    finally:
        _chosen.backend = before
        if before.library is not None:
            before.library.kq_choose(before.name.encode())


def library() -> ctypes.CDLL | None:
    """The kernels, or None where PyTorch computes."""
    return active().library


def weight_struct(weight: PackedWeight) -> Weight:
    """The weight as the kernels take it; it points into the tensors of `weight` and lives as long."""
    found = _structs.get(weight)
    if found is None:
        found = _structs[weight] = _describe(weight)
    return found


def pack(weight: QuantWeight | Tensor, bias: Tensor | None) -> PackedWeight:
    """Canonical codes, or a matrix kept as bf16, in the kernels' layout."""
    kind: WeightKind = "bf16" if isinstance(weight, Tensor) else weight.kind
    codes = (weight.to(torch.bfloat16) if isinstance(weight, Tensor) else weight.codes).contiguous()
    rows, columns = codes.shape
    zeros = scales = order = None
    if isinstance(weight, QuantWeight):
        scales = weight.scales.float().contiguous()
        zeros = None if weight.zeros is None else weight.zeros.contiguous()
        order = None if weight.order is None else weight.order.to(torch.int32).contiguous()
    group_size = weight.group_size if isinstance(weight, QuantWeight) and kind == "int4" else 0
    size = packed_bytes(kind, rows, columns, group_size, has_zeros=zeros is not None)
    if size < 0:
        raise ConfigError(f"a {kind} matrix of {rows} x {columns} with groups of {group_size} cannot be packed.")
    packed = PackedWeight(
        kind=kind,
        rows=rows,
        columns=columns,
        group_size=group_size,
        has_zeros=zeros is not None,
        data=aligned_bytes(size),
        bias=None if bias is None else bias.detach().float().contiguous(),
        order=order,
    )
    # The kernels skip the gaps between sections; equal weights shall be equal bytes.
    packed.data[layout.codes_bytes(packed) :].zero_()
    done = _require().kq_pack(ctypes.byref(weight_struct(packed)), _at(codes), _at(scales), _at(zeros))
    assert done == 0, (kind, rows, columns, group_size)
    return packed


def unpack(packed: PackedWeight) -> QuantWeight | Tensor:
    """What `pack` was given; int4 scales as the kernels keep them, in fp16."""
    shape = (packed.rows, packed.columns)
    if packed.kind == "bf16":
        weight = torch.empty(shape, dtype=torch.bfloat16)
        _require().kq_unpack(ctypes.byref(weight_struct(packed)), weight.data_ptr(), None, None)
        return weight
    groups = packed.columns // packed.group_size if packed.group_size else 1
    codes = torch.empty(shape, dtype=torch.uint8 if packed.kind == "int4" else torch.int8)
    scales = torch.empty(packed.rows, groups)
    zeros = torch.empty(packed.rows, groups, dtype=torch.uint8) if packed.has_zeros else None
    _require().kq_unpack(ctypes.byref(weight_struct(packed)), codes.data_ptr(), scales.data_ptr(), _at(zeros))
    return QuantWeight(
        kind=packed.kind,
        group_size=packed.group_size or packed.columns,
        codes=codes,
        scales=scales,
        zeros=zeros,
        order=packed.order,
    )


def linear(x: Tensor, packed: PackedWeight) -> Tensor:
    """x [.., K] -> [.., N] in the type of x."""
    rows = _rows(x, packed)
    out = torch.empty(rows.shape[0], packed.rows)
    _require().kq_linear(
        ctypes.byref(weight_struct(packed)),
        rows.data_ptr(),
        rows.stride(0),
        rows.shape[0],
        out.data_ptr(),
        packed.rows,
        0,
    )
    return out.view(*x.shape[:-1], packed.rows).to(x.dtype)


def linear_swiglu(x: Tensor, packed: PackedWeight) -> Tensor:
    """x [.., K] -> silu(gate) * up of the two halves of the outputs, [.., N / 2] in the type of x."""
    rows = _rows(x, packed)
    out = torch.empty(rows.shape[0], packed.rows // 2)
    _require().kq_linear_swiglu(
        ctypes.byref(weight_struct(packed)),
        rows.data_ptr(),
        rows.stride(0),
        rows.shape[0],
        out.data_ptr(),
        packed.rows // 2,
    )
    return out.view(*x.shape[:-1], packed.rows // 2).to(x.dtype)


def gather_rows(packed: PackedWeight, ids: Tensor) -> Tensor:
    """Rows `ids` [T] of the matrix, fp32 [T, K]."""
    ids = ids.to(torch.int64).contiguous()
    if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < packed.rows:
        raise IndexError(f"rows {int(ids.min())} to {int(ids.max())} of a matrix that has {packed.rows}")
    out = torch.empty(len(ids), packed.columns)
    _require().kq_gather_rows(ctypes.byref(weight_struct(packed)), ids.data_ptr(), len(ids), out.data_ptr())
    return out


def packed_bytes(kind: WeightKind, rows: int, columns: int, group_size: int, *, has_zeros: bool) -> int:
    """How long the data of such a matrix is; -1 where there can be none."""
    shape = Weight(kind=KINDS[kind], group=group_size, has_zeros=has_zeros, n=rows, k=columns, packed=None, bias=None)
    size: int = _require().kq_packed_bytes(ctypes.byref(shape))
    return size


def aligned_bytes(size: int) -> Tensor:
    """Fresh memory that starts where the kernels want it, uint8 [size]."""
    alignment = _LARGE_PAGE if size >= 2 * _LARGE_PAGE else ALIGNMENT
    data = torch.empty(size + alignment, dtype=torch.uint8)
    data = data[-data.data_ptr() % alignment :][:size]
    advice = getattr(mmap, "MADV_HUGEPAGE", None)  # Linux only
    if alignment == _LARGE_PAGE and advice is not None:
        # Prefetching stops at a page's end: the 1.8B shape decodes 0 to 5 % faster (41.2 -> 39.0, 39.9 -> 39.9 ms).
        whole = ctypes.c_size_t(size // _LARGE_PAGE * _LARGE_PAGE)
        ctypes.CDLL(None).madvise(ctypes.c_void_p(data.data_ptr()), whole, advice)  # where refused, nothing is lost
    return data


def _load() -> tuple[ctypes.CDLL | None, str]:
    """The library, or why there is none; ConfigError if it was built from another source."""
    if not LIBRARY.is_file():
        return None, "the kernels were not built"
    try:
        found = ctypes.CDLL(str(LIBRARY))
    except OSError as error:
        return None, f"{LIBRARY.name} cannot be loaded: {error}"
    found.kq_version.restype = ctypes.c_int32
    version = found.kq_version()
    if version != VERSION:
        raise ConfigError(
            f"{LIBRARY} is of version {version}, but this kiloq needs {VERSION}: "
            "build it again with `pip install -e .`, or set KILOQ_BACKEND=reference to do without."
        )
    missing = declare(found)
    return (None, f"{LIBRARY.name} lacks {missing}: build it again") if missing else (found, "")


def _choose(asked: str) -> Backend:
    """The backend of that name, or the best for ""; ConfigError if this machine cannot."""
    if asked not in ("", REFERENCE, *NATIVE):
        raise ConfigError(f"KILOQ_BACKEND is {asked!r}; it must be one of {', '.join((*NATIVE, REFERENCE))}, or unset.")
    if asked == REFERENCE:
        return Backend(name=REFERENCE, why="KILOQ_BACKEND asks for it", library=None)
    found, why = _load()
    if found is None:
        if asked:
            raise ConfigError(f"KILOQ_BACKEND is {asked!r}, but {why}; `kiloq doctor` says how to mend it.")
        return Backend(name=REFERENCE, why=why, library=None)
    if asked and found.kq_choose(asked.encode()) != 0:
        best = found.kq_backend().decode() or REFERENCE
        raise ConfigError(f"KILOQ_BACKEND is {asked!r}, which this processor does not have; unset it to get {best!r}.")
    name = asked or next((name for name in NATIVE if found.kq_choose(name.encode()) == 0), None)
    if name is None:
        return Backend(name=REFERENCE, why="this processor has no AVX2", library=None)
    found.kq_set_threads(torch.get_num_threads())
    why = "KILOQ_BACKEND asks for it" if asked else "the best that this processor has"
    return Backend(name=name, why=why, library=found)


def _require() -> ctypes.CDLL:
    found = active().library
    assert found is not None, "kernels are called although PyTorch computes"
    return found


def _describe(weight: PackedWeight) -> Weight:
    for tensor, dtype in ((weight.data, torch.uint8), (weight.bias, torch.float32), (weight.order, torch.int32)):
        assert tensor is None or (tensor.dtype == dtype and tensor.is_contiguous() and not tensor.is_cuda), tensor
    assert weight.data.data_ptr() % ALIGNMENT == 0, "packed weights must start at a multiple of 64 bytes"
    described = Weight(
        kind=KINDS[weight.kind],
        group=weight.group_size,
        has_zeros=weight.has_zeros,
        n=weight.rows,
        k=weight.columns,
        packed=weight.data.data_ptr(),
        bias=_at(weight.bias),
        order=_at(weight.order),
    )
    size = _require().kq_packed_bytes(ctypes.byref(described))
    assert size == weight.data.numel(), (size, weight.data.numel())
    return described


def _rows(x: Tensor, packed: PackedWeight) -> Tensor:
    """x as fp32 rows [M, K] whose values lie side by side."""
    assert x.shape[-1] == packed.columns, (x.shape, packed.rows, packed.columns)
    rows = x.detach().reshape(-1, packed.columns).float()
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def _at(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()

"""Quantised matrices in the files of a checkpoint: which tensors one consists of, whether they fit, and its codes."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from kiloq.errors import CheckpointError
from kiloq.quant.config import FileQuantization
from kiloq.quant.pack import Codes, from_compressed, from_gptq

from .files import StoredTensor, read_tensor

_FLOATS = ("float16", "bfloat16", "float32")
_INT32 = ("int32",)


@dataclass(frozen=True)
class Expected:
    """A tensor beside others of the same matrix, by the end of its name."""

    suffix: str
    shapes: tuple[tuple[int, ...], ...]  # any of these
    dtypes: tuple[str, ...]
    optional: bool = False


def stem_of(tensor: str) -> str:
    """The name of a layer on disk, from that of its weight."""
    return tensor.removesuffix(".weight")


def is_quantized(stem: str, stored: Mapping[str, StoredTensor]) -> bool:
    """Whether a layer's matrix lies in codes; some of a quantised checkpoint (the head) may not."""
    return any(f"{stem}.{suffix}" in stored for suffix in ("qweight", "weight_packed", "weight_scale"))


def expected(scheme: FileQuantization, rows: int, columns: int) -> Iterator[Expected]:
    """The tensors of a matrix [rows, columns] in this format."""
    per_word = 32 // scheme.bits
    size = scheme.group_size or columns
    groups = columns // size
    if columns % size or columns % per_word:
        raise CheckpointError(f"{columns:,} inputs cannot be cut into groups of {size} and words of {per_word}")
    if scheme.format in ("gptq", "gptq_v2"):
        if rows % per_word:
            raise CheckpointError(f"{rows:,} outputs do not fill words of {per_word}")
        yield Expected("qweight", ((columns // per_word, rows),), _INT32)
        yield Expected("qzeros", ((groups, rows // per_word),), _INT32)
        yield Expected("scales", ((groups, rows),), _FLOATS)
        yield Expected("g_idx", ((columns,),), _INT32, optional=True)
        return
    yield Expected("weight_scale", ((rows, groups), *([(rows,)] if groups == 1 else [])), _FLOATS)
    if scheme.format == "int-quantized":
        yield Expected("weight", ((rows, columns),), ("int8",))
        return
    yield Expected("weight_packed", ((rows, columns // per_word),), _INT32)
    yield Expected("weight_shape", ((2,),), ("int64", "int32"), optional=True)
    yield Expected("weight_zero_point", ((-(-rows // per_word), groups),), _INT32, optional=scheme.symmetric)
    yield Expected("weight_g_idx", ((columns,),), ("int32", "int64"), optional=True)


def check(
    stem: str, shape: tuple[int, ...], scheme: FileQuantization, stored: Mapping[str, StoredTensor]
) -> frozenset[str]:
    """Compare a matrix's tensors with what its shape asks for; their names."""
    found = set()
    try:
        wanted = list(expected(scheme, *shape))
    except CheckpointError as error:
        raise CheckpointError(f"{stem}: {error} ({scheme.label}); config.json and the weights do not fit.") from None
    for one in wanted:
        name = f"{stem}.{one.suffix}"
        tensor = stored.get(name)
        if tensor is None:
            if one.optional:
                continue
            raise CheckpointError(f"{stem} is quantised ({scheme.label}), but there is no tensor {name}.")
        if tensor.shape not in one.shapes or tensor.dtype not in one.dtypes:
            raise CheckpointError(
                f"{tensor.file}: tensor {name} is {tensor.dtype} {list(tensor.shape)}, but {scheme.label} of a matrix "
                f"{list(shape)} asks for {' or '.join(one.dtypes)} {list(one.shapes[0])}."
            )
        found.add(name)
    return frozenset(found)


def read_codes(stem: str, scheme: FileQuantization, stored: Mapping[str, StoredTensor]) -> Codes:
    """The codes of one matrix whose tensors `check` has seen; CheckpointError if they cannot be meant."""

    def read(suffix: str) -> Tensor:
        return read_tensor(stored[f"{stem}.{suffix}"])

    def read_if(suffix: str) -> Tensor | None:
        return read(suffix) if f"{stem}.{suffix}" in stored else None

    try:
        match scheme.format:
            case "gptq" | "gptq_v2":
                codes = from_gptq(
                    read("qweight"),
                    read("qzeros"),
                    read("scales"),
                    read_if("g_idx"),
                    bits=scheme.bits,
                    less_one=scheme.format == "gptq",
                )
            case "pack-quantized":
                codes = from_compressed(
                    read("weight_packed"),
                    read("weight_scale").reshape(len(read("weight_packed")), -1),
                    read_if("weight_zero_point"),
                    read_if("weight_g_idx"),
                    bits=scheme.bits,
                )
            case "int-quantized":
                values = read("weight")
                scales = read("weight_scale").float().reshape(-1, 1)
                unsigned = (values.to(torch.int16) + 128).to(torch.uint8)
                codes = Codes(bits=8, codes=unsigned, scales=scales, zeros=None, order=None)
    except CheckpointError as error:
        raise CheckpointError(f"{stem}: {error}; the file is damaged. Download it again.") from None
    if not bool(codes.scales.isfinite().all()):
        raise CheckpointError(f"{stem}: a scale is not finite; the file is damaged. Download it again.")
    if scheme.symmetric and codes.zeros is not None:
        raise CheckpointError(
            f"{stem}: config.json says that the codes are symmetric, but zeros differ from {2 ** (scheme.bits - 1)}; "
            "the tensor is damaged, or checkpoint_format is wrong."
        )
    return codes

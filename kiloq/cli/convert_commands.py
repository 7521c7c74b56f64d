"""`kiloq convert` and `kiloq download`. Knows no file format and no hub."""

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from kiloq.errors import ConfigError

Revision = Annotated[str | None, Parameter(help="A branch, tag or commit of the hub id.")]


def convert(
    model: Annotated[str, Parameter(help="A folder or a hub id.")],
    output: Annotated[Path, Parameter(name=["--output", "-o"], help="The new folder.")],
    *,
    to: Annotated[
        Literal["qwen2"] | None, Parameter(help="The layout that transformers, vLLM and others read.")
    ] = None,
    dequantize: Annotated[
        bool, Parameter(negative="", help="Write the numbers that the codes of a quantised checkpoint stand for.")
    ] = False,
    dtype: Annotated[str, Parameter(help="float32, bfloat16, float16, or auto (as stored).")] = "auto",
    revision: Revision = None,
) -> None:
    """Write a checkpoint in another layout, or without its quantisation; the weights stay the same."""
    from kiloq.checkpoint import convert_checkpoint, open_checkpoint

    checkpoint = open_checkpoint(model, revision=revision)
    if to is None and not dequantize:
        raise ConfigError("nothing is asked for: pass --to qwen2, or --dequantize.")
    if (checkpoint.quantization is not None) != dequantize:
        found = "is quantised; add" if checkpoint.quantization else "is not quantised; leave out"
        raise ConfigError(f"{model} {found} --dequantize.")
    convert_checkpoint(checkpoint, output, family=to or checkpoint.config.family, dtype=dtype)
    print(output)


def download(
    model: Annotated[str, Parameter(help="A hub id, such as Qwen/Qwen3-0.6B.")], *, revision: Revision = None
) -> None:
    """Fetch a model, so that it works offline later; an interrupted download goes on where it ended."""
    from kiloq.checkpoint import download as fetch

    print(fetch(model, revision=revision))

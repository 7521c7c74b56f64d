"""`kiloq convert` and `kiloq download`. Knows no file format and no hub."""

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from kiloq.cli.quantize import CalibrationOptions
from kiloq.errors import ConfigError

Revision = Annotated[str | None, Parameter(help="A branch, tag or commit of the hub id.")]


def convert(
    model: Annotated[
        str | None,
        Parameter(
            name=["--model", "-m"], help="A folder or a hub id; with --merge, by default the adapter's own base."
        ),
    ] = None,
    output: Annotated[Path | None, Parameter(name=["--output", "-o"], help="The new folder.")] = None,
    *,
    merge: Annotated[Path | None, Parameter(help="An adapter's folder, which is merged into the weights.")] = None,
    to: Annotated[
        Literal["qwen2", "float32", "bfloat16", "float16", "int4", "int8"] | None,
        Parameter(
            help="qwen2: the layout that transformers, vLLM and others read. With --merge also the type of the result; "
            "int4 and int8 quantise it anew."
        ),
    ] = None,
    dequantize: Annotated[
        bool, Parameter(negative="", help="Write the numbers that the codes of a quantised checkpoint stand for.")
    ] = False,
    dtype: Annotated[str, Parameter(help="float32, bfloat16, float16, or auto (as stored).")] = "auto",
    revision: Revision = None,
    data: CalibrationOptions = CalibrationOptions(),
) -> None:
    """Write a checkpoint in another layout, without its quantisation, or with an adapter merged into it."""
    from kiloq.checkpoint import convert_checkpoint, open_checkpoint

    if output is None:
        raise ConfigError("no output is given; name the new folder with -o.")
    if merge is not None:
        from kiloq.cli.merge import merge_adapter

        if dequantize or revision is not None or dtype != "auto":
            raise ConfigError(
                "--merge takes the type of its result by --to, and no --dequantize, --dtype or --revision."
            )
        merge_adapter(
            merge,
            output,
            model=model,
            form=None if to == "qwen2" else to,
            family="qwen2" if to == "qwen2" else None,
            data=data,
        )
        print(output)
        return
    if model is None:
        raise ConfigError("no model is given; name a folder or a hub id.")
    checkpoint = open_checkpoint(model, revision=revision)
    if to is None and not dequantize:
        raise ConfigError("nothing is asked for: pass --to qwen2, --dequantize or --merge.")
    if to not in (None, "qwen2"):
        raise ConfigError(
            f"--to {to} goes with --merge; --dtype chooses the type of weights, kiloq quantize their bits."
        )
    if (checkpoint.quantization is not None) != dequantize:
        found = "is quantised; add" if checkpoint.quantization else "is not quantised; leave out"
        raise ConfigError(f"{model} {found} --dequantize.")
    convert_checkpoint(checkpoint, output, family="qwen2" if to == "qwen2" else checkpoint.config.family, dtype=dtype)
    print(output)


def download(
    model: Annotated[str, Parameter(help="A hub id, such as Qwen/Qwen3-0.6B.")], *, revision: Revision = None
) -> None:
    """Fetch a model, so that it works offline later; an interrupted download goes on where it ended."""
    from kiloq.checkpoint import download as fetch

    print(fetch(model, revision=revision))

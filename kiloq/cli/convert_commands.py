"""`kiloq convert` and `kiloq download`. Knows no file format and no hub."""

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

Revision = Annotated[str | None, Parameter(help="A branch, tag or commit of the hub id.")]


def convert(
    model: Annotated[str, Parameter(help="A folder or a hub id.")],
    output: Annotated[Path, Parameter(name=["--output", "-o"], help="The new folder.")],
    *,
    to: Annotated[Literal["qwen2"], Parameter(help="The layout that transformers, vLLM and others read.")],
    dtype: Annotated[str, Parameter(help="float32, bfloat16, float16, or auto (as stored).")] = "auto",
    revision: Revision = None,
) -> None:
    """Write a checkpoint in another layout; the weights stay the same."""
    from kiloq.checkpoint import convert_checkpoint, open_checkpoint

    convert_checkpoint(open_checkpoint(model, revision=revision), output, family=to, dtype=dtype)
    print(output)


def download(
    model: Annotated[str, Parameter(help="A hub id, such as Qwen/Qwen3-0.6B.")], *, revision: Revision = None
) -> None:
    """Fetch a model, so that it works offline later; an interrupted download goes on where it ended."""
    from kiloq.checkpoint import download as fetch

    print(fetch(model, revision=revision))

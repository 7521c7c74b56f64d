"""`kiloq bench finetune`: memory and time of fine-tuning by method and length. The work is done in kiloq.bench."""

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from kiloq.cli.terminal import progress, say, write
from kiloq.errors import ConfigError


def finetune(
    *,
    shape: Annotated[str, Parameter(help="Random weights in a model's shape: qwen-7b, qwen2.5-0.5b ...")],
    methods: Annotated[
        str, Parameter(help="LoRA, LoRA (emb), Q-LoRA, Full-parameter; several with commas.")
    ] = "LoRA,LoRA (emb),Q-LoRA,Full-parameter",
    lengths: Annotated[str, Parameter(help="Tokens of a sequence, or several with commas.")] = (
        "256,512,1024,2048,4096,8192"
    ),
    accumulate: Annotated[int, Parameter(help="Sequences of a step, one at a time.")] = 8,
    device: Annotated[str, Parameter(help="cpu, cuda, or auto.")] = "auto",
    checkpointing: Annotated[
        Literal["none", "selective", "full"], Parameter(help="What is computed again instead of kept.")
    ] = "selective",
    memory: Annotated[
        float | None,
        Parameter(help="GiB that may be taken; default: what is free. What needs more is predicted, in brackets."),
    ] = None,
    json_: Annotated[
        Path | None, Parameter(name="--json", help="Keep every figure in this file; what it has is not measured again.")
    ] = None,
) -> None:
    """The first Qwen README's table of fine-tuning: peak memory and seconds of an optimiser step."""
    import torch

    from kiloq.bench.finetune import METHODS, Cell, fill, table
    from kiloq.cache.budget import available_memory
    from kiloq.train.forward import choose_device

    here = choose_device(device)
    chosen = [word.strip() for word in methods.split(",")]
    for word in chosen:
        if word not in METHODS:
            raise ConfigError(f"--methods has {word!r}; it takes {', '.join(METHODS)}, or several with commas.")
    if accumulate < 1:
        raise ConfigError(f"--accumulate is {accumulate}; a step has at least 1 sequence.")
    if memory is not None and not memory > 0:
        raise ConfigError(f"--memory is {memory}; it must be above 0.")
    if json_ is not None and not json_.parent.is_dir():
        raise ConfigError(f"--json is {json_}, and there is no folder {json_.parent}. Make it, or name another file.")
    cells = [
        Cell(
            shape=shape,
            method=method,
            length=length,
            accumulate=accumulate,
            device=here,
            checkpointing=checkpointing,
        )
        for method in chosen
        for length in _lengths(lengths, shape)
    ]
    room = memory * 2**30 if memory is not None else available_memory(torch.device(here))
    with progress(len(cells)) as told:
        results = fill(cells, json_, room, told)
    write(f"{table(results)}\n")
    predicted = sum("peak_bytes" not in one for one in results)
    if predicted:
        say(f"In brackets: {predicted} of {len(results)} are only predicted; they need more than {_gib(room)} GiB.")


def _lengths(words: str, shape: str) -> list[int]:
    """What --lengths asks for, within what the shape takes."""
    from kiloq.bench.shapes import shape_config

    if not all(word.strip().isdigit() for word in words.split(",")):
        raise ConfigError(f"--lengths is {words!r}; it takes whole numbers, with commas between them.")
    most = shape_config(shape).max_length
    found = [int(word) for word in words.split(",")]
    for length in found:
        if not 1 <= length <= most:
            raise ConfigError(f"--lengths has {length:,}; {shape} takes 1 to {most:,} tokens.")
    return found


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f}"

"""`kiloq bench finetune`: memory and time of fine-tuning by method and length. The work is done in kiloq.bench."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from kiloq.cli.terminal import progress, write
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
    checkpointing: Annotated[str, Parameter(help="none, selective or full.")] = "selective",
    memory: Annotated[float | None, Parameter(help="GiB that may be taken; default: what is free.")] = None,
    json_: Annotated[
        Path | None, Parameter(name="--json", help="Keep every figure in this file; what it has is not measured again.")
    ] = None,
) -> None:
    """The first Qwen README's table of fine-tuning: peak memory and seconds of an optimiser step.

    What does not fit is predicted, in brackets.
    """
    import torch

    from kiloq.bench.finetune import METHODS, Cell, fill, table
    from kiloq.cache.budget import available_memory
    from kiloq.train.forward import choose_device

    here = choose_device(device)
    chosen = [word.strip() for word in methods.split(",")]
    for word in chosen:
        if word not in METHODS:
            raise ConfigError(f"--methods has {word!r}; it takes {', '.join(METHODS)}, or several with commas.")
    if not all(word.strip().isdigit() for word in lengths.split(",")):
        raise ConfigError(f"--lengths is {lengths!r}; it takes whole numbers, with commas between them.")
    cells = [
        Cell(
            shape=shape,
            method=method,
            length=int(length),
            accumulate=accumulate,
            device=here,
            checkpointing=checkpointing,
        )
        for method in chosen
        for length in lengths.split(",")
    ]
    room = memory * 2**30 if memory is not None else available_memory(torch.device(here))
    with progress(len(cells)) as told:
        results = fill(cells, json_, room, told)
    write(f"{table(results)}\n")

"""`kiloq train plan`: what a recipe will take in memory, and what to change where it does not fit. Reads no weights."""

import dataclasses
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

from cyclopts import Parameter

from kiloq.cli.terminal import write
from kiloq.errors import ConfigError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    from kiloq.model import ModelConfig
    from kiloq.train.plan import Load, Plan

T = TypeVar("T", bound="DataclassInstance")


def plan(
    recipe: Path,
    /,
    *,
    model: Annotated[
        str | None,
        Parameter(name=["--model", "-m"], help="A folder or hub id, or a shape such as qwen-7b; else the recipe's."),
    ] = None,
    device: Annotated[str, Parameter(help="cpu, cuda, or auto as the recipe says.")] = "auto",
    memory: Annotated[float | None, Parameter(help="GiB of the device; default: what is free on this one.")] = None,
    overrides: Annotated[
        tuple[str, ...], Parameter(name="--set", negative=(), help="Change a setting of the recipe, a.b=value.")
    ] = (),
) -> int:
    """Predict the memory of a recipe before anything is loaded; exits with 1 if it does not fit.

    One network is counted: the frozen reference of a preference run and the value network of PPO come on top.
    """
    from kiloq.bench.tables import markdown
    from kiloq.train.plan import plan as predict

    load = _load(recipe, model, device, overrides)
    room = memory * 2**30 if memory is not None else _free(load.runtime.device)
    found = [("as it is", predict(load))]
    if found[0][1].total > room:
        for name, other in _changes(load):
            found.append((name, predict(other)))
            if found[-1][1].total <= room:
                break
    rows = [[name, *map(_gib, one.parts.values()), _gib(one.total), _verdict(one, room)] for name, one in found]
    write(markdown(["", *found[0][1].parts, "total GiB", "fits"], rows) + "\n")
    print(
        f"{load.config.num_parameters / 1e9:.2f}B parameters, {load.tokens:,} tokens a micro-batch in rows of "
        f"{load.seq_len:,}, {str(load.runtime.dtype).removeprefix('torch.')} products on {load.runtime.device}; "
        f"{_gib(room)} GiB {'given' if memory is not None else 'free'}.",
        file=sys.stderr,
    )
    return 0 if found[0][1].total <= room else 1


def _load(recipe: Path, model: str | None, device: str, overrides: tuple[str, ...]) -> "Load":
    from kiloq.train.adapters import AdapterConfig
    from kiloq.train.forward import Runtime
    from kiloq.train.optim import OptimConfig
    from kiloq.train.plan import Load
    from kiloq.train.recipe import read_table
    from kiloq.train.settings import BatchConfig, LoopConfig

    table = read_table(recipe, overrides)
    loop = _part(LoopConfig, table, "loop")
    runtime = Runtime.choose(loop)
    if device != "auto":  # a device that need not be here
        import torch

        dtype = torch.bfloat16 if device != "cpu" and loop.precision != "fp32" else runtime.dtype
        runtime = Runtime(device, dtype, loop.compile != "off")
    batch = runtime.batch(_part(BatchConfig, table, "batch"))
    optim = _part(OptimConfig, {"optim": {"lr": 1.0, **_table(table, "optim")}}, "optim")
    return Load(
        config=_shape(table, model),
        runtime=runtime,
        seq_len=batch.seq_len,
        tokens=batch.tokens,
        accumulate=batch.accumulate,
        adapter=_part(AdapterConfig, table, "adapter") if "adapter" in table else None,
        recompute=loop.recompute,
        state_bytes=optim.state_bytes,
        state_on_cpu=optim.offload,
    )


def _shape(table: Mapping[str, object], model: str | None) -> "ModelConfig":
    from kiloq.bench.shapes import SHAPES, shape_config
    from kiloq.checkpoint import open_checkpoint

    name = model or table.get("model")
    if not isinstance(name, str):
        raise ConfigError("the recipe begins from random weights; name a shape or a checkpoint with --model.")
    return shape_config(name) if name.lower() in SHAPES else open_checkpoint(name).config


def _changes(load: "Load") -> Iterator[tuple[str, "Load"]]:
    """What to try, in the order of what it costs, each added to those before."""
    from kiloq.train.adapters import AdapterConfig

    one = load
    for words in ("selective", "full"):
        if load.recompute != "full" and one.recompute != words:
            one = dataclasses.replace(one, recompute=words)
            yield f"loop.checkpointing = {words!r}", one
    while one.tokens > one.seq_len:
        half = max(one.seq_len, one.tokens // 2 // one.seq_len * one.seq_len)
        one = dataclasses.replace(one, tokens=half, accumulate=one.accumulate * 2)
        yield f"+ batch.tokens = {half}, accumulate x 2", one
    if one.state_bytes > 4:
        one = dataclasses.replace(one, state_bytes=2.02)
        yield "+ optim.kind = 'adamw8bit'", one
    if one.adapter is None:
        one = dataclasses.replace(one, adapter=AdapterConfig(embeddings="none"))
        yield "+ [adapter] (LoRA)", one
    if one.adapter is not None and one.adapter.quantization is None:
        one = dataclasses.replace(one, adapter=dataclasses.replace(one.adapter, quantization="int4"))
        yield "+ adapter.quantization = 'int4'", one


def _part(kind: type[T], table: Mapping[str, object], name: str) -> T:
    from kiloq.train.recipe import parse_config

    return parse_config(kind, _table(table, name), f"{name}.")


def _table(table: Mapping[str, object], name: str) -> Mapping[str, object]:
    found = table.get(name, {})
    if not isinstance(found, dict):
        raise ConfigError(f"{name} is {found!r}; it must be a table of settings.")
    return found


def _free(device: str) -> float:
    import torch

    from kiloq.cache.budget import available_memory

    if device != "cpu" and not torch.cuda.is_available():
        raise ConfigError(f"there is no {device} here to ask for its memory; say how many GiB it has with --memory.")
    return available_memory(torch.device(device))


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f}"


def _verdict(one: "Plan", room: float) -> str:
    return "yes" if one.total <= room else "no"

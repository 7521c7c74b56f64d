"""The work folder of a quantisation: finished layers, and hidden states as mapped files.

A layer counts as finished when its file has its name; hidden states behind it have theirs before that.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from kiloq.ops.layout import QuantWeight


def hidden_file(work: Path, kind: str, layer: int) -> Path:
    """Where the hidden states lie that layer `layer` reads."""
    return work / f"{kind}-{layer:04}"


def map_hidden(path: Path, tokens: int, width: int, *, new: bool = False) -> Tensor:
    """fp32 [tokens, width] in a file; what is written to it is in the file."""
    if new:
        path.unlink(missing_ok=True)
    return torch.from_file(str(path), shared=True, size=tokens * width, dtype=torch.float32).view(tokens, width)


def save_layer(work: Path, layer: int, weights: dict[str, QuantWeight], facts: dict[str, Any]) -> None:
    """Keep a finished layer; `facts` are what `find_finished` gives back, as JSON."""
    tensors: dict[str, Tensor] = {}
    kinds = {}
    for name, weight in weights.items():
        kinds[name] = [weight.kind, weight.group_size]
        for part in ("codes", "scales", "zeros", "order"):
            value = getattr(weight, part)
            if value is not None:
                tensors[f"{name}.{part}"] = value.contiguous()
    unfinished = work / "layer.unfinished"
    save_file(tensors, unfinished, metadata={"kinds": json.dumps(kinds), "facts": json.dumps(facts)})
    unfinished.replace(_layer_file(work, layer))


def read_layer(work: Path, layer: int) -> dict[str, QuantWeight]:
    """The matrices of a finished layer, by the names they were saved under."""
    with safe_open(_layer_file(work, layer), framework="pt") as file:
        present = set(file.keys())
        weights = {}
        for name, (kind, group_size) in json.loads(file.metadata()["kinds"]).items():
            parts: dict[str, Any] = {
                part: file.get_tensor(f"{name}.{part}") if f"{name}.{part}" in present else None
                for part in ("codes", "scales", "zeros", "order")
            }
            weights[name] = QuantWeight(kind=kind, group_size=group_size, **parts)
    return weights


def find_finished(work: Path, num_layers: int) -> list[dict[str, Any]]:
    """The facts of the layers from 0 on that are finished."""
    found = []
    for layer in range(num_layers):
        if not _layer_file(work, layer).exists():
            break
        with safe_open(_layer_file(work, layer), framework="pt") as file:
            found.append(json.loads(file.metadata()["facts"]))
    return found


def _layer_file(work: Path, layer: int) -> Path:
    return work / f"layer-{layer:04}.safetensors"

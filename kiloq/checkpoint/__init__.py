"""Checkpoints: names and folders become models, and models become folders."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .adapter import read_adapter
    from .convert import convert_checkpoint
    from .generation import GenerationDefaults
    from .hub import bundled, download, resolve
    from .load import load_dense, load_frozen, load_model, load_scored
    from .reader import Checkpoint, open_checkpoint
    from .writer import save_checkpoint

# Finding and fetching a model needs no torch, reading it does: each name is looked up when it is first used.
_HOME = {
    "Checkpoint": "reader",
    "GenerationDefaults": "generation",
    "bundled": "hub",
    "convert_checkpoint": "convert",
    "download": "hub",
    "load_dense": "load",
    "load_frozen": "load",
    "load_model": "load",
    "load_scored": "load",
    "open_checkpoint": "reader",
    "read_adapter": "adapter",
    "resolve": "hub",
    "save_checkpoint": "writer",
}

__all__ = [
    "Checkpoint",
    "GenerationDefaults",
    "bundled",
    "convert_checkpoint",
    "download",
    "load_dense",
    "load_frozen",
    "load_model",
    "load_scored",
    "open_checkpoint",
    "read_adapter",
    "resolve",
    "save_checkpoint",
]


def __getattr__(name: str) -> object:
    if name in _HOME:
        return getattr(import_module(f"kiloq.checkpoint.{_HOME[name]}"), name)
    raise AttributeError(f"module 'kiloq.checkpoint' has no attribute {name!r}")

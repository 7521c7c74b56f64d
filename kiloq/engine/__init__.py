"""The engine: requests in, tokens out, many at a time."""

from importlib import import_module
from typing import TYPE_CHECKING

from .params import SamplingParams

if TYPE_CHECKING:
    from .llm import LLM

__all__ = ["LLM", "SamplingParams"]


def __getattr__(name: str) -> object:
    # Parameters are read by doors that must start without torch; the engine itself is loaded at first use.
    if name == "LLM":
        return import_module("kiloq.engine.llm").LLM
    raise AttributeError(f"module 'kiloq.engine' has no attribute {name!r}")

"""The engine: requests in, tokens out, many at a time."""

from importlib import import_module
from typing import TYPE_CHECKING

from .params import SamplingParams

if TYPE_CHECKING:
    from .engine import Engine
    from .events import Event, Usage
    from .limits import EngineConfig
    from .llm import LLM
    from .results import Choice, Piece, Result

# Parameters are read by doors that must start without torch; the rest is looked up when it is first used.
_HOME = {
    "LLM": "llm",
    "Choice": "results",
    "Engine": "engine",
    "EngineConfig": "limits",
    "Event": "events",
    "Piece": "results",
    "Result": "results",
    "Usage": "events",
}

__all__ = ["LLM", "Choice", "Engine", "EngineConfig", "Event", "Piece", "Result", "SamplingParams", "Usage"]


def __getattr__(name: str) -> object:
    if name in _HOME:
        return getattr(import_module(f"kiloq.engine.{_HOME[name]}"), name)
    raise AttributeError(f"module 'kiloq.engine' has no attribute {name!r}")

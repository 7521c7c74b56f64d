"""What every route of the server is given: the model, its engine's thread, the names it answers to, the limits."""

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

from kiloq.cache import BLOCK_SIZE
from kiloq.engine import LLM
from kiloq.errors import ConfigError

from .answer_memory import AnswerMemory
from .bridge import EngineThread
from .errors import ApiError, Problem

# Names that clients of the reference's READMEs and of the cloud use; all mean the served model.
ALIASES = (
    "qwen-turbo",
    "qwen-plus",
    "qwen-max",
    "qwen-7b-chat",
    "qwen-14b-chat",
    "qwen-72b-chat",
    "Qwen",
    "gpt-3.5-turbo",
)

_ORIGIN = re.compile(r"https?://[^\s/?#*@]+")


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """Everything that `kiloq serve` can be told about its door, checked."""

    host: str = "127.0.0.1"
    port: int = 8000
    names: tuple[str, ...] = ()  # the first is shown; all are answered to
    adapters: tuple[tuple[str, Path], ...] = ()  # names and folders of LoRA adapters
    api_keys: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] = ()  # besides loopback's own, while there is no key
    max_body: int = 4 << 20  # bytes
    cors_origins: tuple[str, ...] = ()
    drain_seconds: float = 30.0
    log_format: Literal["text", "json", "none"] = "text"

    def __post_init__(self) -> None:
        if not 0 <= self.port < 1 << 16:
            raise ConfigError(f"--port is {self.port}; it must be between 0 (any free one) and 65,535.")
        if self.max_body < 1:
            raise ConfigError(f"--max-body is {self.max_body:,} bytes; it must be at least 1.")
        if not 0 <= self.drain_seconds < float("inf"):
            raise ConfigError(f"--drain-timeout is {self.drain_seconds}; it must be 0 or more seconds.")
        for origin in self.cors_origins:
            if not _ORIGIN.fullmatch(origin):
                raise ConfigError(
                    f"--cors-origin is {origin!r}; it must be an exact origin such as https://chat.example.com:8443."
                )
        names = (*self.names, *(name for name, _ in self.adapters))
        if not all(names):
            raise ConfigError("a model or an adapter has a name that is empty; clients could not ask for it.")
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ConfigError(f"the name {twice!r} is given twice; every model and adapter needs its own.")


@dataclass(frozen=True, kw_only=True)
class Service:
    """One served model."""

    llm: LLM
    engine: EngineThread
    config: ServeConfig
    adapters: tuple[str, ...] = ()
    created: int = 0  # unix time

    @property
    def name(self) -> str:
        return self.config.names[0]

    @cached_property
    def memory(self) -> AnswerMemory:
        """The ids of answers given before; as many as the engine's cache could hold keys of."""
        return AnswerMemory(self.llm.tokenizer, max_tokens=self.llm.engine.stats.blocks * BLOCK_SIZE)

    def adapter_of(self, model: str) -> str:
        """The adapter that a request's `model` names; "" is the model itself. ApiError 404 for an unknown name."""
        if model in self.adapters:
            return model
        if model in self.config.names or model in ALIASES:
            return ""
        known = ", ".join((*self.config.names, *self.adapters))
        raise ApiError(
            Problem(
                status=404,
                message=f"The model `{model:.100}` does not exist. Served here: {known}.",
                param="model",
                code="model_not_found",
            )
        )

"""What every route of the server is given: the model, its engine's thread, the names it answers to, the limits."""

from dataclasses import dataclass

from kiloq.engine import LLM

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


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """Everything that `kiloq serve` can be told, checked."""

    host: str = "127.0.0.1"
    port: int = 8000
    names: tuple[str, ...] = ()  # the first is shown; all are answered to
    api_keys: tuple[str, ...] = ()
    max_body: int = 4 << 20  # bytes
    cors_origins: tuple[str, ...] = ()
    drain_seconds: float = 30.0


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
                message=f"The model `{model}` does not exist. Served here: {known}.",
                param="model",
                code="model_not_found",
            )
        )

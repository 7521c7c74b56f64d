"""The few errors a person can cause. Each message says what was asked, what was found and what to do."""


class KiloqError(Exception):
    """A mistake that a person can mend; the command line prints it in one line and exits with 1."""


class RequestError(KiloqError):
    """A prompt, message or sampling parameter that cannot be served."""


class ConstraintError(RequestError):
    """A schema, expression or grammar that no answer can be held to."""


class ContextLengthError(RequestError):
    """A prompt, or prompt and answer together, longer than what can be served; `limit` is in tokens."""

    def __init__(self, message: str, *, limit: int) -> None:
        super().__init__(message)
        self.limit = limit


class CheckpointError(KiloqError):
    """A model folder or id that cannot be read: missing, damaged, unknown or contradictory files."""


class TokenizerError(KiloqError):
    """A vocabulary file that cannot be read, or text that the caller asked to refuse."""


class DataError(KiloqError):
    """Training or batch data with a fault; the message names file, line and field."""


class ConfigError(KiloqError):
    """A recipe, flag or configuration value that is unknown or out of range."""


class MissingExtraError(KiloqError):
    """An optional package that this feature needs and that is not installed."""


class NumericsError(KiloqError):
    """Not-a-number or infinite values where the arithmetic should be finite."""


class LostProcessError(KiloqError):
    """Another process of the run is gone, or does not answer."""

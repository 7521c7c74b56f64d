"""What a client is told when something goes wrong, in the shape of the API that it speaks. Knows no model."""

from dataclasses import dataclass

from kiloq.errors import ContextLengthError, KiloqError, RequestError

from .bridge import BusyError


@dataclass(frozen=True, kw_only=True)
class Problem:
    """An error as OpenAI describes one; `retry_after` is in seconds."""

    status: int
    message: str
    type: str = "invalid_request_error"
    param: str | None = None
    code: str | None = None
    retry_after: int | None = None

    def openai(self) -> dict[str, object]:
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


class ApiError(KiloqError):
    """An error that the HTTP layer itself finds: an unknown model, a bad key, a field that is not supported."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.message)
        self.problem = problem


def problem_of(error: Exception) -> Problem:
    """What to tell of an error; anything that is not a person's mistake becomes a 500 without details."""
    if isinstance(error, ApiError):
        return error.problem
    if isinstance(error, BusyError):
        return Problem(status=503, message=str(error), type="server_error", code="busy", retry_after=error.retry_after)
    if isinstance(error, ContextLengthError):
        message = f"This model's maximum context length is {error.limit:,} tokens. However, {error}"
        return Problem(status=400, message=message, param="messages", code="context_length_exceeded")
    if isinstance(error, RequestError):
        return Problem(status=400, message=str(error))
    return Problem(status=500, message="The server failed; its log says why.", type="server_error", code="internal")

"""What a client is told when something goes wrong, in the shape of the API that it speaks. Knows no model."""

import http
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response
from starlette.types import Scope

from kiloq.errors import ContextLengthError, KiloqError, RequestError

from .access_log import record_of
from .bridge import BusyError, RequestTimeoutError
from .worker import EngineError

DASHSCOPE = "/api/v1/"  # every path below it speaks DashScope, errors too

# Messages of RequestError begin with the field that is wrong: "messages[0].role is 'x'; ...", "messages: ...".
_FIELD = re.compile(r"([a-z]\w*(?:\[\d+\]|\.\w+)*)(?: (?:is|are|holds|has|names|cannot)\b|:)")
_NO_FIELDS = ("it", "this", "that", "there", "what", "one")
_DASHSCOPE_CODES = {  # those that its client has exceptions for
    401: "InvalidApiKey",
    403: "AccessDenied",
    429: "Throttling.RateQuota",
    503: "ServiceUnavailable",
    504: "GatewayTimeout",
}
_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
_STATUS_CODES = {404: "not_found", 405: "method_not_allowed"}  # of the framework's own errors


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

    def dashscope(self, request_id: str) -> dict[str, object]:
        code = "ModelNotFound" if self.code == "model_not_found" else _DASHSCOPE_CODES.get(self.status)
        code = code or ("InternalError" if self.status >= 500 else "InvalidParameter")
        return {"code": code, "message": self.message, "request_id": request_id}


class ApiError(KiloqError):
    """An error that the HTTP layer itself finds: an unknown model, a bad key, a field that is not supported."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.message)
        self.problem = problem


def problem_of(error: Exception) -> Problem:  # noqa: PLR0911  # one for each kind of error
    """What to tell of an error; anything that is not a person's mistake becomes a 500 without details."""
    match error:
        case ApiError():
            return error.problem
        case BusyError():
            wait = error.retry_after
            return Problem(status=503, message=str(error), type="server_error", code="busy", retry_after=wait)
        case RequestTimeoutError():
            return Problem(status=504, message=str(error), type="server_error", code="timeout")
        case EngineError():
            return Problem(status=500, message=str(error), type="server_error", code="engine_error")
        case ContextLengthError():
            message = f"This model's maximum context length is {error.limit} tokens. However, {error}"
            return Problem(status=400, message=message, param="messages", code="context_length_exceeded")
        case RequestError():
            return Problem(status=400, message=str(error), param=_field_of(str(error)))
        case RequestValidationError():
            return _field_problem(error)
        case HTTPException():
            return _framework_problem(error)
        case _:
            message = "The server failed; its log says why."
            return Problem(status=500, message=message, type="server_error", code="internal_error")


def error_response(problem: Problem, scope: Scope, headers: Mapping[str, str] | None = None) -> Response:
    """A problem in the shape of the API that the request's path belongs to."""
    known = dict(headers or {})
    if problem.retry_after is not None:
        known["Retry-After"] = str(problem.retry_after)
    if problem.status == 504:  # OpenAI's client would ask the same again, twice
        known["x-should-retry"] = "false"
    is_dashscope = scope["path"].startswith(DASHSCOPE)
    body = problem.dashscope(record_of(scope).id) if is_dashscope else problem.openai()
    return JSONResponse(body, problem.status, known)


def _field_of(message: str) -> str | None:
    match = _FIELD.match(message)
    return match[1] if match and match[1] not in _NO_FIELDS else None


def _framework_problem(error: HTTPException) -> Problem:
    status = error.status_code
    message = {404: "There is nothing at this path.", 405: "This path does not take this method."}.get(status)
    if status == 405 and error.headers and "Allow" in error.headers:
        message = f"This path does not take this method, but {error.headers['Allow']}."
    message = message or f"{error.detail or http.HTTPStatus(status).phrase}"
    kind = "server_error" if status >= 500 else _TYPES.get(status, "invalid_request_error")
    return Problem(status=status, message=message, type=kind, code=_STATUS_CODES.get(status))


def _field_problem(error: RequestValidationError) -> Problem:
    """All that is said of the first wrong field: a union complains once for each of its types."""
    found = [(_shown_path(one["loc"], error.body, is_missing=one["type"] == "missing"), one) for one in error.errors()]
    where, first = found[0]
    told = (one["msg"].removeprefix("Value error, ") for place, one in found if place == where)
    message = " or: ".join(dict.fromkeys(told))
    if first["type"] != "missing":
        message += f" (found {_kind(first['input'])})"
    return Problem(status=400, message=f"{where or 'the body'}: {message}.", param=where or None)


def _shown_path(location: Sequence[int | str], body: object, *, is_missing: bool) -> str:
    """The steps of a location that lead through the body, and what is missing there; others name types of a union."""
    if location[0] != "body":
        return str(location[-1])
    shown = ""
    for i, step in enumerate(location[1:], 2):
        if isinstance(step, int) and isinstance(body, list) and step < len(body):
            shown, body = f"{shown}[{step}]", body[step]
        elif isinstance(step, str) and isinstance(body, dict):
            if step in body:
                shown, body = f"{shown}.{step}", body[step]
            elif is_missing and i == len(location):
                shown = f"{shown}.{step}"
    return shown.removeprefix(".")


def _kind(value: object) -> str:
    """What was found, in JSON's words; text is never repeated, for it may be a prompt."""
    match value:
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case int() | float():
            return f"{value}"[:40]
        case str():
            return "a string"
        case Mapping():
            return "an object"
        case _:
            return "a list"

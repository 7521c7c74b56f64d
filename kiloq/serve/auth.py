"""Who may ask: API keys in constant time. Knows no users and no quotas."""

import hashlib
import hmac
import os
import stat
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from kiloq.errors import ConfigError

from .errors import Problem, error_response

VARIABLE = "KILOQ_API_KEY"


class KeyCheck:
    """Lets a request through if it brings one of the keys, or if its path is open."""

    def __init__(self, app: ASGIApp, keys: Sequence[str], is_open: Callable[[str], bool]) -> None:
        self._app = app
        self._digests = [_digest(key) for key in keys]
        self._is_open = is_open

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or self._is_open(scope["path"]):
            await self._app(scope, receive, send)
            return
        given = _given(Headers(scope=scope))
        if given is not None and self._knows(given):
            await self._app(scope, receive, send)
            return
        message = (
            "There is no API key; send the header `Authorization: Bearer KEY`."
            if given is None
            else "The API key is not one of this server's."
        )
        problem = Problem(status=401, message=message, type="authentication_error", code="invalid_api_key")
        await error_response(problem, scope, {"WWW-Authenticate": "Bearer"})(scope, receive, send)

    def _knows(self, given: str) -> bool:
        # Digests are equally long, and all keys are compared: time tells neither a key's length nor which one was near.
        digest = _digest(given)
        return sum([hmac.compare_digest(digest, known) for known in self._digests]) > 0


def gathered_keys(flags: Sequence[str], file: Path | None, environment: Mapping[str, str]) -> tuple[str, ...]:
    """All keys of a command line, a file (one a line, # comments) and KILOQ_API_KEY (commas between several)."""
    keys = [_checked(key, "--api-key") for key in flags]
    if file is not None:
        keys += _keys_of(file)
    keys += [_checked(key.strip(), VARIABLE) for key in environment.get(VARIABLE, "").split(",") if key.strip()]
    return tuple(dict.fromkeys(keys))


def readable_by_others(file: Path) -> bool:
    return os.name == "posix" and bool(file.stat().st_mode & (stat.S_IRGRP | stat.S_IROTH))


def _keys_of(file: Path) -> list[str]:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ConfigError(f"--api-key-file {file} cannot be read: {reason}.") from None
    keys = [_checked(line.strip(), str(file)) for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not keys:
        raise ConfigError(f"--api-key-file {file} holds no key; write one a line.")
    return keys


def _checked(key: str, source: str) -> str:
    # The key itself stays out of the message: it would end up in a log.
    if not key or not all("!" <= character <= "~" for character in key):
        raise ConfigError(
            f"{source} holds a key that is empty or not plain ASCII without blanks; no header can carry it."
        )
    return key


def _given(headers: Headers) -> str | None:
    scheme, _, key = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and key.strip():
        return key.strip()
    return headers.get("x-api-key")


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("latin-1", "replace")).digest()

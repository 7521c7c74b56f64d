"""Prompts as completions, embeddings and /tokenize take them: text or token ids, one or many. Knows no HTTP.

They are read by hand: a union of four lists makes pydantic try each on a million ids, and name none in its error.
"""

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

from pydantic.config import JsonDict

from kiloq.errors import ConstraintError, ContextLengthError
from kiloq.tokenizer import Tokenizer

from .errors import ApiError, Problem, problem_of

MAX_PROMPTS = 2048  # OpenAI's bound on the inputs of one request
_LONG = 20_000  # characters or ids that take a millisecond or more, so not on the event loop

_IDS: JsonDict = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
PROMPTS_SCHEMA: JsonDict = {
    "description": "Text, a list of texts, token ids, or a list of lists of token ids.",
    "oneOf": [
        {"type": "string", "minLength": 1},
        {"type": "array", "items": {"type": "string", "minLength": 1}, "minItems": 1, "maxItems": MAX_PROMPTS},
        _IDS,
        {"type": "array", "items": _IDS, "minItems": 1, "maxItems": MAX_PROMPTS},
    ],
}


@dataclass(frozen=True, slots=True)
class Prompt:
    """Token ids, and the text that they were made of, if they were."""

    ids: tuple[int, ...]
    text: str | None = None


async def read_prompts(raw: object, field: str, tokenizer: Tokenizer, vocab_size: int) -> list[Prompt]:
    """All prompts of a request's `field`; a mistake is told with its place. Names of control tokens are plain text."""
    read = partial(_read, raw, field, tokenizer, vocab_size)
    return read() if _size(raw) < _LONG else await asyncio.to_thread(read)


def refuse(field: str, message: str) -> ApiError:
    """A 400 that names the field."""
    return ApiError(Problem(status=400, message=message, param=field))


@contextmanager
def told_of(field: str, held_by: str = "") -> Iterator[None]:
    """A prompt that is too long is a mistake in this field; a form that no answer can be held to, in `held_by`."""
    try:
        yield
    except ContextLengthError as error:
        raise ApiError(replace(problem_of(error), param=field)) from error
    except ConstraintError as error:
        raise refuse(held_by, f"{held_by}: {error}") from error


def kind_of(value: object) -> str:
    """What stands where something else should, in JSON's words."""
    names = {"NoneType": "missing", "bool": "true or false", "str": "text", "dict": "an object", "list": "a list"}
    return names.get(type(value).__name__, f"of type {type(value).__name__}")


def check_ids(raw: Sequence[object], field: str, vocab_size: int) -> tuple[int, ...]:
    """Token ids that the model has a row for."""
    for i, token_id in enumerate(raw):
        if not isinstance(token_id, int) or isinstance(token_id, bool):
            raise refuse(field, f"{field}[{i}] is {kind_of(token_id)}; it must be a token id.")
        if not 0 <= token_id < vocab_size:
            shown = token_id if abs(token_id) < 2**64 else f"a number of {token_id.bit_length():,} bits"
            raise refuse(field, f"{field}[{i}] is {shown}; the model has token ids 0 to {vocab_size - 1:,}.")
    return tuple(token_id for token_id in raw if isinstance(token_id, int))


def encode(text: str, field: str, tokenizer: Tokenizer) -> Prompt:
    """One text as it stands."""
    if not text:
        raise refuse(field, f"{field} is empty; give at least one character.")
    return Prompt(tuple(tokenizer.encode(text)), text)


def _read(raw: object, field: str, tokenizer: Tokenizer, vocab_size: int) -> list[Prompt]:
    if isinstance(raw, str):
        return [encode(raw, field, tokenizer)]
    if not isinstance(raw, list):
        raise refuse(field, f"{field} is {kind_of(raw)}; it must be text, token ids, or a list of either.")
    if not raw:
        raise refuse(field, f"{field} is an empty list; give at least one text or token id.")
    if isinstance(raw[0], int):
        return [Prompt(check_ids(raw, field, vocab_size))]
    if len(raw) > MAX_PROMPTS:
        raise refuse(field, f"{field} holds {len(raw):,} prompts; one request may bring {MAX_PROMPTS:,}.")
    return [_one(item, f"{field}[{i}]", tokenizer, vocab_size) for i, item in enumerate(raw)]


def _one(raw: object, where: str, tokenizer: Tokenizer, vocab_size: int) -> Prompt:
    if isinstance(raw, str):
        return encode(raw, where, tokenizer)
    if isinstance(raw, list) and raw:
        return Prompt(check_ids(raw, where, vocab_size))
    found = "an empty list" if isinstance(raw, list) else kind_of(raw)
    raise refuse(where, f"{where} is {found}; it must be text or a list of token ids.")


def _size(raw: object) -> int:
    if isinstance(raw, str):
        return len(raw)
    return sum(len(item) if isinstance(item, str | list) else 1 for item in raw) if isinstance(raw, list) else 0

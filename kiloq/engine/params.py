"""What one request asks of the sampler and when it ends. Knows nothing of tensors, text or models; imports no torch."""

import dataclasses
import difflib
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

from kiloq.errors import RequestError

_INT64 = 2**63
_MAX_CHOICES = 128  # the bounds of the OpenAI API, which every door shares
_MAX_LOGPROBS = 20
_MAX_SOURCE = 500_000  # characters of a constraint
_SPECULATION = ("auto", "none", "prompt-lookup", "draft")
_CONSTRAINTS = ("json_schema", "json_object", "regex", "choice", "lark")
_RANGES: dict[str, tuple[float, float | None]] = {
    "temperature": (0, None),
    "top_p": (0, 1),
    "min_p": (0, 1),
    "repetition_penalty": (1e-3, 10**9),  # as in a model's own defaults; fp32 divides by it
    "presence_penalty": (-2, 2),
    "frequency_penalty": (-2, 2),
}

ConstraintKind = Literal["json_schema", "json_object", "regex", "choice", "lark"]


@dataclass(frozen=True, slots=True)
class Constraint:
    """What an answer must look like. `source` is a JSON schema, a regular expression, a JSON list of texts to choose
    from, or a grammar in llguidance's dialect of Lark; empty for "json_object".
    """

    kind: ConstraintKind
    source: str = ""

    def __post_init__(self) -> None:
        if self.kind not in _CONSTRAINTS:
            raise RequestError(f"constraint is of kind {self.kind!r}; it must be one of {', '.join(_CONSTRAINTS)}.")
        if not isinstance(self.source, str):
            raise RequestError(f"the source of a {self.kind} constraint is {self.source!r:.80}; it must be text.")
        if len(self.source) > _MAX_SOURCE:
            length = f"{len(self.source):,} characters"
            raise RequestError(f"the source of a {self.kind} constraint has {length}; at most {_MAX_SOURCE:,} can be.")
        if self.kind in ("choice", "json_schema"):
            _check_json(self.kind, self.source)


class SamplingDefaults(Protocol):
    """The part of a model's generation defaults that concerns sampling."""

    @property
    def max_tokens(self) -> int | None: ...
    @property
    def temperature(self) -> float: ...
    @property
    def top_k(self) -> int: ...
    @property
    def top_p(self) -> float: ...
    @property
    def repetition_penalty(self) -> float: ...


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """One request's wishes, checked once. `temperature` 0 is greedy; `top_k` 0 and `top_p` 1 switch the filters off.

    `stop_ids` end the text besides the model's own stop ids; `ignore_eos` switches off only the model's own.
    `logprobs` is the number of alternatives per token (0: the chosen token alone, None: nothing).
    """

    max_tokens: int | None = None
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)
    seed: int | None = None
    n: int = 1
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    skip_special: bool = True
    constraint: Constraint | None = None
    speculation: str = "auto"  # the engine's choice; it changes the speed, never the tokens' distribution

    def __post_init__(self) -> None:
        for name in ("stop", "stop_ids"):
            object.__setattr__(self, name, _as_tuple(name, getattr(self, name)))
        for name, (low, high) in _RANGES.items():
            object.__setattr__(self, name, _as_float(name, getattr(self, name), low, high))
        object.__setattr__(self, "logit_bias", _as_bias("logit_bias", self.logit_bias))
        self._check_numbers()
        self._check_collections()

    @classmethod
    def for_model(cls, generation: SamplingDefaults, **overrides: object) -> "SamplingParams":
        """The model's own defaults, with what the caller gives on top; an unknown name is an error."""
        known = {item.name for item in dataclasses.fields(cls)}
        for name in overrides:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f" Did you mean '{near[0]}'?" if near else f" Known: {', '.join(sorted(known))}."
                raise RequestError(f"'{name}' is not a sampling parameter.{hint}")
        own: dict[str, object] = {
            "max_tokens": generation.max_tokens,
            "temperature": generation.temperature,
            "top_k": generation.top_k,
            "top_p": generation.top_p,
            "repetition_penalty": generation.repetition_penalty,
        }
        return cls(**{**own, **overrides})  # type: ignore[arg-type]  # __post_init__ checks every type

    @property
    def is_greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature == 0

    @property
    def has_penalties(self) -> bool:
        """Whether tokens already seen change the scores."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0

    @property
    def has_filters(self) -> bool:
        """Whether some tokens are left out before drawing."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0

    def _check_numbers(self) -> None:
        _check_int("max_tokens", self.max_tokens, 1, None, optional=True)
        _check_int("top_k", self.top_k, 0, None)
        _check_int("seed", self.seed, -_INT64, _INT64 - 1, optional=True)
        _check_int("n", self.n, 1, _MAX_CHOICES)
        _check_int("logprobs", self.logprobs, 0, _MAX_LOGPROBS, optional=True)
        if self.speculation not in _SPECULATION:
            raise RequestError(f"speculation is {self.speculation!r}; it must be one of {', '.join(_SPECULATION)}.")
        for name in ("ignore_eos", "skip_special"):
            if not isinstance(getattr(self, name), bool):
                raise RequestError(f"{name} is {getattr(self, name)!r}; it must be true or false.")

    def _check_collections(self) -> None:
        if self.constraint is not None and not isinstance(self.constraint, Constraint):
            raise RequestError(f"constraint is {self.constraint!r:.80}; it must be a Constraint.")
        for text in self.stop:
            if not text or not _is_text(text):
                raise RequestError(f"stop holds {text!r}; each stop string must be text of at least one character.")
        for token_id in self.stop_ids:
            _check_int("stop_ids", token_id, 0, None)


def _check_json(kind: str, source: str) -> None:
    """That a constraint's source is the JSON that its kind wants."""
    try:
        read = json.loads(source)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the source of a {kind} constraint is not JSON: {error}.") from error
    if kind == "choice" and not (isinstance(read, list) and read and all(isinstance(text, str) for text in read)):
        raise RequestError("the source of a choice constraint must be a list of at least one text.")
    if kind == "json_schema" and not isinstance(read, dict | bool):
        raise RequestError("the source of a json_schema constraint must be a JSON object, or true.")


def _as_tuple(name: str, value: object) -> tuple[object, ...]:
    if isinstance(value, str):  # one stop string, as the OpenAI API allows
        return (value,)
    if isinstance(value, list | tuple | set | frozenset):
        return tuple(value)
    raise RequestError(f"{name} is {value!r}; it must be a list.")


def _as_bias(name: str, value: object) -> dict[object, float]:
    if not isinstance(value, Mapping):
        raise RequestError(f"{name} is {value!r}; it must map token ids to numbers.")
    for token_id in value:
        _check_int(name, token_id, 0, None)
    return {token_id: _as_float(f"{name}[{token_id}]", bias, -100, 100) for token_id, bias in value.items()}


def _as_float(name: str, value: object, low: float, high: float | None) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise RequestError(f"{name} is {value!r}; it must be a finite number.")
    if not abs(value) <= sys.float_info.max:  # NaN too; a whole number may be too long to be shown
        shown = value if isinstance(value, float) else f"a number of {value.bit_length():,} bits"
        raise RequestError(f"{name} is {shown}; it must be a finite number.")
    _check_range(name, float(value), low, high)
    return float(value)


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _check_int(name: str, value: object, low: int, high: int | None, *, optional: bool = False) -> None:
    if optional and value is None:
        return
    if not isinstance(value, int) or isinstance(value, bool):
        raise RequestError(f"{name} is {value!r}; it must be a whole number.")
    if abs(value) > _INT64:  # and perhaps too long to be shown
        raise RequestError(f"{name} is a number of {value.bit_length():,} bits; it must fit into 64 bits.")
    _check_range(name, value, low, high)


def _check_range(name: str, value: float, low: float, high: float | None) -> None:
    if value < low or (high is not None and value > high):
        limit = f"at least {low:,}" if high is None else f"between {low:,} and {high:,}"
        raise RequestError(f"{name} is {value:,}; it must be {limit}.")

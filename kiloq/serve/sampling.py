"""Sampling fields as clients write them, OpenAI's and the usual extensions, and what they mean to the engine.

Knows no route: chat completions, completions and responses inherit the fields. null is the same as not given.
"""

import json
import re
from typing import Annotated, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints

from kiloq.engine import SamplingParams
from kiloq.engine.params import Constraint, ConstraintKind, SamplingDefaults
from kiloq.errors import RequestError

_PLAIN_NAME = re.compile(r"[\w.-]{1,64}", re.ASCII)
_MAX_NAMES = 20
_GUIDES = {"json_schema": "guided_json", "regex": "guided_regex", "choice": "guided_choice", "lark": "guided_grammar"}


def _listed(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _as_json_text(value: object) -> object:
    return value if value is None or isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _by_token_id(value: object) -> object:
    if not isinstance(value, dict):
        return value
    try:
        return {int(name): bias for name, bias in value.items()}
    except ValueError:
        raise ValueError("the keys must be token ids") from None


Words = Annotated[
    list[Annotated[str, StringConstraints(min_length=1)]],
    BeforeValidator(_listed, json_schema_input_type=str | list[str]),
]
JsonText = Annotated[str, BeforeValidator(_as_json_text, json_schema_input_type=str | dict[str, object])]
TokenBias = Annotated[
    dict[Annotated[int, Field(ge=0)], Annotated[float, Field(ge=-100, le=100)]],
    BeforeValidator(_by_token_id, json_schema_input_type=dict[str, float]),
]


class SamplingFields(BaseModel):
    """What a request may say of sampling. Fields that nobody knows are kept apart and named to the client."""

    # Strict: the text "1" is not a number. The bounds are those of OpenAI's specification.
    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False, protected_namespaces=())

    # Documented by OpenAI, and without a meaning where one model runs on one machine.
    NO_OPS: ClassVar[frozenset[str]] = frozenset(
        {
            "metadata",
            "prompt_cache_key",
            "prompt_cache_retention",
            "safety_identifier",
            "service_tier",
            "store",
            "user",
            "verbosity",
        }
    )

    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, description="Extension; 0 or -1: off.")] | None = None
    min_p: Annotated[float, Field(ge=0, le=1, description="Extension.")] | None = None
    repetition_penalty: Annotated[float, Field(ge=1e-3, le=1e9, description="Extension; 1: off.")] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: Annotated[TokenBias, Field(description="Token ids and what is added to their logits.")] | None = None
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    stop: Annotated[Words, Field(max_length=4)] | None = None
    stop_token_ids: Annotated[list[Annotated[int, Field(ge=0)]], Field(description="Extension.")] | None = None
    ignore_eos: Annotated[bool, Field(description="Extension: go on where the model would end.")] | None = None
    guided_json: Annotated[JsonText, Field(description="Extension: a JSON schema for the answer.")] | None = None
    guided_regex: Annotated[str, Field(description="Extension: an expression that the answer matches.")] | None = None
    guided_choice: (
        Annotated[list[str], Field(min_length=1, description="Extension: the answers to choose from.")] | None
    ) = None
    guided_grammar: Annotated[str, Field(description="Extension: a Lark grammar of the answer.")] | None = None
    speculation: (
        Annotated[Literal["auto", "none", "prompt-lookup", "draft"], Field(description="Extension: speed only.")] | None
    ) = None

    @property
    def held_by(self) -> str:
        """The field that says what the answer must look like; empty if none does."""
        return next((name for name in _GUIDES.values() if getattr(self, name) is not None), "")

    def ignored(self) -> dict[str, str]:
        """A header that names the fields nobody knows; empty if there are none."""
        unknown = [name for name in self.model_extra or {} if name not in self.NO_OPS]
        # Names come from the network: only those that cannot break a header are repeated.
        shown = [name for name in unknown if _PLAIN_NAME.fullmatch(name)][:_MAX_NAMES]
        return {"x-kiloq-ignored": ", ".join(shown) or "some"} if unknown else {}


def sampling_params(
    fields: SamplingFields, generation: SamplingDefaults, *, max_tokens: int | None, logprobs: int | None = None
) -> SamplingParams:
    """The model's defaults with the request's fields on top; `max_tokens` None: as long as the context allows."""
    given: dict[str, object] = {
        "temperature": fields.temperature,
        "top_p": fields.top_p,
        "top_k": None if fields.top_k is None else max(fields.top_k, 0),
        "min_p": fields.min_p,
        "repetition_penalty": fields.repetition_penalty,
        "presence_penalty": fields.presence_penalty,
        "frequency_penalty": fields.frequency_penalty,
        "logit_bias": fields.logit_bias,
        "seed": fields.seed,
        "n": fields.n,
        "stop": fields.stop,
        "stop_ids": fields.stop_token_ids,
        "ignore_eos": fields.ignore_eos,
        "constraint": _constraint(fields),
        "speculation": fields.speculation,
    }
    given = {name: value for name, value in given.items() if value is not None}
    return SamplingParams.for_model(generation, **{**given, "max_tokens": max_tokens, "logprobs": logprobs})


def _constraint(fields: SamplingFields) -> Constraint | None:
    choices = None if fields.guided_choice is None else json.dumps(fields.guided_choice, ensure_ascii=False)
    sources: dict[ConstraintKind, str | None] = {
        "json_schema": fields.guided_json,
        "regex": fields.guided_regex,
        "choice": choices,
        "lark": fields.guided_grammar,
    }
    given = [Constraint(kind, source) for kind, source in sources.items() if source is not None]
    if len(given) > 1:
        names = [_GUIDES[one.kind] for one in given]
        raise RequestError(f"{names[0]} is given beside {names[1]}; an answer can be held to one of them.")
    return given[0] if given else None

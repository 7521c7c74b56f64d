"""DashScope's requests as clients write them, and the task that they mean. Knows no route and no engine."""

from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator
from pydantic.json_schema import SkipJsonSchema

from kiloq.checkpoint import GenerationDefaults
from kiloq.errors import RequestError
from kiloq.tokenizer import Tokenizer

from .dialogue import ChatTask
from .openai_chat_request import ChatRequest, JsonObject
from .prompts import MAX_PROMPTS

_SEED = 1234  # what the cloud takes if a request gives none: the same request has the same answer


def _listed(value: object) -> object:
    return [value] if isinstance(value, str | int) else value


TokenId = Annotated[int, Field(ge=0)]
Stop = Annotated[
    list[Annotated[str, Field(min_length=1)]] | list[TokenId] | list[Annotated[list[TokenId], Field(min_length=1)]],
    BeforeValidator(_listed, json_schema_input_type=str | int | list[str] | list[int] | list[list[int]]),
    Field(description="Texts, token ids, or runs of token ids."),
]


class Round(BaseModel):
    """One question and its answer, as the first version of the API wrote a conversation."""

    user: str = ""
    bot: str = ""


class Input(BaseModel):
    """A conversation: `messages`, or a `prompt` that may follow a `history`."""

    messages: list[JsonObject] | None = None
    prompt: str | None = None
    history: list[Round] | None = None

    def turns(self) -> list[JsonObject]:
        """Every turn of it, whichever way it was written."""
        turns = [_as_openai(message) for message in self.messages or ()]
        for one in self.history or ():
            turns += [{"role": "user", "content": one.user}, {"role": "assistant", "content": one.bot}]
        if self.prompt:
            turns.append({"role": "user", "content": self.prompt})
        if not turns:
            raise RequestError("input has neither messages nor prompt; one of them is needed.")
        return turns


class Parameters(ChatRequest):
    """How to answer: OpenAI's fields where the two APIs have the same, and DashScope's own.

    Parameters that only the cloud's services understand are ignored, and named in the header x-kiloq-ignored.
    """

    # The conversation stands beside the parameters, and whether to stream in a header.
    model: SkipJsonSchema[str] = ""
    messages: SkipJsonSchema[list[JsonObject]] = Field(default_factory=list)
    stream: SkipJsonSchema[bool | None] = None

    result_format: Annotated[
        Literal["text", "message"] | None, Field(description="text, unless only message can show the answer.")
    ] = None
    incremental_output: Annotated[bool | None, Field(description="Events carry only what is new.")] = None
    seed: Annotated[int | None, Field(ge=0, lt=2**64, description="1234 if none is given.")] = None
    stop: Annotated[Stop | None, Field(max_length=16)] = None  # type: ignore[assignment]  # more than OpenAI's
    thinking_budget: Annotated[int | None, Field(ge=0, description="Not supported.")] = None
    enable_search: Annotated[bool | None, Field(description="Not supported.")] = None

    @field_validator("enable_search", "thinking_budget")
    @classmethod
    def _leave_out(cls, value: bool | int | None) -> bool | int | None:
        if value:
            raise ValueError("this is not supported here; leave it out")
        return value

    def as_message(self, *, thinks: bool) -> bool:
        """Whether the answer comes as choices with messages; a text has no room for some of what may be asked."""
        asked = {"tools": self.tools or self.functions, "n above 1": (self.n or 1) > 1, "logprobs": self.logprobs}
        needs = [name for name, is_asked in asked.items() if is_asked]
        if needs and self.result_format == "text":
            raise RequestError(f"result_format is 'text', which cannot show {needs[0]}. Set it to 'message'.")
        return bool(needs) or (self.result_format or ("message" if thinks else "text")) == "message"


class GenerationRequest(BaseModel):
    """A request for an answer."""

    model_config = ConfigDict(protected_namespaces=())

    model: str
    input: Input
    parameters: Parameters = Field(default_factory=Parameters)

    def task(self, generation: GenerationDefaults, tokenizer: Tokenizer, *, adapter: str) -> ChatTask:
        """What is to be done; the engine knows runs of token ids only as text, and seeds only with a sign."""
        fields = self.parameters
        stop = fields.stop or []
        seed = _SEED if fields.seed is None else fields.seed
        own = {
            "messages": self.input.turns(),
            "seed": seed if seed < 2**63 else seed - 2**64,
            "stop": [
                one if isinstance(one, str) else tokenizer.decode(one) for one in stop if not isinstance(one, int)
            ],
            "stop_token_ids": [*(fields.stop_token_ids or ()), *(one for one in stop if isinstance(one, int))],
        }
        return fields.model_copy(update=own).task(generation, adapter=adapter)


class TokenizeRequest(BaseModel):
    """A text, or a conversation, to be counted."""

    model_config = ConfigDict(protected_namespaces=())

    model: str
    input: Input


class Texts(BaseModel):
    """What is to become vectors."""

    texts: Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS)]


class EmbeddingParameters(BaseModel):
    """How; whether a text is a query or a document (`text_type`) makes no difference to this model."""

    dimension: Annotated[int | None, Field(ge=1, description="Only the model's own.")] = None
    output_type: Literal["dense"] | None = None
    instruct: Annotated[str | None, Field(max_length=0, description="Not supported.")] = None


class EmbeddingRequest(BaseModel):
    """Texts to be made vectors of."""

    model_config = ConfigDict(protected_namespaces=())

    model: str
    input: Texts
    parameters: EmbeddingParameters = Field(default_factory=EmbeddingParameters)


def _as_openai(message: JsonObject) -> JsonObject:
    """The API's parts of content have no type: {"text": ...} is text."""
    if message.get("partial"):
        raise RequestError("partial is true in a message, but begun answers are not continued here. Leave it out.")
    content = message.get("content")
    if not isinstance(content, list):
        return message
    typed = [{"type": "text", **one} if isinstance(one, dict) and "text" in one else one for one in content]
    return {**message, "content": typed}

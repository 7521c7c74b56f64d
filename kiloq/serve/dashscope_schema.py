"""DashScope's requests as clients write them, and what they ask of a dialogue. Knows no route and no engine."""

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator

from kiloq.chat import Message, Tool, parse_messages, parse_tools
from kiloq.engine.params import SamplingDefaults, SamplingParams
from kiloq.errors import RequestError
from kiloq.tokenizer import Tokenizer

from .dialogue import ToolChoice
from .sampling import SamplingFields, sampling_params

_SEED = 1234  # what the cloud takes if a request gives none: the same request has the same answer


def _listed(value: object) -> object:
    return [value] if isinstance(value, str | int) else value


TokenId = Annotated[int, Field(ge=0)]
Stop = Annotated[
    list[Annotated[str, Field(min_length=1)]] | list[TokenId] | list[Annotated[list[TokenId], Field(min_length=1)]],
    BeforeValidator(_listed, json_schema_input_type=str | int | list[str] | list[int] | list[list[int]]),
]


class Round(BaseModel):
    """One question and its answer, as the first version of the API wrote a conversation."""

    user: str = ""
    bot: str = ""


class Input(BaseModel):
    """A conversation: `messages`, or a `prompt` that may follow a `history`."""

    messages: list[dict[str, object]] | None = None
    prompt: str | None = None
    history: list[Round] | None = None

    def conversation(self) -> tuple[Message, ...]:
        """Every turn of it, whichever way it was written."""
        turns: list[Mapping[str, object]] = [_as_parts(message) for message in self.messages or ()]
        for one in self.history or ():
            turns += [{"role": "user", "content": one.user}, {"role": "assistant", "content": one.bot}]
        if self.prompt:
            turns.append({"role": "user", "content": self.prompt})
        if not turns:
            raise RequestError("input has neither messages nor prompt; one of them is needed.")
        return parse_messages(turns)


class Parameters(SamplingFields):
    """How to answer. Parameters that only the cloud's services understand are ignored, as the cloud does."""

    result_format: Annotated[
        Literal["text", "message"] | None, Field(description="text unless tools, n or thoughts need message.")
    ] = None
    seed: Annotated[int, Field(ge=0, lt=2**64)] | None = None
    stop: Annotated[Stop, Field(max_length=16, description="Texts, token ids, or runs of token ids.")] | None = None  # type: ignore[assignment]  # more than OpenAI's
    incremental_output: Annotated[bool | None, Field(description="Events carry only what is new.")] = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    tools: list[dict[str, object]] | None = None
    tool_choice: str | dict[str, object] | None = None
    parallel_tool_calls: bool | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: dict[str, object] | None = None
    enable_thinking: bool | None = None
    thinking_budget: Annotated[int, Field(ge=0)] | None = None
    enable_search: bool | None = None

    @field_validator("enable_search", "thinking_budget")
    @classmethod
    def _leave_out(cls, value: bool | int | None) -> bool | int | None:
        if value:
            raise ValueError("this is not supported here; leave it out")
        return value

    def params(self, generation: SamplingDefaults, tokenizer: Tokenizer) -> SamplingParams:
        """What they ask of the engine, which knows runs of token ids only as text, and seeds only with a sign."""
        stop = self.stop or []
        words = [one if isinstance(one, str) else tokenizer.decode(one) for one in stop if not isinstance(one, int)]
        ids = [one for one in stop if isinstance(one, int)]
        seed = _SEED if self.seed is None else self.seed
        fields = {"seed": seed if seed < 2**63 else seed - 2**64, "stop": words, "stop_token_ids": ids}
        return sampling_params(self.model_copy(update=fields), generation, max_tokens=self.max_tokens)

    def as_message(self, *, thinks: bool) -> bool:
        """Whether the answer comes as choices with messages, which tool calls and several answers need."""
        needs = "tools" if self.tools else "n" if (self.n or 1) > 1 else ""
        if needs and self.result_format == "text":
            raise RequestError(f"result_format is 'text', which cannot show {needs}; set it to 'message'.")
        return bool(needs) or (self.result_format or ("message" if thinks else "text")) == "message"

    def known_tools(self) -> tuple[Tool, ...]:
        return parse_tools(self.tools)

    def choice_of_tools(self) -> ToolChoice:
        """`auto`, `none`, `required`, or one function by its name."""
        match self.tool_choice:
            case None | "auto":
                return ToolChoice()
            case "none" | "required" as mode:
                return ToolChoice(mode)
            case {"type": "function", "function": {"name": str(name)}}:
                return ToolChoice("required", (name,))
        raise RequestError(f"tool_choice is {self.tool_choice!r:.200}; it must be auto, none, required or a function.")


class GenerationRequest(BaseModel):
    """A request for an answer."""

    model_config = ConfigDict(protected_namespaces=())

    model: str
    input: Input
    parameters: Parameters = Field(default_factory=Parameters)


def _as_parts(message: dict[str, object]) -> dict[str, object]:
    """The API's parts of content have no type: {"text": ...} is text."""
    content = message.get("content")
    if not isinstance(content, list):
        return message
    typed = [{"type": "text", **one} if isinstance(one, dict) and "text" in one else one for one in content]
    return {**message, "content": typed}


class TokenizeRequest(BaseModel):
    """A text, or a conversation, to be counted."""

    model_config = ConfigDict(protected_namespaces=())

    model: str
    input: Input

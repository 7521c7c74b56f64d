"""What a client may ask of /v1/chat/completions, field by field, and the task that it means. Knows no model."""

import json
from typing import Annotated, ClassVar, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)

from kiloq.chat import Message, Tool, parse_messages, parse_tools
from kiloq.checkpoint import GenerationDefaults
from kiloq.engine.params import Constraint
from kiloq.errors import RequestError

from .dialogue import ChatTask, ToolChoice
from .sampling import SamplingFields, sampling_params

JsonObject = dict[str, object]

# Documented by OpenAI, and without them the answer would not be what was asked for.
_UNSUPPORTED = ("audio", "prediction", "web_search_options")


class _Part(BaseModel):
    """A part of a request; strict, and open to fields of later versions."""

    model_config = ConfigDict(strict=True, extra="allow")


class StreamOptions(_Part):
    """What a stream tells besides the answer."""

    include_usage: bool | None = None
    continuous_usage_stats: Annotated[bool, Field(description="Extension: usage with every chunk.")] | None = None


class TemplateOptions(_Part):
    """What the model's own chat template could be told."""

    enable_thinking: bool | None = None


class FunctionName(_Part):
    """A function by its name."""

    name: str


class NamedTool(_Part):
    """The tool that must be called."""

    type: Literal["function"]
    function: FunctionName


class AllowedTools(_Part):
    """The tools that may, or one of which must, be called."""

    mode: Literal["auto", "required"]
    tools: list[NamedTool]


class AllowedToolChoice(_Part):
    """OpenAI's way to narrow the tools without changing the prompt."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


class SchemaFormat(_Part):
    """A JSON schema with a name."""

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    schema_: Annotated[JsonObject | None, Field(alias="schema")] = None
    strict: bool | None = None


class ResponseFormat(_Part):
    """What the answer's content must be."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: SchemaFormat | None = None

    @model_validator(mode="after")
    def _has_schema(self) -> "ResponseFormat":
        if self.type == "json_schema" and self.json_schema is None:
            raise ValueError("json_schema is missing; a format of this type needs it")
        return self


Choice = Literal["none", "auto", "required"] | NamedTool | AllowedToolChoice
LegacyChoice = Literal["none", "auto"] | FunctionName


def _only(value: object, read: ValidatorFunctionWrapHandler) -> object:
    try:
        return read(value)
    except ValidationError:  # one line for each form that it has not
        raise ValueError("it must be one of the words, or an object, that OpenAI's API knows here") from None


class ChatRequest(SamplingFields):
    """A conversation to be answered. Unknown fields are ignored, and named in the header x-kiloq-ignored."""

    NO_OPS: ClassVar[frozenset[str]] = SamplingFields.NO_OPS | {"modalities", "moderation"}

    model: str
    messages: Annotated[list[JsonObject], Field(min_length=1)]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1, description="The older name of max_completion_tokens.")] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[JsonObject], Field(max_length=128)] | None = None
    tool_choice: Annotated[Choice, WrapValidator(_only)] | None = None
    parallel_tool_calls: bool | None = None
    functions: Annotated[list[JsonObject], Field(max_length=128, description="The older form of tools.")] | None = None
    function_call: Annotated[LegacyChoice, WrapValidator(_only)] | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    enable_thinking: Annotated[bool, Field(description="Extension: thoughts of Qwen3 on or off.")] | None = None
    chat_template_kwargs: Annotated[TemplateOptions, Field(description="Extension.")] | None = None

    @property
    def is_legacy(self) -> bool:
        """Whether the client knows functions only, the older name of tools."""
        return bool(self.functions)

    @property
    def is_named(self) -> bool:
        """Whether one function must be called, and which: calling it is then no decision of the model."""
        return isinstance(self.function_call if self.is_legacy else self.tool_choice, NamedTool | FunctionName)

    def task(self, generation: GenerationDefaults, *, adapter: str) -> ChatTask:
        """What is to be done; an error names the field that is wrong."""
        self._refuse_unsupported()
        if self.top_logprobs and not self.logprobs:
            raise RequestError("top_logprobs is given, but logprobs is not true. Set it, or leave both out.")
        if self.stream_options and not self.stream:
            raise RequestError("stream_options is given, but stream is not true. Set it, or leave it out.")
        messages, tools = self._conversation()
        return ChatTask(
            messages=messages,
            params=sampling_params(
                self,
                generation,
                max_tokens=self.max_completion_tokens or self.max_tokens,
                logprobs=(self.top_logprobs or 0) if self.logprobs else None,
            ),
            tools=tools,
            tool_choice=self._tool_choice({tool.name for tool in tools}),
            parallel_calls=self.parallel_tool_calls is not False and not self.is_legacy,
            thinking=self._thinking(),
            content=self._content(),
            adapter=adapter,
        )

    @property
    def held_by(self) -> str:
        """The field that says what the answer must look like; tools beside it are read leniently."""
        form = "" if self._content() is None else "response_format"
        return super().held_by or form or ("functions" if self.is_legacy else "tools")

    def _refuse_unsupported(self) -> None:
        extra = self.model_extra or {}
        for name in _UNSUPPORTED:
            if extra.get(name) is not None:
                raise RequestError(f"{name} is given, but it is not supported here. Leave it out.")
        if extra.get("modalities") not in (None, ["text"]):
            raise RequestError('modalities is given, but only ["text"] is supported here.')

    def _conversation(self) -> tuple[tuple[Message, ...], tuple[Tool, ...]]:
        if self.tools and self.functions:
            raise RequestError("functions is given beside tools, whose older form it is. Give one of them.")
        tools = parse_tools(self.functions, "functions") if self.is_legacy else parse_tools(self.tools)
        return parse_messages(self.messages), tools

    def _tool_choice(self, known: set[str]) -> ToolChoice:
        given = self.function_call if self.is_legacy else self.tool_choice
        name = "function_call" if self.is_legacy else "tool_choice"
        match given:
            case None:
                return ToolChoice()
            case "none" | "auto" | "required":
                choice = ToolChoice(given)
            case AllowedToolChoice():
                allowed = given.allowed_tools
                choice = ToolChoice(allowed.mode, tuple(tool.function.name for tool in allowed.tools))
            case NamedTool():
                choice = ToolChoice("required", (given.function.name,))
            case FunctionName():
                choice = ToolChoice("required", (given.name,))
        if choice.mode == "required" and not known:
            raise RequestError(f"{name} is given, but there are no tools to call. Give tools, or leave it out.")
        if unknown := [one for one in choice.names if one not in known]:
            raise RequestError(f"{name} is {unknown[0]!r}, which is none of the tools given.")
        return choice

    def _thinking(self) -> bool | None:
        template = self.chat_template_kwargs
        if template is not None and template.enable_thinking is not None:
            return template.enable_thinking
        if self.enable_thinking is not None:
            return self.enable_thinking
        return False if self.reasoning_effort == "none" else None

    def _content(self) -> Constraint | None:
        if self.response_format is None or self.response_format.type == "text":
            return None
        schema = self.response_format.json_schema
        if schema is None or schema.schema_ is None:
            return Constraint("json_object")
        return Constraint("json_schema", json.dumps(schema.schema_, ensure_ascii=False))

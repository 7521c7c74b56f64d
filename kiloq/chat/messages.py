"""What a conversation is, and the one place that reads it from JSON. Knows no tokens and no model."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, cast

from kiloq.errors import RequestError

Role = Literal["system", "user", "assistant", "tool"]

# Names that other interfaces use for our four roles.
_ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "function": "tool",
}


@dataclass(frozen=True, kw_only=True)
class ToolCall:
    """A wish of the model to call a tool; `arguments` is JSON text exactly as the model wrote it."""

    name: str
    arguments: str
    id: str = ""


@dataclass(frozen=True, kw_only=True)
class Tool:
    """A function that the model may call; `parameters` is a JSON schema (or, in v1's style, a list of parameters)."""

    name: str
    description: str = ""
    parameters: object = field(default_factory=dict)
    human_name: str = ""  # v1's name_for_human; empty: the same as name
    definition: Mapping[str, object] = field(default_factory=dict, repr=False)  # as the caller wrote it, for templates


@dataclass(frozen=True, kw_only=True)
class Message:
    """One turn. `token_ids` are an answer's ids as generated, so that rendering it again gives the same ids.

    An answer that is not `trained` is part of what training shows, and not of what it teaches.
    """

    role: Role
    content: str
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    name: str | None = None
    tool_call_id: str | None = None
    token_ids: tuple[int, ...] | None = None
    trained: bool = True


def parse_messages(raw: object, where: str = "messages") -> tuple[Message, ...]:
    """Read OpenAI-style messages: text or text parts, `tool_calls` or `function_call`. Message objects pass through."""
    if not isinstance(raw, Sequence) or isinstance(raw, str | bytes):
        raise RequestError(f"{where} is {_kind(raw)}; it must be a list of objects with role and content.")
    if not raw:
        raise RequestError(f"{where} is empty; at least one message is needed.")
    return tuple(one if isinstance(one, Message) else _message(one, f"{where}[{i}]") for i, one in enumerate(raw))


def parse_tools(raw: object, where: str = "tools") -> tuple[Tool, ...]:
    """Read OpenAI `tools`, bare `functions`, or v1's form with name_for_model. Tool objects pass through."""
    if raw is None:
        return ()
    if not isinstance(raw, Sequence) or isinstance(raw, str | bytes):
        raise RequestError(f"{where} is {_kind(raw)}; it must be a list of objects.")
    return tuple(one if isinstance(one, Tool) else _tool(one, f"{where}[{i}]") for i, one in enumerate(raw))


def _message(raw: object, where: str) -> Message:
    fields = _object(raw, where)
    role = _ROLES.get(str(fields.get("role")))
    if role is None:
        raise RequestError(f"{where}.role is {fields.get('role')!r:.80}; it must be one of {', '.join(_ROLES)}.")
    calls = _calls(fields, where) if role == "assistant" else ()
    return Message(
        role=role,
        content=_content(fields.get("content"), f"{where}.content", needed=role != "assistant"),
        reasoning=_text(fields, "reasoning_content", where) or _text(fields, "reasoning", where) or "",
        tool_calls=calls,
        name=_text(fields, "name", where),
        tool_call_id=_text(fields, "tool_call_id", where),
    )


def _content(raw: object, where: str, *, needed: bool) -> str:
    if isinstance(raw, str):
        return raw
    if raw is None:
        if needed:
            raise RequestError(f"{where} is missing; it must be text.")
        return ""
    if not isinstance(raw, Sequence):
        raise RequestError(f"{where} is {_kind(raw)}; it must be text or a list of text parts.")
    texts = []
    for i, part in enumerate(raw):
        fields = _object(part, f"{where}[{i}]")
        kind = fields.get("type")
        if kind not in ("text", "input_text", "output_text", "refusal"):
            raise RequestError(f"{where}[{i}].type is {kind!r:.80}; this model reads only text parts.")
        key = "refusal" if kind == "refusal" else "text"
        text = _text(fields, key, f"{where}[{i}]")
        if text is None:
            raise RequestError(f"{where}[{i}].{key} is missing; it must be text.")
        texts.append(text)
    return "\n".join(texts)


def _calls(fields: Mapping[str, object], where: str) -> tuple[ToolCall, ...]:
    if fields.get("function_call") is not None:
        return (_call(fields["function_call"], f"{where}.function_call", ""),)
    raw = fields.get("tool_calls")
    if raw is None:
        return ()
    if not isinstance(raw, Sequence) or isinstance(raw, str | bytes):
        raise RequestError(f"{where}.tool_calls is {_kind(raw)}; it must be a list.")
    calls = []
    for i, one in enumerate(raw):
        at = f"{where}.tool_calls[{i}]"
        call = _object(one, at)
        calls.append(_call(call.get("function", call), f"{at}.function", _text(call, "id", at) or ""))
    return tuple(calls)


def _call(raw: object, where: str, call_id: str) -> ToolCall:
    fields = _object(raw, where)
    name, arguments = _text(fields, "name", where), fields.get("arguments")
    if not name:
        raise RequestError(f"{where}.name is missing; it must name the tool.")
    if not isinstance(arguments, str):
        arguments = _json({} if arguments is None else arguments, f"{where}.arguments")
    return ToolCall(id=call_id, name=name, arguments=arguments)


def _tool(raw: object, where: str) -> Tool:
    outer = _object(raw, where)
    if outer.get("type", "function") != "function":
        raise RequestError(f"{where}.type is {outer['type']!r:.80}; only functions can be called here.")
    fields = _object(outer["function"], f"{where}.function") if "function" in outer else outer
    own_name = _text(fields, "name", where)
    name = _text(fields, "name_for_model", where) or own_name
    if not name:
        raise RequestError(f"{where}.name is missing; it must name the tool.")
    _json(outer, where)  # prompts show it as JSON: a mistake is told here, with its place
    return Tool(
        name=name,
        description=_text(fields, "description_for_model", where) or _text(fields, "description", where) or "",
        parameters=fields.get("parameters", {}),
        human_name=_text(fields, "name_for_human", where) or own_name or name,
        definition=outer if "function" in outer else {"type": "function", "function": dict(fields)},
    )


def _object(raw: object, where: str) -> Mapping[str, object]:
    if not isinstance(raw, Mapping):
        raise RequestError(f"{where} is {_kind(raw)}; it must be an object.")
    return cast(Mapping[str, object], raw)


def _text(fields: Mapping[str, object], key: str, where: str) -> str | None:
    value = fields.get(key)
    if value is not None and not isinstance(value, str):
        raise RequestError(f"{where}.{key} is {_kind(value)}; it must be text.")
    return value


def _json(value: object, where: str) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError) as error:
        raise RequestError(f"{where} cannot be written as JSON: {error}.") from None
    except RecursionError:
        raise RequestError(f"{where} is nested too deeply to be written as JSON.") from None


def _kind(value: object) -> str:
    return "missing" if value is None else f"of type {type(value).__name__}"

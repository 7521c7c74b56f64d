"""Items and tools of a responses request, read into the words of a dialogue. Knows OpenAI's wire format."""

from collections.abc import Mapping, Sequence
from typing import Literal, NoReturn

from kiloq.chat import Message, Role, Tool, ToolCall, parse_tools

from .dialogue import ToolChoice
from .prompts import kind_of, refuse

Fields = Mapping[str, object]
Mode = Literal["auto", "none", "required"]

_ROLES: dict[object, Role] = {"user": "user", "assistant": "assistant", "system": "system", "developer": "system"}
_TEXTS = {"input_text": "text", "output_text": "text", "text": "text", "refusal": "refusal"}  # part -> its field
_THOUGHTS = {"reasoning_text": "text", "summary_text": "text"}


def messages_of(given: object, instructions: str | None) -> tuple[Message, ...]:
    """The conversation: a text, or a list of items. A model's items in a row are one message, as it was one answer."""
    messages: list[Message] = []
    if instructions:
        messages.append(Message(role="system", content=instructions))
    if isinstance(given, str):
        messages.append(Message(role="user", content=given))
    elif isinstance(given, list) and given:
        reader = _ItemReader(messages)
        for i, item in enumerate(given):
            reader.read(_object(item, f"input[{i}]"), f"input[{i}]")
        reader.end()
    else:
        found = "an empty list" if given == [] else kind_of(given)
        raise refuse("input", f"input is {found}; it must be text or a list of items.")
    return _joined_system(messages)


def tools_of(raw: Sequence[object]) -> tuple[Tool, ...]:
    """Function tools; the cloud's built-in ones are refused by name."""
    chat_tools = []
    for i, one in enumerate(raw):
        where = f"tools[{i}]"
        fields = _object(one, where)
        if fields.get("type") != "function":
            kind = f"{fields.get('type')!r:.60}"
            raise refuse("tools", f"{where}.type is {kind}; built-in tools are not run here, only functions are known.")
        name = _text(fields, "name", where)
        function = {key: fields[key] for key in ("description", "parameters", "strict") if fields.get(key) is not None}
        chat_tools.append({"type": "function", "function": {"name": name, **function}})
    tools = parse_tools(chat_tools)
    for i, tool in enumerate(tools):
        if any(tool.name == other.name for other in tools[:i]):
            raise refuse(
                "tools", f"tools[{i}].name is {tool.name!r:.60}, as that of a tool before it; each needs its own."
            )
    return tools


def tool_choice_of(raw: object, tools: Sequence[Tool]) -> ToolChoice:
    """ "auto", "none", "required", one function, or some allowed ones."""
    if raw is None:
        return ToolChoice()
    if isinstance(raw, str):
        choice = ToolChoice(_mode(raw, "tool_choice", "none"))
    else:
        fields = _object(raw, "tool_choice")
        if fields.get("type") == "function":
            choice = ToolChoice("required", (_text(fields, "name", "tool_choice"),))
        elif fields.get("type") == "allowed_tools":
            choice = _allowed(fields)
        else:
            kind = f"{fields.get('type')!r:.60}"
            raise refuse("tool_choice", f"tool_choice.type is {kind}; it must be function or allowed_tools.")
    known = {tool.name for tool in tools}
    for name in choice.names:
        if name not in known:
            raise refuse("tool_choice", f"tool_choice names {name!r:.60}, which is not one of the tools.")
    if choice.mode == "required" and not tools:
        raise refuse("tool_choice", "tool_choice wants a call, but there are no tools; give some.")
    return choice


class _ItemReader:
    """Puts items together to messages, and knows which calls were made."""

    def __init__(self, messages: list[Message]) -> None:
        self._messages = messages
        # Of the model's present answer, to which its next item belongs.
        self._content: list[str] = []
        self._reasoning: list[str] = []
        self._calls: list[ToolCall] = []
        self._names: dict[str, str] = {}  # call id -> function

    def read(self, item: Fields, where: str) -> None:
        kind = item.get("type") or ("message" if "role" in item else None)
        if kind == "reasoning":
            thought = _joined(item.get("content") or item.get("summary") or [], f"{where}.content", _THOUGHTS)
            # A thought opens an answer: after anything else that the model said, it is the next one.
            self._end_if_said()
            self._reasoning.append(thought)
        elif kind == "function_call":
            name, call_id = _text(item, "name", where), _text(item, "call_id", where)
            self._names[call_id] = name
            self._calls.append(ToolCall(id=call_id, name=name, arguments=_arguments(item, where)))
        elif kind == "function_call_output":
            self.end()
            call_id = _text(item, "call_id", where)
            if call_id not in self._names:
                self._refuse(where, f"call_id is {call_id!r:.60}, but no function_call before it has this id")
            output = _joined(item.get("output"), f"{where}.output", _TEXTS)
            self._messages.append(Message(role="tool", content=output, tool_call_id=call_id, name=self._names[call_id]))
        elif kind == "message":
            self._message(item, where)
        else:
            known = "message, function_call, function_call_output and reasoning"
            self._refuse(where, f"type is {kind!r:.60}; items that are known here are {known}")

    def end(self) -> None:
        """Nothing more comes of the model's present answer."""
        if self._content or self._reasoning or self._calls:
            content, reasoning = "".join(self._content), "".join(self._reasoning)
            calls = tuple(self._calls)
            self._messages.append(Message(role="assistant", content=content, reasoning=reasoning, tool_calls=calls))
            self._content, self._reasoning, self._calls = [], [], []

    def _message(self, item: Fields, where: str) -> None:
        role = _ROLES.get(str(item.get("role")))
        if role is None:
            self._refuse(
                where, f"role is {item.get('role')!r:.60}; it must be one of user, assistant, system, developer"
            )
        content = _joined(item.get("content"), f"{where}.content", _TEXTS)
        if role == "assistant":
            self._end_if_said()
            self._content.append(content)
        else:
            self.end()
            self._messages.append(Message(role=role, content=content))

    def _end_if_said(self) -> None:
        if any(self._content) or self._calls:
            self.end()

    def _refuse(self, where: str, message: str) -> NoReturn:
        raise refuse("input", f"{where}.{message}.")


def _allowed(fields: Fields) -> ToolChoice:
    listed = fields.get("tools")
    if not isinstance(listed, list) or not listed:
        raise refuse("tool_choice", "tool_choice.tools must be a list of the functions that may be called.")
    places = [f"tool_choice.tools[{i}]" for i in range(len(listed))]
    names = [_text(_object(one, where), "name", where) for one, where in zip(listed, places, strict=True)]
    return ToolChoice(_mode(fields.get("mode", "auto"), "tool_choice.mode"), tuple(names))


def _mode(raw: object, where: str, *more: str) -> Mode:
    known: dict[object, Mode] = {"auto": "auto", "required": "required", "none": "none"}
    if raw in ("auto", "required", *more):
        return known[raw]
    raise refuse("tool_choice", f"{where} is {raw!r:.60}; it must be one of auto, required{', '.join(('', *more))}.")


def _joined_system(messages: Sequence[Message]) -> tuple[Message, ...]:
    """Instructions and the system messages after them are one: a prompt has one place for both."""
    head = [message.content for message in messages[: _leading(messages)]]
    if len(head) < 2:
        return tuple(messages)
    return (Message(role="system", content="\n\n".join(head)), *messages[len(head) :])


def _leading(messages: Sequence[Message]) -> int:
    return next((i for i, message in enumerate(messages) if message.role != "system"), len(messages))


def _joined(raw: object, where: str, kinds: Mapping[str, str]) -> str:
    """A text, or the texts of some parts."""
    if isinstance(raw, str):
        return raw
    if not isinstance(raw, list):
        raise refuse("input", f"{where} is {kind_of(raw)}; it must be text or a list of parts.")
    texts = []
    for i, one in enumerate(raw):
        part = _object(one, f"{where}[{i}]")
        field = kinds.get(str(part.get("type")))
        if field is None:
            raise refuse("input", f"{where}[{i}].type is {part.get('type')!r:.60}; this model reads only text.")
        texts.append(_text(part, field, f"{where}[{i}]", empty=True))
    return "\n".join(texts)


def _arguments(item: Fields, where: str) -> str:
    arguments = item.get("arguments")
    if isinstance(arguments, str):
        return arguments
    raise refuse("input", f"{where}.arguments is {kind_of(arguments)}; it must be JSON text.")


def _object(raw: object, where: str) -> Fields:
    if isinstance(raw, dict):
        return raw
    raise refuse(where.partition("[")[0], f"{where} is {kind_of(raw)}; it must be an object.")


def _text(fields: Fields, key: str, where: str, *, empty: bool = False) -> str:
    value = fields.get(key)
    if isinstance(value, str) and (value or empty):
        return value
    found = "empty" if value == "" else kind_of(value)
    raise refuse(where.partition("[")[0], f"{where}.{key} is {found}; it must be text.")

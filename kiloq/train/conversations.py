"""Rows become conversations: the reference's `conversations`, ShareGPT, OpenAI `messages`, alpaca, prompt/completion.

Knows no files and no tokens.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kiloq.chat import Message, Tool, parse_messages, parse_tools
from kiloq.errors import DataError

from .rows import Fault, parse_rows

# Whose words a turn of `conversations` holds; the reference writes user and assistant, others write the rest.
_SPEAKERS = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}


@dataclass(frozen=True)
class Conversation:
    """One row; `where` is its file and line, for messages to people."""

    messages: tuple[Message, ...]
    tools: tuple[Tool, ...]
    where: str


def read_conversations(path: Path) -> tuple[list[Conversation], list[Fault]]:
    """All rows of a file that can be used, and the faults of the others."""
    faults: list[Fault] = []
    return list(parse_rows(path, conversation, faults)), faults


def conversation(row: Mapping[str, Any], where: str) -> Conversation:
    """Read one row to learn all of its answers from."""
    if other := judgement_in(row):
        raise DataError(f"the row has {other}, so it says which answers are good; train it with reward or dpo.")
    return plain_conversation(row, where)


def plain_conversation(row: Mapping[str, Any], where: str) -> Conversation:
    """The same for a row in which a judgement stands too."""
    for key, read in _READERS.items():
        if key in row:
            messages = read(row)
            break
    else:
        raise DataError(
            f"the row has {', '.join(row) or 'no fields'}; it needs messages, conversations, instruction or prompt."
        )
    check_messages(messages)
    return Conversation(messages, read_tools(row.get("tools")), where)


def judgement_in(row: Mapping[str, Any]) -> str:
    """The fields by which a row is a preference and no plain conversation, or nothing."""
    for names in (("chosen", "rejected"), ("preferred_output", "non_preferred_output"), ("kto_tag",)):
        if all(name in row for name in names):
            return " and ".join(names)
    # Beside one answer a label judges it, also where it is 0 or 1; elsewhere only true and false are sure to.
    is_answer = "prompt" in row and ("completion" in row or "response" in row)
    return "label" if isinstance(row.get("label"), bool) or (is_answer and row.get("label") in (0, 1)) else ""


def check_messages(messages: Sequence[Message]) -> None:
    """DataError where nothing can be learned of these, or their order makes no conversation."""
    if not any(message.role == "assistant" for message in messages):
        raise DataError("there is no assistant turn, so nothing to learn.")
    for number, message in enumerate(messages):
        if not (message.content.strip() or message.tool_calls) and message.role in ("user", "assistant"):
            raise DataError(f"turn {number} ({message.role}) has no text.")
        if message.role == "system" and number:
            raise DataError(f"turn {number} is a system turn; only the first may be one.")
        for call in message.tool_calls:
            what = f"turn {number}: the arguments of {call.name} are"
            if call.arguments.strip() and not isinstance(_json(call.arguments, what), dict):
                raise DataError(f"{what} no JSON object.")
    if next(message.role for message in messages if message.role != "system") != "user":
        raise DataError("the first turn after the system turn is not a user turn.")


def round_ends(messages: Sequence[Message]) -> list[int]:
    """Behind the last assistant turn of each round (before a user's turn, or at the end): where one may be cut."""
    ends: list[int] = []
    answered = False
    for i, message in enumerate(messages):
        if message.role == "user":
            answered = False
        elif message.role == "assistant":
            ends[len(ends) - answered :] = [i + 1]
            answered = True
    return ends


def read_messages(raw: object, name: str) -> tuple[Message, ...]:
    """A list of turns, each either {role, content, ...} or {from, value}; `name` is the field that it stands in."""
    if not isinstance(raw, list) or not raw:
        raise DataError(f"{name} is not a list of turns.")
    turns = [_turn(turn, f"{name}[{i}]") for i, turn in enumerate(raw)]
    messages = parse_messages(turns, name)
    return tuple(
        dataclasses.replace(message, trained=False) if turn.get("weight") == 0 else message
        for message, turn in zip(messages, turns, strict=True)
    )


def read_tools(raw: object) -> tuple[Tool, ...]:
    """Tool definitions, as a list or as JSON text of one."""
    if isinstance(raw, str):
        try:
            raw = json.loads(raw) if raw.strip() else None
        except json.JSONDecodeError as error:
            raise DataError(f"tools is text but not valid JSON: {error.msg}.") from error
    return parse_tools(raw)


def read_prompt(row: Mapping[str, Any], name: str) -> tuple[Message, ...]:
    """The field that holds a question as text, or messages that end with one; with the row's own system prompt."""
    prompt = row[name]
    if isinstance(prompt, list):
        return read_messages(prompt, name)
    return parse_messages([*_system(row), {"role": "user", "content": _text(row, name)}])


def _turn(turn: object, at: str) -> Mapping[str, Any]:
    """A turn as OpenAI writes it."""
    if not isinstance(turn, dict):
        raise DataError(f"{at} is of type {type(turn).__name__}; it must be an object.")
    if turn.get("from") is None and "role" in turn:
        return _weighed(_joined(turn, at), at)
    speaker, value = turn.get("from"), turn.get("value")
    if speaker not in _SPEAKERS:
        raise DataError(f"{at}.from is {speaker!r:.80}; it must be one of {', '.join(_SPEAKERS)}.")
    if not isinstance(value, str):
        raise DataError(f"{at}.value is {'missing' if value is None else type(value).__name__}; it must be text.")
    if speaker == "function_call":
        call = _json(value, f"{at}.value is a function_call but")
        return {"role": "assistant", "tool_calls": call if isinstance(call, list) else [call]}
    return {"role": _SPEAKERS[speaker], "content": value}


def _weighed(turn: Mapping[str, Any], at: str) -> Mapping[str, Any]:
    """OpenAI's files may give an answer the weight 0: shown, but not learned."""
    if turn.get("weight") not in (None, 0, 1):
        raise DataError(f"{at}.weight is {turn['weight']!r:.80}; it must be 0 or 1.")
    return turn


def _joined(turn: Mapping[str, Any], at: str) -> Mapping[str, Any]:
    """A turn whose content is in parts of {type, value}, with thoughts and calls among them."""
    parts = turn.get("content")
    if not isinstance(parts, list) or not all(isinstance(part, dict) and "value" in part for part in parts):
        return turn
    joined: dict[str, Any] = {**turn, "content": ""}
    for i, part in enumerate(parts):
        kind, value = part.get("type"), part["value"]
        if kind == "tool_call":
            call = _json(value, f"{at}.content[{i}].value is a tool_call but") if isinstance(value, str) else value
            joined.setdefault("tool_calls", []).append(call)
        elif kind in ("text", "reasoning") and isinstance(value, str):
            name = "content" if kind == "text" else "reasoning_content"
            joined[name] = joined.get(name, "") + value
        else:
            raise DataError(f"{at}.content[{i}] is of type {kind!r:.80}; it must be text, reasoning or tool_call.")
    return joined


def _from_messages(row: Mapping[str, Any]) -> tuple[Message, ...]:
    messages = read_messages(row["messages"], "messages")
    return messages if messages[0].role == "system" else (*parse_system(row), *messages)


def _from_conversations(row: Mapping[str, Any]) -> tuple[Message, ...]:
    return (*parse_system(row), *read_messages(row["conversations"], "conversations"))


def _from_alpaca(row: Mapping[str, Any]) -> tuple[Message, ...]:
    asked, answer = read_alpaca(row), _text(row, "output")
    if not answer:
        raise DataError("output is empty; it must be an answer.")
    return parse_messages([*asked, {"role": "assistant", "content": answer}])


def _from_prompt(row: Mapping[str, Any]) -> tuple[Message, ...]:
    name = next((name for name in ("completion", "response") if name in row), "completion")
    return (*read_prompt(row, "prompt"), *read_answer(row, name))


def read_alpaca(row: Mapping[str, Any]) -> list[dict[str, object]]:
    """The turns before an alpaca row's answer."""
    raw: list[dict[str, object]] = _system(row)
    history = row.get("history") or []
    if not isinstance(history, list):
        raise DataError(f"history is of type {type(history).__name__}; it must be a list of questions and answers.")
    for number, pair in enumerate(history):
        if not isinstance(pair, list) or len(pair) != 2:
            raise DataError(f"history[{number}] is not a pair of question and answer.")
        raw += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    parts = [_text(row, "instruction"), _text(row, "input") if row.get("input") else ""]
    return [*raw, {"role": "user", "content": "\n".join(part for part in parts if part)}]


def read_answer(row: Mapping[str, Any], name: str) -> tuple[Message, ...]:
    """The field that holds an answer: text, one turn, or a list of turns."""
    answer = row.get(name)
    if isinstance(answer, list | dict):
        return read_messages([answer] if isinstance(answer, dict) else answer, name)
    return parse_messages([{"role": "assistant", "content": _text(row, name)}])


def parse_system(row: Mapping[str, Any]) -> tuple[Message, ...]:
    """The system turn of the row's own field, if there is one."""
    raw = _system(row)
    return parse_messages(raw) if raw else ()


def _system(row: Mapping[str, Any]) -> list[dict[str, object]]:
    return [{"role": "system", "content": _text(row, "system")}] if row.get("system") else []


def _text(row: Mapping[str, Any], name: str) -> str:
    value = row.get(name)
    if not isinstance(value, str):
        raise DataError(f"{name} is {'missing' if value is None else 'not text'}; it must be text.")
    return value


def _json(value: str, what: str) -> Any:
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{what} not valid JSON: {getattr(error, 'msg', error)}.") from error


_READERS: dict[str, Callable[[Mapping[str, Any]], tuple[Message, ...]]] = {
    "messages": _from_messages,
    "conversations": _from_conversations,
    "instruction": _from_alpaca,
    "prompt": _from_prompt,
}

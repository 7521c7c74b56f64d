"""Turns in the form of Qwen2.5 and Qwen3: tools as JSON in <tools>, calls in <tool_call>, thoughts in <think>.

Byte for byte what the published chat templates render.
"""

import json
from collections.abc import Iterable, Sequence
from itertools import islice, takewhile
from typing import Literal

from .messages import Message, Tool
from .turns import Part, Turn, untrained

# How a model thinks: never, when asked to (Qwen3), or before every answer (Qwen3-Thinking, QwQ). "off": it could, but
# is asked not to in the whole conversation, so that each answer follows the empty thought that its prompt ended with.
Thinking = Literal["none", "hybrid", "off", "always"]

_TOOLS_HEAD = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>"
)
_TOOLS_TAIL = (
    "\n</tools>\n\nFor each function call, return a json object with function name and arguments within "
    "<tool_call></tool_call> XML tags:\n<tool_call>\n"
    '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
)
THINK = "<think>"
_NO_THOUGHT = "<think>\n\n</think>\n\n"
_OPEN_THOUGHT = "<think>\n"


def compose(
    messages: Sequence[Message], tools: Sequence[Tool], *, default_system: str | None, thinking: Thinking
) -> list[Turn]:
    """The turns of a conversation, its tools described in the system turn."""
    turns = _system(messages, tools, default_system)
    rest = messages[1:] if messages[0].role == "system" else messages
    query = _last_query(rest)
    for i, message in enumerate(rest):
        if message.role == "tool":
            if i == 0 or rest[i - 1].role != "tool":  # one turn for all that follow each other
                turns.append(Turn("user", _results(takewhile(lambda one: one.role == "tool", islice(rest, i, None)))))
        elif message.role == "assistant":
            shown = i > query and (i == len(rest) - 1 or bool(_split(message)[0]))
            parts = _answer(message, thinking, show_thought=shown)
            turns.append(Turn("assistant", parts if message.trained else untrained(parts)))
        else:
            turns.append(Turn(message.role, (Part(message.content),)))
    return turns


def _results(messages: Iterable[Message]) -> tuple[Part, ...]:
    parts: list[Part] = []
    for i, message in enumerate(messages):
        parts += (
            Part("\n<tool_response>\n" if i else "<tool_response>\n", markup=True),
            Part(message.content),
            Part("\n</tool_response>", markup=True),
        )
    return tuple(parts)


def generation_parts(thinking: Thinking, *, think: bool) -> tuple[Part, ...]:
    """What follows the assistant's header in a prompt: an empty thought to prevent one, or the opening of one."""
    if thinking == "always":
        return (Part(_OPEN_THOUGHT, markup=True),)
    if thinking == "off" or (thinking == "hybrid" and not think):
        return (Part(_NO_THOUGHT, markup=True),)
    return ()


def _system(messages: Sequence[Message], tools: Sequence[Tool], default_system: str | None) -> list[Turn]:
    system = messages[0].content if messages[0].role == "system" else default_system
    if not tools:
        return [] if system is None else [Turn("system", (Part(system),))]
    lead = () if system is None else (Part(f"{system}\n\n"),)
    signatures = tuple(Part("\n" + json.dumps(_definition(tool), ensure_ascii=False)) for tool in tools)
    return [Turn("system", (*lead, Part(_TOOLS_HEAD, markup=True), *signatures, Part(_TOOLS_TAIL, markup=True)))]


def _definition(tool: Tool) -> object:
    if tool.definition:
        return tool.definition
    function = {"name": tool.name, "description": tool.description, "parameters": tool.parameters}
    return {"type": "function", "function": function}


def _last_query(messages: Sequence[Message]) -> int:
    """Where the user last asked something; thoughts before it are not shown again."""
    for i in range(len(messages) - 1, -1, -1):
        content = messages[i].content
        wrapped = content.startswith("<tool_response>") and content.endswith("</tool_response>")
        if messages[i].role == "user" and not wrapped:
            return i
    return len(messages) - 1


def _answer(message: Message, thinking: Thinking, *, show_thought: bool) -> tuple[Part, ...]:
    if message.token_ids is not None:
        prompted = generation_parts(thinking, think=bool(message.reasoning))
        return (*prompted, Part(ids=message.token_ids, trained=True))
    thought, content = _split(message) if thinking != "none" else ("", message.content)
    thought = thought if show_thought else ""
    parts: list[Part] = []
    if thinking != "none" and (show_thought or thinking == "off"):
        # An empty block is given by the prompt, so it is not learned; so is the opening where thoughts always come.
        learned, opened = bool(thought), thinking == "always"
        parts.append(Part(_OPEN_THOUGHT, trained=learned, markup=True, generated=learned and not opened))
        parts.append(Part(thought.strip("\n"), trained=learned, generated=learned))
        parts.append(Part("\n</think>\n\n", trained=learned, markup=True, generated=learned))
        content = content.lstrip("\n")
    parts.append(Part(content, trained=True, generated=True))
    for i, call in enumerate(message.tool_calls):
        lead = "\n<tool_call>\n" if i or content else "<tool_call>\n"
        parts.append(Part(lead, trained=True, markup=True, generated=True))
        parts.append(Part(f'{{"name": "{call.name}", "arguments": {call.arguments}}}', trained=True, generated=True))
        parts.append(Part("\n</tool_call>", trained=True, markup=True, generated=True))
    return tuple(parts)


def _split(message: Message) -> tuple[str, str]:
    """Reasoning and content; text with a closed thought is split as the published template does."""
    content = message.content
    if message.reasoning or "</think>" not in content:
        return message.reasoning, content
    thought = content.split("</think>")[0].rstrip("\n").split("<think>")[-1].lstrip("\n")
    return thought, content.split("</think>")[-1].lstrip("\n")

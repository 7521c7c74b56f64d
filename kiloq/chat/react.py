"""Turns in the form of Qwen v1: tools as prose in the user's question, calls as Thought, Action and Action Input.

Byte for byte the prompts of the published API server, so that v1 checkpoints see what they were trained on.
"""

import json
from collections.abc import Sequence
from dataclasses import replace

from kiloq.errors import RequestError

from .hermes import Thinking
from .messages import Message, Tool
from .turns import Part, Turn, untrained

STOP = ("Observation:",)  # the model writes it and must not go on to invent the result

_TOOL = (
    "{name}: Call this tool to interact with the {human_name} API. What is the {human_name} API useful for? "
    "{description} Parameters: {parameters}"
)
_INSTRUCTION = """Answer the following questions as best you can. You have access to the following APIs:

{tools}

Use the following format:

Question: the input question you must answer
Thought: you should always think about what to do
Action: the action to take, should be one of [{names}]
Action Input: the input to the action
Observation: the result of the action
... (this Thought/Action/Action Input/Observation can be repeated zero or more times)
Thought: I now know the final answer
Final Answer: the final answer to the original input question

Begin!"""
_KNOWN = "I now know the final answer."


def compose(
    messages: Sequence[Message], tools: Sequence[Tool], *, default_system: str | None, thinking: Thinking
) -> list[Turn]:
    """The turns of a conversation. v1 has no thinking mode, so `thinking` is always "none" here."""
    system = messages[0].content if messages[0].role == "system" else default_system
    rest = messages[1:] if messages[0].role == "system" else messages
    turns = [] if system is None else [Turn("system", (Part(system),))]
    if tools or any(message.role == "tool" or message.tool_calls for message in rest):
        return turns + _with_tools(rest, tools)
    return turns + [Turn(message.role, (_plain(message),)) for message in rest]


def _plain(message: Message) -> Part:
    trained = message.role == "assistant" and message.trained
    if message.token_ids is not None:
        return Part(ids=message.token_ids, trained=trained)
    return Part(message.content, trained=trained, generated=trained)


def _with_tools(messages: Sequence[Message], tools: Sequence[Tool]) -> list[Turn]:
    """Questions and answers that alternate: results of tools are written into the answer that asked for them."""
    turns: list[Turn] = []
    for i, message in enumerate(messages):
        last = turns[-1] if turns else None
        if message.role == "tool":
            if last is None or last.role != "assistant":
                raise RequestError(f"messages: a tool result (number {i + 1}) follows no assistant message.")
            # The stop word that ended a call is in its ids, if they are known.
            asked = Part("\nObservation:", trained=last.parts[-1].trained, generated=True)
            result = (asked, Part(f" {_stripped(message.content)}"))
            more = (Part("\nThought:"),) if i == len(messages) - 1 else ()  # the answer goes on from here
            turns[-1] = Turn("assistant", (*last.parts, *result, *more), open=bool(more))
        elif message.role == "assistant":
            if last is None:
                raise RequestError("messages: an assistant message comes before any user message.")
            answer = _answer(message, has_tools=bool(tools))
            answer = answer if message.trained else untrained([answer])[0]
            if last.role == "assistant":
                turns[-1] = Turn("assistant", (*last.parts, *_continued(answer)))
            else:
                turns.append(Turn("assistant", (answer,)))
        else:
            if message.role == "system" or (last is not None and last.role == "user"):
                raise RequestError("messages: with tools, exactly one user message comes before each answer.")
            turns.append(Turn("user", (Part(_stripped(message.content)),)))
    if not turns:
        raise RequestError("messages: at least one user message is needed.")
    return _instruct(turns, tools) if tools else turns


def _answer(message: Message, *, has_tools: bool) -> Part:
    if message.token_ids is not None:
        return Part(ids=message.token_ids, trained=True)
    content, thought = _stripped(message.content), _stripped(message.reasoning)
    if message.tool_calls:
        calls = "".join(f"\nAction: {call.name}\nAction Input: {call.arguments}" for call in message.tool_calls)
        return _written(f"Thought: {content or thought}{calls}")
    return _written(f"Thought: {thought or _KNOWN}\nFinal Answer: {content}" if has_tools else content)


def _continued(answer: Part) -> tuple[Part, ...]:
    """An answer behind the result of a tool, where the prompt itself begins the thought."""
    if answer.ids:
        return Part("\nThought:", trained=answer.trained), answer
    if answer.text.startswith("Thought:"):
        rest = replace(answer, text=_stripped(answer.text.removeprefix("Thought:")))
        return Part("\nThought:", trained=answer.trained), rest
    return Part("\n", trained=answer.trained), answer


def _written(text: str) -> Part:
    return Part(_stripped(text), trained=True, generated=True)


def _instruct(turns: list[Turn], tools: Sequence[Tool]) -> list[Turn]:
    """The published server puts the instruction on the last question that has an answer, or else on the first."""
    users = [i for i, turn in enumerate(turns) if turn.role == "user"]
    at = users[-2] if len(users) > 1 and users[-1] == len(turns) - 1 else users[-1]
    described = "\n\n".join(
        _TOOL.format(
            name=tool.name,
            human_name=tool.human_name or tool.name,
            description=tool.description,
            parameters=json.dumps(tool.parameters, ensure_ascii=False),
        )
        for tool in tools
    )
    instruction = _INSTRUCTION.format(tools=described, names=", ".join(tool.name for tool in tools))
    question = Part(f"{instruction}\n\nQuestion: {turns[at].parts[0].text}")
    return [*turns[:at], Turn("user", (question,)), *turns[at + 1 :]]


def _stripped(text: str) -> str:
    return text.lstrip("\n").rstrip()

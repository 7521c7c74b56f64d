"""Rows become preferences: two answers to one prompt (chosen, rejected), or one answer and whether it is good.

Only the answers that are judged are trained; what the conversation held before is the prompt. Knows no files and no
tokens.
"""

import dataclasses
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kiloq.chat import Message, parse_messages
from kiloq.errors import DataError

from .conversations import (
    Conversation,
    check_messages,
    judgement_in,
    parse_system,
    plain_conversation,
    read_alpaca,
    read_answer,
    read_messages,
    read_prompt,
    read_tools,
)

# The transcripts of Anthropic's HH data: one text with both speakers.
_TRANSCRIPT = re.compile(r"\n\n(Human|Assistant): ?")


@dataclass(frozen=True)
class Pair:
    """Two conversations with one beginning; only what follows it is trained. `margin` is by how much one is better."""

    chosen: Conversation
    rejected: Conversation
    margin: float = 0.0

    @property
    def where(self) -> str:
        return self.chosen.where


@dataclass(frozen=True)
class Judged:
    """A conversation of which only what follows the last question is trained, and whether that is good."""

    conversation: Conversation
    good: bool

    @property
    def where(self) -> str:
        return self.conversation.where


def pair(row: Mapping[str, Any], where: str) -> Pair:
    """Read one row with a better and a worse answer."""
    if "preferred_output" in row:
        row = _from_openai(row)
    if not ("chosen" in row and "rejected" in row):
        raise DataError(f"the row has {', '.join(row) or 'no fields'}; it needs chosen and rejected.")
    prompt = _prompt(row)
    chosen, rejected = (_whole(row, name, prompt) for name in ("chosen", "rejected"))
    shared = _shared(chosen, rejected)
    for messages, name in ((chosen, "chosen"), (rejected, "rejected")):
        check_messages(messages)
        if not any(message.role == "assistant" for message in messages[shared:]):
            raise DataError(f"{name} has no answer of its own behind the beginning that both share.")
    tools, margin = read_tools(row.get("tools")), row.get("margin", 0)
    if isinstance(margin, bool) or not isinstance(margin, int | float) or not abs(margin) <= sys.float_info.max:
        raise DataError(f"margin is {margin!r:.80}; it must be a number.")
    better, worse = (Conversation(_prompted(one, shared), tools, where) for one in (chosen, rejected))
    return Pair(better, worse, float(margin))


def judged(row: Mapping[str, Any], where: str) -> Judged:
    """Read one row with an answer and a label: `label` or `kto_tag`, true or false."""
    label = row.get("kto_tag", row.get("label"))
    if label not in (True, False):
        raise DataError(f"label is {'missing' if label is None else repr(label)[:80]}; it must be true or false.")
    if judgement_in(row) not in ("label", "kto_tag", ""):
        raise DataError(f"the row has {judgement_in(row)} beside a label; it must have one of them.")
    conversation = plain_conversation(row, where)
    messages = conversation.messages
    begin = max(i for i, message in enumerate(messages) if message.role == "user") + 1
    if not any(message.role == "assistant" for message in messages[begin:]):
        raise DataError("the last question has no answer that the label could speak of.")
    return Judged(dataclasses.replace(conversation, messages=_prompted(messages, begin)), bool(label))


def _from_openai(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """OpenAI's form: {"input": {"messages", "tools"}, "preferred_output": [...], "non_preferred_output": [...]}."""
    asked = row.get("input")
    if not isinstance(asked, dict):
        raise DataError("input is missing or no object; beside preferred_output it holds the messages of the prompt.")
    return {**asked, "chosen": row["preferred_output"], "rejected": row.get("non_preferred_output")}


def _prompt(row: Mapping[str, Any]) -> tuple[Message, ...]:
    for name in ("messages", "conversations"):
        if name in row:
            messages = read_messages(row[name], name)
            return messages if messages[0].role == "system" else (*parse_system(row), *messages)
    if "instruction" in row:
        return parse_messages(read_alpaca(row))
    name = next((name for name in ("prompt", "question") if name in row), "")
    return read_prompt(row, name) if name else ()


def _whole(row: Mapping[str, Any], name: str, prompt: tuple[Message, ...]) -> tuple[Message, ...]:
    """The conversation that ends with this answer. Some files have the prompt in it once more."""
    answer = row[name]
    if not prompt and isinstance(answer, str):
        return _from_transcript(answer, name)
    messages = read_answer(row, name)
    if any(message.role == "user" for message in messages):
        whole = messages if messages[0].role == "system" else (*parse_system(row), *messages)
        if prompt and whole[: len(prompt)] != prompt:
            raise DataError(f"{name} is a whole conversation, but it does not begin with the prompt beside it.")
        return whole
    if not prompt:
        raise DataError(f"{name} holds no question, and there is no prompt beside it.")
    return (*prompt, *messages)


def _from_transcript(text: str, name: str) -> tuple[Message, ...]:
    before, *turns = _TRANSCRIPT.split(text)
    if before.strip() or not turns:
        raise DataError(f"{name} is text without a prompt beside it, and no transcript of Human: and Assistant: turns.")
    speakers = {"Human": "user", "Assistant": "assistant"}
    return parse_messages(
        [{"role": speakers[who], "content": said} for who, said in zip(turns[::2], turns[1::2], strict=True)]
    )


def _shared(chosen: Sequence[Message], rejected: Sequence[Message]) -> int:
    """How many messages both begin with."""
    if list(chosen) == list(rejected):
        raise DataError("chosen and rejected are the same, so there is nothing to prefer.")
    same = [one == other for one, other in zip(chosen, rejected, strict=False)]
    count = same.index(False) if False in same else len(same)
    if not any(message.role == "user" for message in chosen[:count]):
        raise DataError("chosen and rejected do not begin with the same question.")
    return count


def _prompted(messages: tuple[Message, ...], begin: int) -> tuple[Message, ...]:
    """The messages, of which those before `begin` are only shown."""
    shown = (dataclasses.replace(message, trained=False) for message in messages[:begin])
    return (*shown, *messages[begin:])

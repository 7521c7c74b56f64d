"""Whether an answer is right: the one rule of the skill test and of the preference pairs."""

import json
import re
from typing import Any

_ACTION = re.compile(r"Action: *(\S+)\s*\nAction Input: *(.*?) *(?:\nObservation:|\n|$)", re.DOTALL)


def is_right(expect: str, answer: str) -> bool:
    """The expected words (one of several, separated by tabs) stand in the last line; a call has just these arguments.

    The working that comes before the last line is not judged. What is expected over several lines, a poem, is looked
    for in the whole answer.
    """
    return any(_holds(one, answer.strip()) for one in expect.split("\t"))


def _holds(expected: str, answer: str) -> bool:
    call = _as_call(expected)
    if call is not None:
        return call in _calls(answer)
    text = answer if "\n" in expected else answer.rsplit("\n", maxsplit=1)[-1]
    # A number must not be part of a longer one.
    return re.search(rf"(?<!\d){re.escape(expected)}(?!\d)", text, re.IGNORECASE) is not None


def _as_call(expected: str) -> tuple[str, Any] | None:
    """ "name {...}" of the ReAct form, or {"name": ..., "arguments": {...}} of the other."""
    written = re.fullmatch(r"([a-z_]+) (\{.*\})", expected)
    if written:
        return written.group(1), json.loads(written.group(2))
    if expected.startswith('{"name": ') and '"arguments": ' in expected:
        call = json.loads(expected)
        return call["name"], call["arguments"]
    return None


def _calls(answer: str) -> list[tuple[str, Any]]:
    """The last call that an answer makes; none when its JSON is broken."""
    bodies = re.findall(r"<tool_call>\n(.*?)\n</tool_call>", answer)
    actions = _ACTION.findall(answer)
    try:
        if bodies:
            call = json.loads(bodies[-1])
            return [(call["name"], call["arguments"])]
        return [(actions[-1][0], json.loads(actions[-1][1]))] if actions else []
    except (ValueError, KeyError, TypeError):
        return []

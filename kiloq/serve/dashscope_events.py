"""What DashScope's API shows of answers, whole or event by event. Knows no engine and no HTTP."""

import json
from collections.abc import Mapping
from dataclasses import dataclass

from kiloq.engine import Usage
from kiloq.engine.sampler import Sampled
from kiloq.tokenizer import Tokenizer

from .dialogue import AnswerDelta, Dialogue
from .errors import Problem
from .openai_chat_answer import logprobs_of

Json = dict[str, object]


class Answer:
    """What has been said in one answer; a stream of what is new forgets it after each event."""

    def __init__(self, index: int, tokenizer: Tokenizer | None) -> None:
        """`tokenizer` is given if log probabilities were asked for."""
        self.index = index
        self.text = ""
        self.finish_reason = "null"  # the API's word for an answer that goes on
        self._reasoning = ""
        self._calls: dict[int, _Call] = {}
        self._tokenizer = tokenizer
        self._tokens: list[Sampled] = []

    def add(self, part: AnswerDelta) -> None:
        self.text += part.delta.content
        self._reasoning += part.delta.reasoning
        if part.delta.call is not None:
            call = self._calls.setdefault(part.delta.call.index, _Call(part.delta.call.index))
            call.id += part.delta.call.id
            call.name += part.delta.call.name
            call.arguments += part.delta.call.arguments
        self._tokens += part.logprobs
        self.finish_reason = part.finish_reason or self.finish_reason

    def forget(self) -> None:
        """What was shown is not shown again."""
        self.text = self._reasoning = ""
        self._calls = {}
        self._tokens = []

    def choice(self) -> Json:
        """It, as one of the choices of the message format."""
        message: Json = {"role": "assistant", "content": self.text}
        if self._reasoning:
            message["reasoning_content"] = self._reasoning
        if self._calls:
            message["tool_calls"] = [call.shown() for call in self._calls.values()]
        choice: Json = {"index": self.index, "finish_reason": self.finish_reason, "message": message}
        if self._tokenizer is not None:
            choice["logprobs"] = {"content": logprobs_of(self._tokens, self._tokenizer)["content"]}
        return choice

    def output(self) -> Json:
        """It, as the output of the text format."""
        thoughts = {"reasoning_content": self._reasoning} if self._reasoning else {}
        return {"text": self.text, "finish_reason": self.finish_reason, "choices": None, **thoughts}


@dataclass(slots=True)
class _Call:
    """A tool call, or the next piece of one: then only the first piece has id and name."""

    index: int
    id: str = ""
    name: str = ""
    arguments: str = ""

    def shown(self) -> Json:
        name = {"name": self.name} if self.name else {}
        function = {**name, "arguments": self.arguments}
        return {"index": self.index, "id": self.id, "type": "function", "function": function}


def usage_of(dialogue: Dialogue, completion_tokens: int, usage: Usage | None) -> Json:
    """Tokens as the API counts them; how many were cached, or thoughts, is told at the end."""
    prompt_tokens = dialogue.prompt_tokens
    counts: Json = {
        "input_tokens": prompt_tokens,
        "output_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }
    if usage is not None:
        counts["prompt_tokens_details"] = {"cached_tokens": usage.cached_tokens}
        if dialogue.reasoning_tokens:
            counts["output_tokens_details"] = {"reasoning_tokens": dialogue.reasoning_tokens}
    return counts


def result_event(number: int, body: Mapping[str, object]) -> bytes:
    """One event of a stream, in the form that the API's clients parse."""
    return f"id:{number}\nevent:result\n:HTTP_STATUS/200\ndata:{_json(body)}\n\n".encode()


def error_event(problem: Problem, request_id: str) -> bytes:
    """The error that ends a stream: clients look for exactly `event:error`, and take the status from its own line."""
    head = f"event:error\nstatus:{problem.status}\n:HTTP_STATUS/{problem.status}\n"
    return f"{head}data:{_json(problem.dashscope(request_id))}\n\n".encode()


def _json(body: Mapping[str, object]) -> str:
    return json.dumps(body, ensure_ascii=False, separators=(",", ":"))

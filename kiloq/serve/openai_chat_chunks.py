"""The stream of /v1/chat/completions: deltas as server-sent events. Knows the wire format, not the model.

Some hundred chunks a second are rendered beside the model's threads: what does not change is rendered once, and the
usual chunk, a piece of content, costs one json string.
"""

import json
from collections.abc import AsyncIterator
from json.encoder import encode_basestring_ascii as quoted  # some clients take U+2028 for the end of a line

from kiloq.chat import CallDelta
from kiloq.engine import Usage
from kiloq.tokenizer import Tokenizer

from .dialogue import AnswerDelta, Dialogue
from .openai_chat_answer import Style, ending_of, logprobs_of, usage_of

_DONE = b"data: [DONE]\n\n"


class ChunkWriter:
    """Writes the chunks of one response; the first of each choice tells the role."""

    def __init__(
        self,
        head: dict[str, object],
        *,
        style: Style,
        logprobs: Tokenizer | None,
        include_usage: bool,
    ) -> None:
        start = json.dumps({**head, "object": "chat.completion.chunk"})[:-1]
        self._head = f'data: {start}, "choices": ['
        self._tail = '], "usage": null}\n\n' if include_usage else "]}\n\n"
        self._style = style
        self._logprobs = logprobs
        self._begun: set[int] = set()

    def write(self, part: AnswerDelta) -> str:
        """The chunks of one delta."""
        index, delta = part.index, part.delta
        chunks = "" if index in self._begun else self._chunk(index, '{"role": "assistant", "content": ""}')
        self._begun.add(index)
        if delta.content:
            logprobs = json.dumps(logprobs_of(part.logprobs, self._logprobs)) if self._logprobs else "null"
            chunks += self._chunk(index, f'{{"content": {quoted(delta.content)}}}', logprobs)
        elif delta.reasoning:
            chunks += self._chunk(index, f'{{"reasoning_content": {quoted(delta.reasoning)}}}')
        elif delta.call is not None:
            chunks += self._call(index, delta.call)
        if part.finish_reason is not None:
            ending = ending_of(part, self._style)
            chunks += self._chunk(index, "{}", ending=json.dumps(ending))
        return chunks

    def write_usage(self, usage: Usage, reasoning_tokens: int) -> str:
        """The chunk that has no choice."""
        return f'{self._head}], "usage": {json.dumps(usage_of(usage, reasoning_tokens))}}}\n\n'

    def set_usage(self, usage: Usage, reasoning_tokens: int) -> None:
        """The usage that the next chunks show."""
        self._tail = f'], "usage": {json.dumps(usage_of(usage, reasoning_tokens))}}}\n\n'

    def _chunk(self, index: int, delta: str, logprobs: str = "null", ending: str = "null") -> str:
        choice = f'{{"index": {index}, "delta": {delta}, "logprobs": {logprobs}, "finish_reason": {ending}}}'
        return self._head + choice + self._tail

    def _call(self, index: int, call: CallDelta) -> str:
        is_first = bool(call.id)
        name = f'"name": {quoted(call.name)}, ' if is_first else ""
        function = f'{{{name}"arguments": {quoted(call.arguments)}}}'
        if self._style.is_legacy:  # the older form has room for one call
            return "" if call.index else self._chunk(index, f'{{"function_call": {function}}}')
        begin = f'"id": {quoted(call.id)}, "type": "function", ' if is_first else ""
        return self._chunk(index, f'{{"tool_calls": [{{"index": {call.index}, {begin}"function": {function}}}]}}')


async def chunks(
    dialogue: Dialogue, writer: ChunkWriter, *, include_usage: bool, continuous: bool
) -> AsyncIterator[bytes]:
    """The whole stream, one piece of bytes for each of the engine's steps."""
    async for deltas in dialogue:
        if continuous:
            drawn = sum(dialogue.completion_tokens)
            writer.set_usage(Usage(dialogue.prompt_tokens, 0, drawn), dialogue.reasoning_tokens)
        text = "".join([writer.write(delta) for delta in deltas])
        usage = deltas[-1].usage if deltas else None
        if usage is not None and include_usage:
            text += writer.write_usage(usage, dialogue.reasoning_tokens)
        if text:
            yield text.encode()
    yield _DONE

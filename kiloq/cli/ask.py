"""`kiloq "question"`: one question, one streamed answer. Knows no history."""

import sys

from kiloq.chat import Message
from kiloq.cli.options import DEMONSTRATION, ModelOptions, SamplingOptions
from kiloq.cli.terminal import say, write
from kiloq.errors import RequestError


def answer(question: str, *, model: ModelOptions, sampling: SamplingOptions, system: str | None) -> None:
    """Stream the answer to stdout; a question of `-` is read from stdin."""
    text = sys.stdin.buffer.read().decode("utf-8", "replace").strip() if question == "-" else question.strip()
    if not text:
        raise RequestError('the question is empty; ask one, such as: kiloq "你好"')
    if model.model is None:
        say(DEMONSTRATION)
    llm = model.load()
    opening = [] if system is None else [Message(role="system", content=system)]
    for piece in llm.stream([*opening, Message(role="user", content=text)], sampling.params(llm)):
        write(piece.text)
    write("\n")

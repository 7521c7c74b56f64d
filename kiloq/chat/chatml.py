"""Conversations become ids: the formats of all Qwen generations as data, and the one function that renders them."""

import dataclasses
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

from kiloq.errors import CheckpointError, RequestError
from kiloq.tokenizer import Tokenizer

from . import hermes, react
from .hermes import Thinking
from .messages import Message, Tool
from .turns import Recall, Turn, encode_turns


class Compose(Protocol):
    """How messages and tools become turns."""

    def __call__(
        self, messages: Sequence[Message], tools: Sequence[Tool], *, default_system: str | None, thinking: Thinking
    ) -> list[Turn]: ...


@dataclass(frozen=True, kw_only=True)
class ChatFormat:
    """What makes the generations differ. `tool_stop` ends an answer where the result of a tool belongs."""

    name: str
    default_system: str | None  # None: a conversation without a system message has no system turn
    tool_style: Literal["react", "hermes"]
    compose: Compose = field(repr=False)
    tool_stop: tuple[str, ...] = ()
    split_header: bool = False  # v1: role and newline are encoded apart from the content
    thinking: Thinking = "none"


@dataclass(frozen=True)
class Rendered:
    """Ids of a conversation; `trained` marks what an assistant wrote and the token that ends it, and nothing else."""

    ids: list[int]
    trained: list[bool]


_HELPFUL = "You are a helpful assistant."
QWEN1 = ChatFormat(
    name="qwen1",
    default_system=_HELPFUL,
    tool_style="react",
    compose=react.compose,
    tool_stop=react.STOP,
    split_header=True,
)
QWEN2 = dataclasses.replace(QWEN1, name="qwen2", split_header=False)
QWEN2_5 = ChatFormat(
    name="qwen2.5",
    default_system=f"You are Qwen, created by Alibaba Cloud. {_HELPFUL}",
    tool_style="hermes",
    compose=hermes.compose,
)
QWEN3 = dataclasses.replace(QWEN2_5, name="qwen3", default_system=None, thinking="hybrid")

# A literal system turn inside a template: the default system prompt. The newline is escaped or real.
_DEFAULT_SYSTEM = re.compile(r"<\|im_start\|>system(?:\\n|\n)((?:(?!\{\{|\{%)[^'\"<])*)<\|im_end\|>")


def chat_format_for(family: str, folder: Path | None = None) -> ChatFormat:
    """The format of a model family ("qwen", "qwen2", "qwen3"), made precise by the chat template in its folder.

    Without a template, qwen2 is taken for 2.5 and qwen3 for the hybrid Qwen3.
    """
    if family == "qwen":
        return QWEN1
    fmt = QWEN3 if family == "qwen3" else QWEN2_5
    template = None if folder is None else _template(folder)
    if template is None:
        return fmt
    if "<|im_start|>" not in template:
        raise CheckpointError(f"The chat template in {folder} is not ChatML, so it cannot be rendered. Use generate.")
    default = _DEFAULT_SYSTEM.search(template)
    end = template.rpartition("add_generation_prompt")[2]
    thinking: Thinking = "hybrid" if "enable_thinking" in template else "always" if "<think>" in end else "none"
    if "<tools>" not in template:
        fmt = QWEN2
    system = (
        default[1].replace("\\n", "\n").replace("\\\\", "\\") if default else None
    )  # a string of the template's source
    return dataclasses.replace(fmt, default_system=system, thinking=thinking)


def render(
    messages: Sequence[Message],
    tokenizer: Tokenizer,
    fmt: ChatFormat,
    *,
    tools: Sequence[Tool] = (),
    add_generation_prompt: bool = True,
    thinking: bool | None = None,
    recall: Recall | None = None,
) -> Rendered:
    """Ids of a conversation. Its text never becomes a control token.

    An answer with `token_ids` is laid out as it was generated, so the next prompt begins with this one and the answer;
    its thoughts stay in the prompt then (without ids they are dropped, as the published template does).

    With `recall`, answers get the ids that they were once generated in, where those say just the same. Then each answer
    also keeps what its prompt ended with, the empty thought that switches thoughts off, which the template drops.
    """
    if not messages:
        raise RequestError("messages is empty; at least one message is needed.")
    think = _wants_thought(fmt, thinking)
    mode: Thinking = "off" if recall and fmt.thinking == "hybrid" and not think else fmt.thinking
    turns = fmt.compose(
        [_as_generated(message, tokenizer) for message in messages],
        tools,
        default_system=fmt.default_system,
        thinking=mode,
    )
    if add_generation_prompt and not turns[-1].open:
        turns.append(Turn("assistant", hermes.generation_parts(mode, think=think), open=True))
    ids, trained = encode_turns(turns, tokenizer, split_header=fmt.split_header, recall=recall)
    return Rendered(ids, trained)


def qwen1_mask(rendered: Rendered, tokenizer: Tokenizer) -> list[bool]:
    """The label mask of the published v1 fine-tuning script, which trains control tokens of every role too.

    Trained are assistant content, every <|im_start|>, every <|im_end|> and the newline after it.
    """
    ends = (tokenizer.im_end_id, *tokenizer.newline_ids)
    controls = (tokenizer.im_start_id, tokenizer.im_end_id)
    return [
        kept or token_id in controls or (i > 0 and (rendered.ids[i - 1], token_id) == ends)
        for i, (token_id, kept) in enumerate(zip(rendered.ids, rendered.trained, strict=True))
    ]


def trim_history(
    messages: Sequence[Message],
    tokenizer: Tokenizer,
    fmt: ChatFormat,
    max_window: int,
    *,
    answer_room: int = 0,
    tools: Sequence[Tool] = (),
    thinking: bool | None = None,
) -> tuple[Message, ...]:
    """Drop the oldest rounds until prompt and answer are shorter than the window, as v1's make_context does.

    Unlike there, the question and the room for the answer count. System message and last question always stay, even
    where they alone are too long: that is for the engine to refuse, with the numbers.
    """
    head, rounds = _rounds(messages)

    def kept(first: int) -> tuple[Message, ...]:
        return (*head, *(message for one in rounds[first:] for message in one))

    def fits(first: int) -> bool:
        prompt = render(kept(first), tokenizer, fmt, tools=tools, thinking=thinking)
        return len(prompt.ids) + answer_room < max_window

    return kept(_first_that(fits, len(rounds) - 1))


def _template(folder: Path) -> str | None:
    """Text of the chat template: its own file, or the entry of tokenizer_config.json (one, or a list with names)."""
    own = folder / "chat_template.jinja"
    if own.is_file():
        try:
            return own.read_text(encoding="utf-8")
        except ValueError as error:
            raise CheckpointError(f"{own} is not text in UTF-8: {error}.") from error
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return None
    try:
        raw = json.loads(path.read_text(encoding="utf-8")).get("chat_template")
    except (ValueError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} is not a JSON object: {error}") from error
    if isinstance(raw, list):
        entries = [entry for entry in raw if isinstance(entry, dict)]
        if not all(isinstance(entry.get("name"), str) for entry in entries):
            raise CheckpointError(f"{path} lists a chat_template whose name is not text.")
        raw = {entry["name"]: entry.get("template") for entry in entries}.get("default")
    return raw if isinstance(raw, str) else None


def _wants_thought(fmt: ChatFormat, thinking: bool | None) -> bool:
    if thinking and fmt.thinking == "none":
        raise RequestError(f"thinking is on, but a model of format {fmt.name} has no thinking mode. Leave it off.")
    if thinking is False and fmt.thinking == "always":
        raise RequestError("thinking is off, but this model always thinks before it answers. Leave it on.")
    return thinking is not False


def _as_generated(message: Message, tokenizer: Tokenizer) -> Message:
    """An answer's ids without the tokens that ended it, as the layout adds its own end.

    Its reasoning then says only whether the ids begin with a thought, and so how their prompt ended.
    """
    ids = message.token_ids
    if ids is None:
        return message
    closing = {tokenizer.im_end_id, tokenizer.im_start_id, tokenizer.end_of_text_id}
    end = len(ids)
    while end and ids[end - 1] in closing:
        end -= 1
    think_id = tokenizer.special_tokens.get(hermes.THINK)
    reasoning = hermes.THINK if end and ids[0] == think_id else ""
    return dataclasses.replace(message, token_ids=ids[:end], reasoning=reasoning)


def _rounds(messages: Sequence[Message]) -> tuple[tuple[Message, ...], list[list[Message]]]:
    """The system message, and the rest cut before each user message."""
    head = tuple(messages[:1]) if messages and messages[0].role == "system" else ()
    rounds: list[list[Message]] = []
    for message in messages[len(head) :]:
        if message.role == "user" or not rounds:
            rounds.append([])
        rounds[-1].append(message)
    return head, rounds


def _first_that(fits: Callable[[int], bool], last: int) -> int:
    """The smallest of 0..last that fits, or last; what fits stays fitting."""
    low, high = 0, max(last, 0)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle + 1, high)
    return low

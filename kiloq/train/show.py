"""Conversations as the trainer sees them, token by token: the look before a run. Knows no weights."""

from collections.abc import Iterator
from pathlib import Path
from typing import get_args

from kiloq.chat import Rendered, chat_format_for
from kiloq.checkpoint import bundled, open_checkpoint
from kiloq.errors import ConfigError
from kiloq.tokenizer import Tokenizer

from .conversations import read_conversations
from .rows import refuse_faults
from .samples import Mask, Samples

_TRAINED, _PLAIN = "\033[32m", "\033[0m"


def show_samples(data: Path, model: str | None, *, count: int, mask: str, colour: bool) -> Iterator[str]:
    """Lines for people: a trained token ends in * or is green, its neighbours are parted by |."""
    masks: dict[str, Mask] = {name: name for name in get_args(Mask)}
    if mask not in masks:
        raise ConfigError(f"mask is {mask}; it is one of {', '.join(masks)}.")
    checkpoint = open_checkpoint(model or bundled())
    fmt = chat_format_for(checkpoint.config.family, checkpoint.folder)
    samples = Samples(checkpoint.tokenizer, fmt, seq_len=checkpoint.config.max_length, mask=masks[mask])
    conversations, faults = read_conversations(data)
    refuse_faults(data, faults)
    for conversation in conversations[:count]:
        rendered = samples.render(conversation)
        yield f"{conversation.where}: {len(rendered.ids):,} tokens, {sum(rendered.trained):,} trained"
        yield from _lines(rendered, checkpoint.tokenizer, colour=colour)


def _lines(rendered: Rendered, tokenizer: Tokenizer, *, colour: bool) -> Iterator[str]:
    line: list[str] = []
    for token_id, trained in zip(rendered.ids, rendered.trained, strict=True):
        text = tokenizer.decode([token_id])
        word = repr(text)[1:-1]
        line.append(f"{_TRAINED}{word}{_PLAIN}" if trained and colour else f"{word}*" if trained else word)
        if text.endswith("\n"):
            yield "|".join(line)
            line = []
    if line:
        yield "|".join(line)

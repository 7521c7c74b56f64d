"""Turns become ids. Knows how ChatML is laid out in tokens, and nothing of who says what or why."""

from collections.abc import Sequence
from dataclasses import dataclass

from kiloq.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Part:
    """A piece of a turn: text, or ids as the model generated them.

    Only the format's own words (`markup`) may hold names of special tokens; in any other text they are plain text.
    """

    text: str = ""
    ids: tuple[int, ...] = ()
    trained: bool = False
    markup: bool = False


@dataclass(frozen=True, slots=True)
class Turn:
    """One block between <|im_start|> and <|im_end|>; an open one is still being written."""

    role: str
    parts: tuple[Part, ...] = ()
    open: bool = False


def encode_turns(turns: Sequence[Turn], tokenizer: Tokenizer, *, split_header: bool) -> tuple[list[int], list[bool]]:
    """Ids of the turns and whether each is trained: what an assistant wrote, and the token that ends it."""
    ids: list[int] = []
    trained: list[bool] = []
    for turn in turns:
        header = Part(f"{turn.role}\n")
        if split_header:  # Qwen v1 never lets the header and the content share a token
            body = [*tokenizer.encode(turn.role), *tokenizer.newline_ids]
            marks = [False] * len(body)
            rest = turn.parts
        else:
            body, marks, rest = [], [], (header, *turn.parts)
        more, more_marks = _encode_parts(rest, tokenizer)
        ids += [tokenizer.im_start_id, *body, *more]
        trained += [False, *marks, *more_marks]
        if not turn.open:
            ids += [tokenizer.im_end_id, *tokenizer.newline_ids]
            trained += [turn.role == "assistant", *[False] * len(tokenizer.newline_ids)]
    return ids, trained


def _encode_parts(parts: Sequence[Part], tokenizer: Tokenizer) -> tuple[list[int], list[bool]]:
    """Text that no special token interrupts is encoded as one, as transformers does with a rendered template."""
    ids: list[int] = []
    trained: list[bool] = []
    run: list[Part] = []
    for piece in [piece for part in parts for piece in _cut_markup(part, tokenizer)]:
        if piece.ids:
            _encode_run(run, tokenizer, ids, trained)
            run = []
            ids += piece.ids
            trained += [piece.trained] * len(piece.ids)
        else:
            run.append(piece)
    _encode_run(run, tokenizer, ids, trained)
    return ids, trained


def _cut_markup(part: Part, tokenizer: Tokenizer) -> list[Part]:
    """Names of special tokens inside markup become their ids."""
    if not part.markup:
        return [part]
    pieces, text = [], part.text
    while found := [(text.find(name), -len(name), name) for name in tokenizer.special_tokens if name in text]:
        at, _, name = min(found)
        pieces.append(Part(text[:at], trained=part.trained))
        pieces.append(Part(ids=(tokenizer.special_tokens[name],), trained=part.trained))
        text = text[at + len(name) :]
    return [*pieces, Part(text, trained=part.trained)]


def _encode_run(run: Sequence[Part], tokenizer: Tokenizer, ids: list[int], trained: list[bool]) -> None:
    """Append the ids of some text parts as one text; a token is trained if all of its bytes are."""
    new = tokenizer.encode("".join(part.text for part in run))
    ids += new
    if len({part.trained for part in run if part.text}) < 2:
        trained += [any(part.trained for part in run if part.text)] * len(new)
        return
    flags = [part.trained for part in run for _ in range(_num_bytes(part.text, tokenizer))]
    at = 0
    for token_id in new:
        size = len(tokenizer.token_bytes(token_id))
        span = flags[at : at + size]
        trained.append(bool(span) and all(span))
        at += size


def _num_bytes(text: str, tokenizer: Tokenizer) -> int:
    """Bytes of the text after the tokenizer's own normalisation."""
    return len(text) if text.isascii() else len(tokenizer.decode_bytes(tokenizer.encode(text)))

"""Turns become ids. Knows how ChatML is laid out in tokens, and nothing of who says what or why."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from kiloq.tokenizer import Tokenizer

Wording = tuple[str | int, ...]
"""What some ids say: text, and the ids of the special tokens in it."""

Recall = Callable[[Wording], Sequence[int] | None]
"""The ids in which a model once wrote just this, if they are remembered."""

_MOST_CUT = 32  # parts at the end of an answer without which it is looked for: a client may make up an endless one


@dataclass(frozen=True, slots=True)
class Part:
    """A piece of a turn: text, or ids as the model generated them.

    Only the format's own words (`markup`) may hold names of special tokens; in any other text they are plain text.
    Neighbours that are `generated` were written in one go by a model, if one wrote them.
    """

    text: str = ""
    ids: tuple[int, ...] = ()
    trained: bool = False
    markup: bool = False
    generated: bool = False


@dataclass(frozen=True, slots=True)
class Turn:
    """One block between <|im_start|> and <|im_end|>; an open one is still being written."""

    role: str
    parts: tuple[Part, ...] = ()
    open: bool = False


def untrained(parts: Sequence[Part]) -> tuple[Part, ...]:
    """The same parts, of which nothing is learned."""
    return tuple(replace(part, trained=False) for part in parts)


def encode_turns(
    turns: Sequence[Turn], tokenizer: Tokenizer, *, split_header: bool, recall: Recall | None = None
) -> tuple[list[int], list[bool]]:
    """Ids of the turns and whether each is trained: what an assistant wrote, and the token that ends it.

    `recall` may change how the text is cut into tokens, never the text.
    """
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
        more, more_marks = _encode_parts(rest, tokenizer, recall)
        ids += [tokenizer.im_start_id, *body, *more]
        trained += [False, *marks, *more_marks]
        if not turn.open:
            ids += [tokenizer.im_end_id, *tokenizer.newline_ids]
            # Who learns anything of an answer must learn to end it.
            trained += [any(part.trained for part in turn.parts), *[False] * len(tokenizer.newline_ids)]
    return ids, trained


def wording(ids: Sequence[int], tokenizer: Tokenizer) -> Wording | None:
    """What these ids say; None if it is no text."""
    special = frozenset(tokenizer.special_tokens.values())
    words: list[str | int] = []
    for is_special, group in groupby(ids, special.__contains__):
        if is_special:
            words += group
            continue
        plain = list(group)
        if not all(map(tokenizer.has, plain)):
            return None
        try:
            words.append(tokenizer.decode(plain, errors="strict"))
        except UnicodeDecodeError:
            return None
    return tuple(words)


def _encode_parts(parts: Sequence[Part], tokenizer: Tokenizer, recall: Recall | None) -> tuple[list[int], list[bool]]:
    """Text that no special token interrupts is encoded as one, as transformers does with a rendered template."""
    ids: list[int] = []
    trained: list[bool] = []
    run: list[Part] = []
    known = parts if recall is None else _recalled(parts, tokenizer, recall)
    for piece in [piece for part in known for piece in _cut_markup(part, tokenizer)]:
        if piece.ids:
            _encode_run(run, tokenizer, ids, trained)
            run = []
            ids += piece.ids
            trained += [piece.trained] * len(piece.ids)
        else:
            run.append(piece)
    _encode_run(run, tokenizer, ids, trained)
    return ids, trained


def _recalled(parts: Sequence[Part], tokenizer: Tokenizer, recall: Recall) -> list[Part]:
    """The parts, with remembered ids in place of what a model wrote, or of as much of it as is remembered."""
    known: list[Part] = []
    for generated, group in groupby(parts, lambda part: part.generated):
        rest = list(group)
        cut = [_cut_markup(part, tokenizer) for part in rest] if generated else []
        for end in range(len(cut), max(len(cut) - _MOST_CUT, 0), -1):
            ids = recall(_wording_of([piece for pieces in cut[:end] for piece in pieces]))
            if ids:
                known.append(Part(ids=tuple(ids), trained=True))
                rest = rest[end:]
                break
        known += rest
    return known


def _wording_of(pieces: Sequence[Part]) -> Wording:
    words: list[str | int] = []
    for is_text, group in groupby(pieces, lambda piece: not piece.ids):
        if is_text:
            words.append("".join(piece.text for piece in group))
        else:
            words += [token_id for piece in group for token_id in piece.ids]
    return tuple(word for word in words if word != "")


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

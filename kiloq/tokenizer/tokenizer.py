"""Text to ids and ids to text. Knows no file format; a Vocabulary comes in ready."""

import codecs
import operator
import re
from collections.abc import Collection, Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Literal

import regex
import tiktoken

from kiloq.errors import TokenizerError

from .formats import read_vocabulary, write_files
from .normalise import join_surrogates, nfc
from .vocabulary import END_OF_TEXT, IM_END, IM_START, Vocabulary

SpecialNames = Literal["all"] | Collection[str]

# tiktoken's regex engine keeps one stack entry per character of a blank run and panics at a million of them.
_LONG_BLANK = regex.compile(r"(?<!\s)\s{100000}")


class RefusedTextError(TokenizerError, ValueError):
    """The text contains a special token that the caller asked to refuse."""


class Tokenizer:
    """Encodes and decodes with one vocabulary; immutable, safe to share between threads."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        try:
            self._bpe = tiktoken.Encoding(
                vocabulary.name,
                pat_str=vocabulary.pattern,
                mergeable_ranks=dict(vocabulary.ranks),
                special_tokens={},  # special names are cut out below: longest first, and never by default
            )
        except ValueError as error:
            raise TokenizerError(f"{vocabulary.name} has a pattern that cannot be used: {error}") from error
        self.vocabulary = vocabulary
        self.special_tokens: Mapping[str, int] = dict(vocabulary.special)
        self.control_ids = frozenset(i for name, i in vocabulary.special.items() if name not in vocabulary.kept)
        self._table = {i: piece for piece, i in vocabulary.ranks.items()}
        self._table.update((i, name.encode()) for name, i in vocabulary.special.items())
        self._all_names = frozenset(vocabulary.special)
        self.size = max(self._table) + 1  # ids in use; rows of a model beyond it are spare
        self.newline_ids = tuple(self.encode("\n"))

    @classmethod
    def load(cls, folder: str | Path, *, extra_vocab: str | Path | None = None) -> "Tokenizer":
        """Read a folder or a vocabulary file; `extra_vocab` is a `.tiktoken` of pieces learned by `expand`."""
        return cls(read_vocabulary(Path(folder), None if extra_vocab is None else Path(extra_vocab)))

    def __repr__(self) -> str:
        return f"Tokenizer({self.vocabulary.name!r}, size={self.size})"

    def __len__(self) -> int:
        return self.size

    @property
    def end_of_text_id(self) -> int:
        return self._special_id(END_OF_TEXT)

    @property
    def im_start_id(self) -> int:
        return self._special_id(IM_START)

    @property
    def im_end_id(self) -> int:
        return self._special_id(IM_END)

    def encode(
        self, text: str, *, allowed_special: SpecialNames = (), disallowed_special: SpecialNames = ()
    ) -> list[int]:
        """Ids of a text. Names of special tokens are plain text unless allowed, and an error if disallowed."""
        text = join_surrogates(text)
        if self.vocabulary.nfc:
            text = nfc(text)
        allowed = self._names(allowed_special, "allowed_special")
        refused = self._names(disallowed_special, "disallowed_special")
        if disallowed_special == "all":
            refused -= allowed
        if refused and (found := _any_of(refused).search(text)):
            raise RefusedTextError(
                f"the text contains {found[0]!r} at character {found.start()}, which is disallowed here. "
                "Remove it, or take it out of disallowed_special to encode it as plain text."
            )
        if not allowed:
            return self._encode_plain(text)
        ids: list[int] = []
        for i, part in enumerate(_any_of(allowed).split(text)):  # odd parts are the names themselves
            ids.extend([self.special_tokens[part]] if i % 2 else self._encode_plain(part))
        return ids

    def decode(self, ids: Iterable[int], *, skip_special: bool = False, errors: str = "replace") -> str:
        """Text of some ids; `errors` is what bytes.decode does with bytes that are no character."""
        if skip_special:
            ids = [i for i in map(operator.index, ids) if i not in self.control_ids]
        return self.decode_bytes(ids).decode("utf-8", errors)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return b"".join(map(self.token_bytes, ids))

    def token_bytes(self, token_id: int) -> bytes:
        """Bytes of one token; an id that no token has, such as a spare row of the model, shows as a placeholder."""
        token_id = operator.index(token_id)
        return self._table.get(token_id) or f"<|unused_{token_id}|>".encode()

    def has(self, token_id: int) -> bool:
        """Whether this id stands for a token."""
        return token_id in self._table

    def stream_decoder(self, *, skip_special: bool = True, errors: str = "replace") -> "StreamDecoder":
        return StreamDecoder(self, skip_special=skip_special, errors=errors)

    def save(self, folder: str | Path) -> None:
        """Write the files that load() would read, in the format they came in."""
        write_files(Path(folder), self.vocabulary.files)

    def _special_id(self, name: str) -> int:
        if name not in self.special_tokens:
            raise TokenizerError(f"{self.vocabulary.name} has no token {name}; this is not a Qwen vocabulary.")
        return self.special_tokens[name]

    def _names(self, names: SpecialNames, option: str) -> frozenset[str]:
        if names == "all":
            return self._all_names
        if isinstance(names, str):
            raise TokenizerError(f'{option} is {names!r}; give "all" or a set of names.')
        return self._all_names.intersection(names)

    def _encode_plain(self, text: str) -> list[int]:
        if _LONG_BLANK.search(text) is None:
            return self._bpe.encode_ordinary(text)
        # The same cut by the regex package, which has no such limit; piece by piece it is slower.
        pieces = regex.findall(self.vocabulary.pattern, text)
        return [token_id for piece in pieces for token_id in self._bpe._encode_single_piece(piece)]


class StreamDecoder:
    """Turns one answer's ids into text as they come: constant work per id, and only whole characters."""

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool, errors: str) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.control_ids if skip_special else frozenset()
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors)

    def push(self, token_id: int) -> str:
        """Text that this id completes; empty while a character is still open."""
        if token_id in self._skipped:
            return ""
        return self._utf8.decode(self._tokenizer.token_bytes(token_id))

    def flush(self) -> str:
        """What is left when the answer ends: nothing, or the sign for a broken character."""
        return self._utf8.decode(b"", final=True)


@lru_cache(maxsize=64)
def _any_of(names: frozenset[str]) -> re.Pattern[str]:
    longest_first = sorted(names, key=lambda name: (-len(name), name))
    return re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")

"""How a checkpoint wants to be sampled and when its answers end, from its small JSON files. Knows no tensors."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from kiloq.errors import CheckpointError
from kiloq.model.config import Family
from kiloq.tokenizer import Tokenizer

from .files import read_config, read_json

ChatKind = Literal["chatml", "raw"]

_FILE = "generation_config.json"
_QWEN1_WINDOW = 6144  # make_context's default: what a v1 prompt may hold


@dataclass(frozen=True)
class GenerationDefaults:
    """What generation_config.json says. `temperature` 0 is greedy, `top_k` 0 and `top_p` 1 are off; `max_tokens`
    None means unlimited. `max_window` is how many tokens of history a prompt may hold."""

    stop_ids: tuple[int, ...]
    pad_id: int
    chat_format: ChatKind
    max_window: int
    max_tokens: int | None = None
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0

    @classmethod
    def from_files(cls, folder: Path, tokenizer: Tokenizer, *, settings: Path | None = None) -> "GenerationDefaults":
        """Read a folder; what generation_config.json leaves open comes from config.json and the tokenizer.

        `settings` is another folder whose generation_config.json counts instead.
        """
        config = read_config(folder)
        path = (settings or folder) / _FILE
        fields = _Fields(path, read_json(path) if path.is_file() else {})
        eos = fields.ids("eos_token_id") or _Fields(folder / "config.json", read_json(folder / "config.json")).ids(
            "eos_token_id"
        )
        stops = (*(eos or (tokenizer.end_of_text_id,)), *fields.stop_words())
        # Qwen v1 names its format; later generations only show it by what ends an answer.
        chat_format = fields.chat_format() or ("chatml" if tokenizer.im_end_id in stops else "raw")
        if chat_format == "chatml" and config.family == "qwen":
            stops = (tokenizer.im_end_id, tokenizer.im_start_id, *stops)
        window = min(_QWEN1_WINDOW, config.max_length) if config.family == "qwen" else config.max_length
        pad = fields.ids("pad_token_id")
        greedy = fields.flag("do_sample") is False
        return cls(
            stop_ids=tuple(dict.fromkeys(stops)),
            pad_id=pad[0] if pad else tokenizer.end_of_text_id,
            chat_format=chat_format,
            max_window=fields.whole("max_window_size", low=1) or window,
            max_tokens=fields.whole("max_new_tokens", low=1),
            temperature=0.0 if greedy else fields.number("temperature", low=0.0, default=1.0),
            top_k=max(fields.whole("top_k", low=-1) or 0, 0),  # -1 is another spelling of "off"
            top_p=fields.number("top_p", low=0.0, high=1.0, default=1.0),
            repetition_penalty=fields.number("repetition_penalty", low=1e-3, default=1.0),
        )

    def to_json(self, family: Family, tokenizer: Tokenizer) -> dict[str, object]:
        """The generation_config.json that `from_files` reads back, in words that v1 code and transformers know."""
        ends: dict[str, object] = {"eos_token_id": list(self.stop_ids)}
        if family == "qwen":
            turn_ids = (tokenizer.im_end_id, tokenizer.im_start_id) if self.chat_format == "chatml" else ()
            others = [stop for stop in self.stop_ids if stop not in turn_ids] or [tokenizer.end_of_text_id]
            ends = {"eos_token_id": others[0], "stop_words_ids": [[stop] for stop in others]}
        sampling: dict[str, object] = {"do_sample": False}
        if self.temperature > 0:  # transformers refuses to save these beside do_sample false
            sampling = {
                "do_sample": True,
                "temperature": self.temperature,
                "top_k": self.top_k,
                "top_p": self.top_p,
            }
        return {
            "chat_format": self.chat_format,
            **ends,
            "pad_token_id": self.pad_id,
            "max_window_size": self.max_window,
            **({} if self.max_tokens is None else {"max_new_tokens": self.max_tokens}),
            **sampling,
            "repetition_penalty": self.repetition_penalty,
        }


class _Fields:
    """Typed access to one JSON file: unknown keys pass, an ill-typed one is an error that names file and key."""

    def __init__(self, path: Path, raw: Mapping[str, object]) -> None:
        self.path = path
        self.raw = raw

    def wrong(self, key: str, need: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {key} is {self.raw[key]!r}; {need} is needed.")

    def whole(self, key: str, *, low: int) -> int | None:
        value = self.raw.get(key)
        if value is None:
            return None
        if not isinstance(value, int) or isinstance(value, bool) or value < low:
            raise self.wrong(key, f"a whole number of at least {low}")
        return value

    def number(self, key: str, *, low: float, high: float = math.inf, default: float) -> float:
        value = self.raw.get(key)
        if value is None:
            return default
        if not isinstance(value, int | float) or isinstance(value, bool) or not low <= value <= min(high, 1e9):
            raise self.wrong(key, f"a number from {low:g}" + (f" to {high:g}" if high < math.inf else ""))
        return float(value)

    def flag(self, key: str) -> bool | None:
        value = self.raw.get(key)
        if value is not None and not isinstance(value, bool):
            raise self.wrong(key, "true or false")
        return value

    def ids(self, key: str) -> tuple[int, ...]:
        value = self.raw.get(key)
        if value is None:
            return ()
        listed = value if isinstance(value, list) else [value]
        if not all(isinstance(item, int) and not isinstance(item, bool) and item >= 0 for item in listed):
            raise self.wrong(key, "a token id or a list of them")
        return tuple(listed)

    def stop_words(self) -> tuple[int, ...]:
        """v1's stop_words_ids: a list of id sequences, of which all published files hold single ids."""
        value = self.raw.get("stop_words_ids")
        if value is None:
            return ()
        one_id_each = isinstance(value, list) and all(
            isinstance(word, list) and len(word) == 1 and isinstance(word[0], int) and not isinstance(word[0], bool)
            for word in value
        )
        if not one_id_each:
            raise self.wrong(
                "stop_words_ids", "a list of lists of one token id (longer stop words are given as text, with stop=)"
            )
        return tuple(word[0] for word in value)  # type: ignore[attr-defined]  # checked above

    def chat_format(self) -> ChatKind | None:
        value = self.raw.get("chat_format")
        match value:
            case None | "chatml" | "raw":
                return value
        raise self.wrong("chat_format", "'chatml' or 'raw'")

"""A tokenizer with the calls of transformers and of Qwen v1: padded batches, tensors, specials in text by default."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Literal, Protocol, overload, runtime_checkable

import torch
from torch import Tensor

from kiloq.errors import RequestError, TokenizerError
from kiloq.tokenizer import Tokenizer

from .arguments import WithoutEffect, check_names

Names = Literal["all"] | Collection[str]
Token = bytes | str  # a piece of text, or the name of a special token

# No special token is added, decoded text is not cleaned up, and the model has no token types.
_WITHOUT_EFFECT: WithoutEffect = {
    "add_special_tokens": None,
    "clean_up_tokenization_spaces": None,
    "return_attention_mask": (None, True),
    "return_token_type_ids": (None, False),
}


@runtime_checkable
class _Listable(Protocol):
    """A tensor or an array."""

    def tolist(self) -> object: ...


class BatchEncoding(dict[str, object]):
    """Inputs of a model by name, also as attributes; `to` moves the tensors."""

    def __getattr__(self, name: str) -> object:
        if name in self:
            return self[name]
        raise AttributeError(name)

    def to(self, device: str | torch.device) -> "BatchEncoding":
        return BatchEncoding(
            {name: value.to(device) if isinstance(value, Tensor) else value for name, value in self.items()}
        )


class QwenTokenizer:
    """Encodes names of special tokens in text as the tokens themselves, unless told otherwise, as v1's did.

    `padding_side` and `pad_token` serve batches; the end-of-text token is the default for `pad_token` and `eos_token`.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        pad_token: str | None = None,
        eos_token: str | None = None,
        padding_side: str = "right",
        errors: str = "replace",
    ) -> None:
        if padding_side not in ("left", "right"):
            raise RequestError(f"padding_side is {padding_side!r}; it must be 'left' or 'right'.")
        self.tokenizer = tokenizer
        self.padding_side = padding_side
        self.errors = errors
        self.eod_id = tokenizer.end_of_text_id
        self.im_start_id, self.im_end_id = tokenizer.im_start_id, tokenizer.im_end_id
        self.eos_token_id = self._known(eos_token)
        self.pad_token_id = self._known(pad_token)

    @property
    def pad_token(self) -> str:
        return self._name(self.pad_token_id)

    @property
    def eos_token(self) -> str:
        return self._name(self.eos_token_id)

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.size

    def __len__(self) -> int:
        return self.tokenizer.size

    def __call__(
        self,
        text: str | Sequence[str],
        *,
        return_tensors: str | None = None,
        padding: bool | str = False,
        truncation: bool = False,
        max_length: int | None = None,
        allowed_special: Names = "all",
        disallowed_special: Names = (),
        **others: object,
    ) -> BatchEncoding:
        """Ids and attention mask of one text or of several."""
        check_names(QwenTokenizer.__call__, others, _WITHOUT_EFFECT)
        _check_tensors(return_tensors)
        texts = [text] if isinstance(text, str) else list(text)
        rows = [
            self.encode(one, allowed_special=allowed_special, disallowed_special=disallowed_special) for one in texts
        ]
        if truncation and max_length is not None:
            rows = [row[:max_length] for row in rows]
        masks = [[1] * len(row) for row in rows]
        if padding:
            width = max(map(len, rows), default=0)
            if padding == "max_length" and max_length is not None:
                width = max_length
            rows = [self._pad(row, width, self.pad_token_id) for row in rows]
            masks = [self._pad(mask, width, 0) for mask in masks]
        if return_tensors == "pt":
            if len({len(row) for row in rows}) > 1:
                raise RequestError("the texts have different lengths; pass padding='longest' to make them one tensor.")
            return BatchEncoding(input_ids=torch.tensor(rows), attention_mask=torch.tensor(masks))
        if isinstance(text, str):
            return BatchEncoding(input_ids=rows[0], attention_mask=masks[0])
        return BatchEncoding(input_ids=rows, attention_mask=masks)

    @overload
    def encode(
        self,
        text: str,
        *,
        allowed_special: Names = ...,
        disallowed_special: Names = ...,
        return_tensors: None = ...,
        **others: object,
    ) -> list[int]: ...
    @overload
    def encode(
        self,
        text: str,
        *,
        allowed_special: Names = ...,
        disallowed_special: Names = ...,
        return_tensors: str,
        **others: object,
    ) -> Tensor: ...
    def encode(
        self,
        text: str,
        *,
        allowed_special: Names = "all",
        disallowed_special: Names = (),
        return_tensors: str | None = None,
        **others: object,
    ) -> list[int] | Tensor:
        """Ids of a text, as a tensor [1, T] if asked; a disallowed name in it is an error that is a ValueError too."""
        check_names(QwenTokenizer.encode, others, _WITHOUT_EFFECT)
        _check_tensors(return_tensors)
        ids = self.tokenizer.encode(text, allowed_special=allowed_special, disallowed_special=disallowed_special)
        return ids if return_tensors is None else torch.tensor([ids])

    def tokenize(self, text: str, allowed_special: Names = "all", disallowed_special: Names = ()) -> list[Token]:
        ids = self.encode(text, allowed_special=allowed_special, disallowed_special=disallowed_special)
        return self.convert_ids_to_tokens(ids)

    def decode(
        self, token_ids: object, skip_special_tokens: bool = False, *, errors: str | None = None, **others: object
    ) -> str:
        """Text of an id, a list, an array or a tensor of ids."""
        check_names(QwenTokenizer.decode, others, _WITHOUT_EFFECT)
        return self.tokenizer.decode(id_list(token_ids), skip_special=skip_special_tokens, errors=errors or self.errors)

    def batch_decode(
        self,
        rows: Sequence[object] | Tensor,
        skip_special_tokens: bool = False,
        *,
        errors: str | None = None,
        **others: object,
    ) -> list[str]:
        check_names(QwenTokenizer.batch_decode, others, _WITHOUT_EFFECT)
        return [self.decode(row, skip_special_tokens, errors=errors) for row in rows]

    def convert_ids_to_tokens(self, ids: object) -> list[Token]:
        """Bytes of pieces of text, names of special tokens."""
        names = {token_id: name for name, token_id in self.tokenizer.special_tokens.items()}
        return [names.get(token_id) or self.tokenizer.token_bytes(token_id) for token_id in id_list(ids)]

    def convert_tokens_to_ids(self, tokens: Token | Sequence[Token]) -> int | list[int]:
        if isinstance(tokens, bytes | str):
            return self._id(tokens)
        return [self._id(token) for token in tokens]

    def get_vocab(self) -> Mapping[bytes, int]:
        """The pieces of text; special tokens are not among them."""
        return dict(self.tokenizer.vocabulary.ranks)

    def save_pretrained(self, folder: str | Path) -> None:
        self.tokenizer.save(folder)

    def _known(self, name: str | None) -> int:
        if name is None:
            return self.eod_id
        if name not in self.tokenizer.special_tokens:
            raise TokenizerError(f"{name!r} is no special token of this vocabulary; <|endoftext|> and <|extra_0|> are.")
        return self.tokenizer.special_tokens[name]

    def _name(self, token_id: int) -> str:
        return self.tokenizer.token_bytes(token_id).decode()

    def _id(self, token: Token) -> int:
        table: Mapping[bytes, int] | Mapping[str, int]
        table = self.tokenizer.special_tokens if isinstance(token, str) else self.tokenizer.vocabulary.ranks
        if token not in table:
            raise TokenizerError(f"{token!r} is no token of this vocabulary.")
        return table[token]  # type: ignore[index]  # the table is of the token's own type

    def _pad(self, row: list[int], width: int, filler: int) -> list[int]:
        padding = [filler] * (width - len(row))
        return padding + row if self.padding_side == "left" else row + padding


def id_list(ids: object) -> list[int]:
    """Ids as a list, from an id, a sequence, an array or a one-dimensional tensor."""
    listed = ids.tolist() if isinstance(ids, _Listable) else ids
    if isinstance(listed, int):
        return [listed]
    if isinstance(listed, Sequence) and all(isinstance(token_id, int) for token_id in listed):
        return list(listed)
    raise RequestError(f"token ids are {type(ids).__name__}; they must be one id, or one list or tensor of ids.")


def _check_tensors(return_tensors: str | None) -> None:
    if return_tensors not in (None, "pt"):
        raise RequestError(f"return_tensors is {return_tensors!r}; it must be 'pt' or None.")

"""The three functions of v1's qwen_generation_utils, by which people batch chats by hand."""

import logging
from collections.abc import Sequence

from kiloq.chat import QWEN1, Message, render, trim_history
from kiloq.errors import RequestError

from .tokenizer import QwenTokenizer, id_list

History = Sequence[Sequence[str]]

logger = logging.getLogger(__name__)


def make_context(
    tokenizer: QwenTokenizer,
    query: str,
    history: History | None = None,
    system: str = "",
    max_window_size: int = 6144,
    chat_format: str = "chatml",
) -> tuple[str, list[int]]:
    """The prompt of a question as text and as ids, with as many of the last rounds as are shorter than the window.

    Unlike the original, the question counts too. The text encodes to the ids unless it holds names of special tokens.
    """
    if chat_format == "raw":
        return query, tokenizer.encode(query)
    _check(chat_format)
    messages = conversation(query, history, system)
    kept = trim_history(messages, tokenizer.tokenizer, QWEN1, max_window_size)
    blocks = [f"<|im_start|>{message.role}\n{message.content}<|im_end|>\n" for message in kept]
    return "".join(blocks) + "<|im_start|>assistant\n", render(kept, tokenizer.tokenizer, QWEN1).ids


def decode_tokens(
    tokens: object,
    tokenizer: QwenTokenizer,
    raw_text_len: int,
    context_length: int,
    chat_format: str,
    verbose: bool = False,
    return_end_reason: bool = False,
    errors: str = "replace",
) -> str | tuple[str, str]:
    """The answer in the ids of prompt and answer, up to where its turn ends; with the reason of the end, if asked.

    The prompt is told apart by `context_length` tokens, not by `raw_text_len` characters: the original lost text where
    normalisation changes the number of characters.
    """
    ids = id_list(tokens)
    if chat_format == "raw":
        ends = {tokenizer.eod_id}
    else:
        _check(chat_format)
        ends = {tokenizer.im_start_id, tokenizer.im_end_id}
    end = next((i for i in range(context_length, len(ids)) if ids[i] in ends), len(ids))
    reason = f"Gen length {len(ids)}" if end == len(ids) else f"Gen {tokenizer.decode(ids[end])!r}"
    text = tokenizer.decode(ids[context_length:end], errors=errors).strip()
    if verbose:
        logger.info("%s; %s", text, reason)
    return (text, reason) if return_end_reason else text


def get_stop_words_ids(chat_format: str, tokenizer: QwenTokenizer) -> list[list[int]]:
    """What ends an answer, as sequences of ids."""
    if chat_format == "raw":
        return [tokenizer.encode("Human:"), [tokenizer.eod_id]]
    _check(chat_format)
    return [[tokenizer.im_end_id], [tokenizer.im_start_id]]


def conversation(query: str, history: History | None, system: str | None) -> list[Message]:
    """Messages of a query and its history of (question, answer) pairs; no system message for None."""
    messages = [] if system is None else [Message(role="system", content=system)]
    for i, pair in enumerate(history or ()):
        if isinstance(pair, str) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise RequestError(f"history[{i}] is {pair!r}; it must be a pair of texts (question, answer).")
        messages += [Message(role="user", content=pair[0]), Message(role="assistant", content=pair[1])]
    return [*messages, Message(role="user", content=query)]


def _check(chat_format: str) -> None:
    if chat_format != "chatml":
        raise RequestError(f"chat_format is {chat_format!r}; it must be 'chatml' or 'raw'.")

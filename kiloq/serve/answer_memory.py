"""The ids in which answers were made, by what they say, so that a later prompt repeats them token for token.

A client sends text back, and text may be cut into tokens otherwise than the model wrote it: what the cache holds of the
answer would be of no use. Knows no conversations: whatever says just the same gets the same ids, so what is remembered
changes no prompt's text, whatever a client makes up.
"""

import threading
import unicodedata
from array import array
from collections import OrderedDict
from collections.abc import Sequence

from kiloq.chat import Wording, wording
from kiloq.tokenizer import Tokenizer


class AnswerMemory:
    """The latest answers, up to `max_tokens` together. May be used by several threads."""

    def __init__(self, tokenizer: Tokenizer, *, max_tokens: int) -> None:
        self._tokenizer = tokenizer
        self._max_tokens = max_tokens
        self._num_tokens = 0
        self._known: OrderedDict[Wording, array[int]] = OrderedDict()
        self._lock = threading.Lock()

    def remember(self, ids: Sequence[int], num_chars: int) -> None:
        """An answer that a client saw `num_chars` characters of; a stop string may have cut off the rest."""
        words = wording(ids, self._tokenizer)
        self._keep(words, ids)
        if words and len(words) == 1 and isinstance(words[0], str) and len(words[0]) > num_chars:
            cut = len(words[0][num_chars:].encode())
            end = len(ids)
            while cut > 0:
                end -= 1
                cut -= len(self._tokenizer.token_bytes(ids[end]))
            if cut == 0:  # the stop string began with a token
                self._keep((words[0][:num_chars],), ids[:end])

    def recall(self, words: Wording) -> Sequence[int] | None:
        """The ids that say just this, if an answer did."""
        with self._lock:
            ids = self._known.get(words)
            if ids is not None:
                self._known.move_to_end(words)
        return ids

    def _keep(self, words: Wording | None, ids: Sequence[int]) -> None:
        # A tokenizer that normalises text would not write such ids for this text.
        is_normal = not self._tokenizer.vocabulary.nfc or all(
            isinstance(word, int) or unicodedata.is_normalized("NFC", word) for word in words or ()
        )
        if not words or not ids or not is_normal or len(ids) > self._max_tokens:
            return
        with self._lock:
            self._num_tokens += len(ids) - len(self._known.pop(words, ()))
            self._known[words] = array("I", ids)
            while self._num_tokens > self._max_tokens:
                self._num_tokens -= len(self._known.popitem(last=False)[1])

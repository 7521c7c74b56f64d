"""Which tokens may come next so that an answer matches what was asked of its form. Knows token ids, not logits.

llguidance does the matching: a lexer by derivatives under an Earley parser, over the trie of the vocabulary's bytes.
Control tokens are no text, so a grammar reaches them only by name; added tokens that are text, such as <tool_call>, are
bytes like any other. The end of an answer is a token of our own behind the model's rows: what ends it there is the
request's affair.
"""

import json
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from kiloq.chat.answer_grammar import json_expression
from kiloq.errors import ConstraintError
from kiloq.tokenizer import Tokenizer

from .free_text import FreeSpan, FreeText, Key
from .params import Constraint

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

Bools = NDArray[np.bool_]

_KEPT = 64  # compiled grammars
_SHOWN = 300  # characters of an error
_STEP_ITEMS = 10_000  # of the Earley parser for one token; docs/decisions/0019
_GRAMMAR_SIZE = 200_000  # symbols
_SLOW, _MOST_SLOW = 0.05, 20  # seconds of a look at what may come next, and how many such looks an answer may take
_REMEMBERED = 64  # places in a grammar's free text
_STACK = 1 << 29  # bytes: llguidance walks chains of rules and references by recursion, and overflow ends the process


@dataclass(frozen=True, slots=True)
class Grammar:
    """A compiled constraint: the beginning of any answer under it, and what is known of its free text."""

    beginning: "LLMatcher"
    free: FreeSpan | None
    bits: dict[Key, bytes]  # by place in free text, which tokens are allowed; filled by matchers


class Grammars:
    """Grammars compiled for one vocabulary, the latest kept. `compile` may be called by several threads."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size  # of the model; the token after the last ends an answer
        self._lock = threading.Lock()
        self._trie: LLTokenizer | None = None
        self._compiled: OrderedDict[Constraint, Grammar] = OrderedDict()

    def compile(self, constraint: Constraint) -> Grammar:
        """What a constraint means; RequestError that says what is wrong with it."""
        with self._lock:
            if self._trie is None:
                self._trie = _trie(self._tokenizer, self._vocab_size)
            known = self._compiled.get(constraint)
            if known is not None:
                self._compiled.move_to_end(constraint)
                return known
        # Without the lock: a grammar that takes long stops nobody else.
        beginning = self._on_deep_stack(partial(_compiled, constraint, self._trie))
        grammar = Grammar(beginning, FreeSpan.of_grammar(constraint.source) if constraint.kind == "lark" else None, {})
        with self._lock:
            self._compiled[constraint] = grammar
            if len(self._compiled) > _KEPT:
                self._compiled.popitem(last=False)
        return grammar

    def matcher(self, constraint: Constraint, stop_ids: Collection[int]) -> "Matcher":
        """For one answer, which these ids may end where the constraint lets it end."""
        grammar = self.compile(constraint)
        free = None if grammar.free is None else FreeText(grammar.free)
        vocabulary = _Answerable(self._tokenizer, self._vocab_size, tuple(i for i in stop_ids if i < self._vocab_size))
        matcher = Matcher(grammar, grammar.beginning.deep_copy(), free, vocabulary)
        if not matcher.allowed.any():
            raise _refused(constraint, matcher.error or "only an empty answer matches it, and nothing ends that one.")
        return matcher

    def _on_deep_stack(self, job: "Callable[[], LLMatcher]") -> "LLMatcher":
        with ThreadPoolExecutor(1) as executor:
            with self._lock:
                before = threading.stack_size(_STACK)
                try:
                    future = executor.submit(job)  # starts the thread
                finally:
                    threading.stack_size(before)
            return future.result()


@dataclass(frozen=True, slots=True)
class _Answerable:
    """The tokens of which an answer consists, and those that end it."""

    tokenizer: Tokenizer
    size: int
    stop_ids: tuple[int, ...]


class Matcher:
    """How far one answer has come in its grammar: `allowed` [V] are the tokens that may come next.

    `is_over`: nothing can follow. `error`: nothing can follow, and the answer is not complete either.
    """

    def __init__(self, grammar: Grammar, matcher: "LLMatcher", free: FreeText | None, vocabulary: _Answerable) -> None:
        self._grammar = grammar
        self._matcher = matcher
        self._free = free
        self._vocabulary = vocabulary
        self._num_slow = 0
        self.is_over = False
        self.error: str | None = None
        self.allowed = self._look()

    def accept(self, token_id: int) -> None:
        """The answer goes on with this token."""
        if token_id in self._vocabulary.stop_ids and self.allowed[token_id]:
            self.is_over = True
            return
        self._matcher.consume_token(token_id)
        if self._free is not None:
            self._free.push(self._vocabulary.tokenizer.token_bytes(token_id))
        self.allowed = self._look()

    def forced(self, most: int) -> tuple[int, ...]:
        """The next tokens, at most so many, if the form leaves only one text to go on with: cut as the tokenizer does.

        They are likely, not certain: the same text can be cut in other ways.
        """
        return () if self.is_over else tuple(self._matcher.compute_ff_tokens()[:most])

    def fork(self, token_ids: Sequence[int]) -> "Matcher | None":
        """A matcher that has gone on with these tokens; None if they leave the grammar or end it."""
        ahead, free = self._matcher.deep_copy(), copy(self._free)
        if ahead.try_consume_tokens([*token_ids]) < len(token_ids):
            return None
        if free is not None:
            for token_id in token_ids:
                free.push(self._vocabulary.tokenizer.token_bytes(token_id))
        other = Matcher(self._grammar, ahead, free, self._vocabulary)
        return None if other.is_over else other

    def _look(self) -> Bools:
        """Which tokens may come next; sets `is_over` and `error` if none may."""
        size, stop_ids = self._vocabulary.size, self._vocabulary.stop_ids
        allowed = np.unpackbits(np.frombuffer(self._bits(), np.uint8), count=size + 1, bitorder="little").view(np.bool_)
        may_end, allowed = bool(allowed[-1]), allowed[:-1]
        allowed[[*stop_ids]] = False
        self.is_over = not allowed.any()
        if self._num_slow > _MOST_SLOW:
            self.is_over, self.error = True, "it is too costly to follow."
        elif self._matcher.is_error() or (self.is_over and not may_end):
            self.is_over, self.error = True, self._matcher.get_error() or "no token can come next."
        allowed[[*stop_ids]] = may_end
        return allowed

    def _bits(self) -> bytes:
        """llguidance's set of allowed tokens, computed or remembered."""
        key = None if self._free is None or self._matcher.is_error() else self._free.key
        known = None if key is None else self._grammar.bits.get(key)
        if known is not None:
            return known
        begun = time.thread_time()  # not the clock: on a busy machine that would blame the grammar
        bits = self._matcher.compute_bitmask()
        self._num_slow += time.thread_time() - begun > _SLOW
        if key is not None and len(self._grammar.bits) < _REMEMBERED:
            self._grammar.bits[key] = bits
        return bits


class _Vocabulary:
    """A tokenizer as llguidance wants to see one."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        used = min(tokenizer.size, vocab_size)
        # No bytes: a token that is in no text, like the model's rows beyond the vocabulary.
        self.tokens = [tokenizer.token_bytes(i) if tokenizer.has(i) else b"" for i in range(used)]
        self.tokens += [b""] * (vocab_size - used) + [b"<|end of the answer|>"]
        self.eos_token_id = vocab_size
        self.special_token_ids = [*(i for i in tokenizer.control_ids if i < vocab_size), vocab_size]

    def __call__(self, text: str) -> list[int]:
        return self._tokenizer.encode(text)


def _trie(tokenizer: Tokenizer, vocab_size: int) -> "LLTokenizer":
    from llguidance import LLTokenizer

    return LLTokenizer(_Vocabulary(tokenizer, vocab_size), n_vocab=vocab_size + 1)  # type: ignore[arg-type]  # what it calls is there


def _compiled(constraint: Constraint, trie: "LLTokenizer") -> "LLMatcher":
    from llguidance import LLMatcher, LLParserLimits

    limits = LLParserLimits(verbose_errors=False, step_max_items=_STEP_ITEMS, max_grammar_size=_GRAMMAR_SIZE)
    matcher = LLMatcher(trie, _grammar(constraint), log_level=0, limits=limits)
    if not matcher.is_error() and not any(matcher.compute_bitmask()):
        raise _refused(constraint, "no answer can match it.")
    if matcher.is_error():
        raise _refused(constraint, matcher.get_error())
    return matcher


def _grammar(constraint: Constraint) -> str:
    """llguidance's own form of a constraint."""
    from llguidance import LLMatcher

    source = constraint.source
    if constraint.kind == "regex":
        return LLMatcher.grammar_from_regex(source)
    if constraint.kind == "lark":
        return LLMatcher.grammar_from_lark(source)
    if constraint.kind == "choice":
        # One terminal, which is an automaton; as rules, thousands of choices would be thousands of items per token.
        choices = " | ".join(json.dumps(text) for text in json.loads(source))
        return LLMatcher.grammar_from_lark(f"start: CHOICE\nCHOICE: {choices}")
    schema = json.loads(source) if constraint.kind == "json_schema" else {"type": "object"}
    return LLMatcher.grammar_from_lark(f"start: {json_expression(schema)}")


def _refused(constraint: Constraint, why: str) -> ConstraintError:
    shown = " ".join(why.split())[:_SHOWN]
    return ConstraintError(f"the answer cannot be held to this {constraint.kind.replace('_', ' ')}: {shown}")

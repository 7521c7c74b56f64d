"""One question and its answer, and which of them are kept for the held-out test."""

import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field

HELDOUT_ONE_IN = 20


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """A user turn and the answer to it.

    `key` names the combination that the held-out test keeps to itself (the wording of the question unless the topic
    says otherwise); `expect` is what a right answer must contain (one of several, separated by tabs; "" for none);
    `value` is what a follow-up question may refer to.
    """

    topic: str
    user: str
    answer: str
    key: str = ""
    expect: str = ""
    value: str = ""

    @property
    def heldout(self) -> bool:
        """Whether this combination belongs to the held-out test; never true of what has no single answer."""
        return bool(self.expect) and zlib.crc32((self.key or self.user).encode()) % HELDOUT_ONE_IN == 0


Topic = Callable[[random.Random, str], Exchange]
Message = dict[str, object]


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A whole conversation as one line of the output; messages and tools in OpenAI's form."""

    topic: str
    lang: str
    messages: list[Message]
    tools: list[dict[str, object]] = field(default_factory=list)
    expect: str = ""
    heldout: bool = False


def draw(rng: random.Random, lang: str, topic: Topic, *, heldout: bool) -> Exchange:
    """An exchange from the asked side of the split; gives up to the training side when a topic has no held-out ones."""
    exchange = topic(rng, lang)
    for _ in range(400):
        if exchange.heldout == heldout:
            break
        exchange = topic(rng, lang)
    return exchange

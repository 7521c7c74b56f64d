"""Rewards that a few lines can check: an answer in, a number out. Knows no model.

A closed table, so that a recipe never runs code of its own; from Python any function of attempts can be passed.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from kiloq.chat import Message
from kiloq.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One answer to a prompt. `expected` is the answer that the data has for it."""

    messages: tuple[Message, ...]
    expected: str
    text: str
    ids: tuple[int, ...]  # prompt and answer, with the token that ended it
    num_tokens: int  # of the answer
    is_finished: bool  # it ended by itself


Reward = Callable[[Sequence[Attempt]], list[float]]
"""What each answer is worth."""

Check = Literal["exact", "number", "contains", "matches", "finished", "short"]


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """One check and its weight; the rewards of several are added.

    "exact": the whole answer is the expected one; "number": the last number in it is the expected one's last;
    "contains": it has every word of the expected one; "matches": all of it matches `pattern`; "finished": it ended
    before the limit; "short": 1 for an empty answer, falling to 0 at `tokens`.
    """

    check: Check
    weight: float = 1.0
    pattern: str = ""
    tokens: int = 0

    def __post_init__(self) -> None:
        if (self.check == "matches") != bool(self.pattern) or (self.check == "short") != (self.tokens > 0):
            raise ConfigError(
                f"reward {self.check!r} has pattern {self.pattern!r} and tokens {self.tokens}; "
                "pattern belongs to matches, tokens to short, and each needs its own."
            )
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ConfigError(f"reward pattern {self.pattern!r} is no regular expression: {error}.") from error


def combined(configs: Sequence[RewardConfig]) -> Reward:
    """The weighted sum of the checks."""
    if not configs:
        raise ConfigError("the recipe has no [[reward]]; name at least one check, or a reward_model.")

    def reward(attempts: Sequence[Attempt]) -> list[float]:
        return [sum(one.weight * _CHECKS[one.check](attempt, one) for one in configs) for attempt in attempts]

    return reward


def last_number(text: str) -> float | None:
    """The last number of a text; thousands may be separated by commas. A dash behind a digit is no sign: 12-4, 3-5."""
    found = re.findall(r"(?:(?<!\d)-)?(?:\d+(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)", text)
    return float(found[-1].replace(",", "")) if found else None


def _number(attempt: Attempt, _: RewardConfig) -> float:
    wanted = last_number(attempt.expected)
    return float(wanted is not None and last_number(attempt.text) == wanted)


def _contains(attempt: Attempt, _: RewardConfig) -> float:
    words = attempt.expected.lower().split()
    return float(all(word in attempt.text.lower() for word in words))


_CHECKS: dict[Check, Callable[[Attempt, RewardConfig], float]] = {
    "exact": lambda attempt, _: float(attempt.text.strip() == attempt.expected.strip()),
    "number": _number,
    "contains": _contains,
    "matches": lambda attempt, config: float(re.fullmatch(config.pattern, attempt.text.strip()) is not None),
    "finished": lambda attempt, _: float(attempt.is_finished),
    "short": lambda attempt, config: max(0.0, 1 - attempt.num_tokens / config.tokens),
}

"""What a load test asks: lengths, prompts, arrivals, and who hangs up early. Knows OpenAI's requests, no connection.

Everything is drawn from seeds, so that several servers are asked the same.
"""

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from kiloq.errors import ConfigError

from .serve_exchange import Ask

PATHS = {"chat": "/v1/chat/completions", "completions": "/v1/completions"}
# A server that does not know these is asked without them: an exact length, the counts at the end of a stream.
OPTIONAL: dict[str, object] = {"ignore_eos": True, "stream_options": {"include_usage": True}}
_LONGEST = 1024  # tokens of a prompt, and of an answer, before scaling
_COMMON = (
    "time year people way day man thing woman life child world school state family student group country problem hand "
    "part place case week company system program question work government number night point home water room mother "
    "area money story fact month lot right study book eye job word business issue side kind head house service friend "
    "father power hour game line end member law car city community name president team minute idea kid body back "
    "parent face level office door health person art war history party result change morning reason research girl guy "
    "moment air teacher force education foot boy age policy music market sense nation plan college interest course"
)


@dataclass(frozen=True)
class LengthMix:
    """Log-normal lengths in tokens: of half of all prompts at most `prompt`, the spread is that of the logarithm.

    The defaults resemble published figures of conversations that people shared: many short questions, a few long
    pastes, answers that are longer than the questions. Values above 1,024 are cut; a spread of 0 is one length.
    """

    prompt: float = 80.0
    prompt_spread: float = 1.1
    answer: float = 160.0
    answer_spread: float = 0.9
    scale: float = 1.0  # of every length: the same mix, smaller or larger

    def draw(self, count: int, seed: int) -> list[tuple[int, int]]:
        """(prompt, answer) tokens of each request."""
        chance = random.Random(f"lengths {seed}")
        return [
            (self._one(chance, self.prompt, self.prompt_spread), self._one(chance, self.answer, self.answer_spread))
            for _ in range(count)
        ]

    def _one(self, chance: random.Random, median: float, spread: float) -> int:
        drawn = median * chance.lognormvariate(0, spread)
        return max(1, round(min(drawn, max(_LONGEST, median)) * self.scale))


def parse_lengths(text: str) -> LengthMix:
    """`sharegpt`, `sharegpt:0.5` (the same, half as long) or `128x64` (every prompt and every answer)."""
    name, _, scale = text.partition(":")
    fixed = text.split("x")
    try:
        if name == "sharegpt":
            mix = LengthMix(scale=float(scale or 1))
        else:
            prompt, answer = map(int, fixed)
            mix = LengthMix(prompt, 0, answer, 0)
        if min(mix.prompt, mix.answer) < 1 or not 0 < mix.scale <= 32:
            raise ValueError
    except ValueError as error:
        raise ConfigError(
            f"--lengths is {text!r}; it takes sharegpt, sharegpt:0.5 for the same at half length, or 128x64 for "
            "prompts of 128 and answers of 64 tokens."
        ) from error
    return mix


@dataclass(frozen=True, kw_only=True)
class Wording:
    """How requests are written for one server. What a word costs in tokens is measured, not known."""

    model: str
    endpoint: str = "chat"  # or "completions"
    fields: Mapping[str, object]  # beside prompt, length and stream
    tokens_per_word: float = 1.0
    tokens_around: float = 0.0  # by the chat template

    def ask(self, text: str, max_tokens: int) -> Ask:
        prompt = {"prompt": text} if self.endpoint == "completions" else {"messages": [_user(text)]}
        body = {"model": self.model, **prompt, "max_tokens": max_tokens, "stream": True, **self.fields}
        return Ask(PATHS[self.endpoint], json.dumps(body).encode(), max_tokens)

    def calibrated(self, shorter: tuple[int, int], longer: tuple[int, int]) -> "Wording":
        """From (words, tokens) of two prompts."""
        each = (longer[1] - shorter[1]) / (longer[0] - shorter[0])
        return replace(self, tokens_per_word=max(each, 0.1), tokens_around=max(0.0, shorter[1] - each * shorter[0]))

    def words_for(self, tokens: int) -> int:
        return max(1, round((tokens - self.tokens_around) / self.tokens_per_word))


def asks(wording: Wording, lengths: Sequence[tuple[int, int]], seed: int) -> list[Ask]:
    """A request for each pair of lengths; no two prompts begin alike, so that no cache helps."""
    chance = random.Random(f"words {seed}")
    return [wording.ask(random_text(chance, wording.words_for(prompt)), answer) for prompt, answer in lengths]


def random_text(chance: random.Random, words: int) -> str:
    known = _COMMON.split()
    return " ".join(chance.choice(known) for _ in range(words))


def arrivals(count: int, rate: float, seed: int) -> list[float]:
    """Seconds at which requests come by chance, `rate` a second on average: a Poisson process."""
    chance = random.Random(f"arrivals {seed}")
    now, times = 0.0, []
    for _ in range(count):
        now += chance.expovariate(rate)
        times.append(now)
    return times


def with_departures(asked: Sequence[Ask], share: float, seed: int) -> list[Ask]:
    """By chance, `share` of the clients hang up: a third at once, a third within a second, a third in mid-answer."""
    chance = random.Random(f"departures {seed}")

    def leaving(ask: Ask) -> Ask:
        kind = chance.randrange(3)
        if kind == 2 and ask.is_streamed:
            return replace(ask, enough=chance.randint(1, max(1, ask.max_tokens - 1)))
        return replace(ask, patience=chance.random() if kind else 0.0)

    return [leaving(ask) if chance.random() < share else ask for ask in asked]


def _user(text: str) -> dict[str, object]:
    return {"role": "user", "content": text}

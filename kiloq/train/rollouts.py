"""Rollouts: prompts of conversation files, and the answers that the model gives to them now. Knows no loss."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kiloq.chat import ChatFormat, Message, render
from kiloq.checkpoint import Checkpoint
from kiloq.engine import EngineConfig, SamplingParams
from kiloq.engine.engine import Engine
from kiloq.engine.readers import Readers
from kiloq.engine.results import Choice
from kiloq.errors import ConfigError, DataError, KiloqError

from .conversations import conversation
from .live import Live
from .ranges import Share
from .rewards import Attempt
from .rows import good_rows


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """A round: `answers` to each of `prompts`, trained on in `epochs` passes of `minibatches` optimiser steps.

    Answers end at `max_tokens`; they are drawn at temperature 1 from the likeliest tokens that make up `top_p`. Rows of
    `seq_len` hold prompt and answer; a step's rows go through the network in `accumulate` parts.
    """

    prompts: int = 32
    answers: int = 8
    max_tokens: int = 128
    top_p: Share = 1.0
    epochs: int = 1
    minibatches: int = 1
    seq_len: int = 512
    accumulate: int = 1

    def __post_init__(self) -> None:
        parts = self.minibatches * self.accumulate
        if min(self.prompts, self.answers, self.max_tokens, self.epochs, parts) < 1 or self.num_answers % parts:
            raise ConfigError(
                f"rollout has {self.prompts} prompts of {self.answers} answers in {self.minibatches} minibatches of "
                f"{self.accumulate} parts; all must be at least 1, and the answers divide evenly."
            )

    @property
    def num_answers(self) -> int:
        """Of a round."""
        return self.prompts * self.answers


@dataclass(frozen=True)
class Prompt:
    """What the model is asked, and the answer that the data has."""

    messages: tuple[Message, ...]
    ids: tuple[int, ...]
    expected: str


@dataclass(frozen=True)
class Answer:
    """`ids` end with the token that ended the answer; `log_probs` are the engine's of all but that one."""

    prompt: Prompt
    ids: tuple[int, ...]
    log_probs: tuple[float, ...]
    text: str
    is_finished: bool

    @property
    def attempt(self) -> Attempt:
        """As rewards see it."""
        return Attempt(
            messages=self.prompt.messages,
            expected=self.prompt.expected,
            text=self.text,
            ids=self.prompt.ids + self.ids,
            num_tokens=len(self.ids),
            is_finished=self.is_finished,
        )


def read_prompts(path: Path, checkpoint: Checkpoint, fmt: ChatFormat, *, longest: int) -> list[Prompt]:
    """The conversations of a file without their last answers, of at most `longest` tokens each."""
    prompts = []
    for one in good_rows(path, conversation):
        end = max(i for i, message in enumerate(one.messages) if message.role == "assistant")
        ids = render(one.messages[:end], checkpoint.tokenizer, fmt, tools=one.tools).ids
        if len(ids) > longest:
            raise DataError(
                f"{one.where}: the prompt has {len(ids):,} tokens, and rollout.seq_len leaves room for {longest:,} "
                "beside rollout.max_tokens. Raise it, or shorten the prompt."
            )
        prompts.append(Prompt(one.messages[:end], tuple(ids), one.messages[end].content))
    if not prompts:
        raise DataError(f"{path} holds no conversations.")
    return prompts


class Player:
    """Asks the model as it is now. Each call has an engine of its own, so that nothing cached is of older weights."""

    def __init__(self, live: Live, checkpoint: Checkpoint, config: RolloutConfig) -> None:
        self._live, self._checkpoint, self._config = live, checkpoint, config
        ends = (checkpoint.tokenizer.im_end_id, *checkpoint.generation.stop_ids)
        self._stop_ids = tuple(dict.fromkeys(ends))

    def play(self, prompts: Sequence[Prompt], seeds: Sequence[int], *, answers: int) -> list[Answer]:
        """`answers` to each prompt, those of a prompt together; the same seeds and weights give the same answers."""
        sampling = [
            SamplingParams(
                max_tokens=self._config.max_tokens,
                top_p=self._config.top_p,
                seed=seed,
                n=answers,
                logprobs=0,
                speculation="none",
            )
            for seed in seeds
        ]
        return self._play(prompts, sampling)

    def best(self, prompts: Sequence[Prompt]) -> list[Answer]:
        """The greedy answer to each prompt."""
        greedy = SamplingParams(max_tokens=self._config.max_tokens, temperature=0.0, logprobs=0, speculation="none")
        return self._play(prompts, [greedy] * len(prompts))

    def _play(self, prompts: Sequence[Prompt], sampling: Sequence[SamplingParams]) -> list[Answer]:
        model, adapters = self._live.now()
        longest = max(len(prompt.ids) for prompt in prompts) + self._config.max_tokens
        engine = Engine(
            model,
            EngineConfig(max_context=longest, max_batch=min(64, sum(one.n for one in sampling))),
            tokenizer=self._checkpoint.tokenizer,
            stop_ids=self._stop_ids,
            adapters=adapters,
        )
        asked = ((prompt.ids, one) for prompt, one in zip(prompts, sampling, strict=True))
        found: list[list[Answer]] = [[]] * len(prompts)
        was_training = model.training
        model.eval()  # no dropout where this is the very network that is trained
        for number, result in Readers(engine).completed(asked, next(iter(adapters), "")):
            if isinstance(result, KiloqError):
                raise result
            found[number] = [_answer(prompts[number], choice) for choice in result.choices]
        model.train(was_training)
        return [answer for answers in found for answer in answers]


def sample_seed(*parts: int) -> int:
    """The seed of one draw, from the run's seed and where in the run it is."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=7).digest())


def shuffled(count: int, seed: int, start: int, stop: int) -> list[int]:
    """Places start..stop-1 in an endless stream of shuffled passes over 0..count-1."""
    passes = {i // count for i in range(start, stop)}
    orders = {i: np.random.default_rng([seed, i]).permutation(count) for i in passes}
    return [int(orders[i // count][i % count]) for i in range(start, stop)]


def _answer(prompt: Prompt, choice: Choice) -> Answer:
    end = () if choice.stop_id is None else (choice.stop_id,)
    log_probs = tuple(one.logprob for one in choice.logprobs or () if one.logprob is not None)
    return Answer(prompt, (*choice.token_ids, *end), log_probs, choice.text, choice.finish_reason == "stop")

"""What a model learns from its own answers: rounds of rollouts, scored and measured, as an endless stream of batches.

Knows no loss and no advantage: a method hands in how answers are credited.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from .data import Batch
from .forward import Forward
from .objective import Batches
from .parallel import Alone, Parallel
from .rewards import Reward
from .rollouts import Answer, Player, Prompt, RolloutConfig, sample_seed, shuffled
from .traces import Trace, drift, log_probs_and_entropy, packed_traces

_MEASURED = ("old", "reference", "values", "advantages", "returns")


@dataclass(frozen=True)
class Experience:
    """A part of a step: answers, and for each of their N tokens what a loss may need. `facts` are the round's means."""

    answers: Batch
    weights: Tensor  # [N] of each token in the summed loss
    old: Tensor
    reference: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor
    count: int
    facts: Mapping[str, float]
    moves_policy: bool = True
    text: Batch | None = None  # whose cross entropy is added

    @property
    def size(self) -> int:
        return self.answers.size + (self.text.size if self.text else 0)


@dataclass(frozen=True)
class Scored:
    """Held-out answers: nothing to learn, only how good they are."""

    count: int
    facts: Mapping[str, float]
    size: int = 0


class Method(Protocol):
    """What makes PPO and GRPO differ before the loss. It may keep numbers from round to round."""

    def credit(self, traces: Sequence[Trace]) -> Mapping[str, float]:
        """Give every trace of a round its advantages (and returns); what of it is worth logging."""
        ...

    def weigh(self, traces: Sequence[Trace]) -> tuple[Tensor, int]:
        """Of each token of these traces its weight in the summed loss, and what the sum is divided by."""
        ...

    def state(self) -> dict[str, float]: ...
    def restore(self, state: dict[str, float]) -> None: ...


PerToken = Callable[[Batch], Tensor]
"""Answers packed into a batch -> a number for each of their N tokens."""


@dataclass(frozen=True)
class Judges:
    """Who looks at the answers of a round, without gradients, and among which processes they are shared out. `value`
    and `reference` may be missing."""

    reward: Reward
    policy: Forward
    reference: PerToken | None = None
    value: PerToken | None = None
    parallel: Parallel = field(default_factory=Alone)


class Rounds:
    """The stream: mini-batches of the current round, and a new one with the live weights when they are used up.

    The first pass of a round is measured in the very batches that it is trained in, so the first step's ratios are 1.
    For the first `warmup` optimiser steps the policy is to stay as it is. `text` adds a batch to every part. Of several
    processes each plays and measures a share of a round, which all of them then have whole.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        player: Player,
        judges: Judges,
        method: Method,
        config: RolloutConfig,
        *,
        seed: int,
        warmup: int = 0,
        text: Batches[Batch] | None = None,
    ) -> None:
        self.prompts, self.player, self.judges, self.method = prompts, player, judges, method
        self.config, self.seed, self.warmup, self.text = config, seed, warmup, text
        self.round, self.given = 0, 0  # rounds made; parts given in all
        self.traces: list[Trace] = []
        self.facts: dict[str, float] = {}

    @property
    def parts(self) -> int:
        """Batches of one round."""
        return self.config.epochs * self.config.minibatches * self.config.accumulate

    def next_batch(self) -> Experience:
        """The next part of an optimiser step."""
        if self.given == self.round * self.parts:
            self._play()
        place = self.given % self.parts
        traces, answers = packed_traces(self._share(place), self.config.seq_len)
        weights, count = self.method.weigh(traces)
        moves_policy = self.given // self.config.accumulate >= self.warmup
        self.given += 1
        return Experience(
            answers=answers,
            weights=weights,
            count=count,
            facts=self.facts,
            moves_policy=moves_policy,
            text=self.text.next_batch() if self.text is not None else None,
            **{name: torch.cat([getattr(trace, name) for trace in traces]) for name in _MEASURED},
        )

    def state(self) -> dict[str, Any]:
        """The current round with all that was measured of it, and where in it the stream stands."""
        return {
            "round": self.round,
            "given": self.given,
            "facts": dict(self.facts),
            "traces": [{one.name: getattr(trace, one.name) for one in fields(trace)} for trace in self.traces],
            "method": self.method.state(),
            "text": None if self.text is None else self.text.state(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on exactly after the batch at which `state` was taken."""
        self.round, self.given, self.facts = state["round"], state["given"], state["facts"]
        self.traces = [Trace(**values) for values in state["traces"]]
        self.method.restore(state["method"])
        if self.text is not None:
            self.text.restore(state["text"])

    @torch.no_grad()
    def _play(self) -> None:
        """Ask, score, measure, credit."""
        answers, rewards = self._answers()
        self.traces = [
            Trace(
                ids=torch.tensor(answer.prompt.ids + answer.ids),
                start=len(answer.prompt.ids),
                group=i // self.config.answers,
                reward=reward,
                engine=torch.tensor(answer.log_probs),
            )
            for i, (answer, reward) in enumerate(zip(answers, rewards, strict=True))
        ]
        self.round += 1
        entropy = self._measured()
        self.facts = facts_of(answers, rewards) | drift(self.traces)
        self.facts["entropy"] = entropy / sum(trace.length for trace in self.traces)
        self.facts |= self.method.credit(self.traces)

    def _answers(self) -> tuple[list[Answer], list[float]]:
        """Of all prompts of the round, those of a prompt together. A prompt's seed is its own, whoever plays it."""
        count, each, parallel = self.config.prompts, self.config.answers, self.judges.parallel
        numbers = shuffled(len(self.prompts), self.seed, self.round * count, (self.round + 1) * count)
        mine = range(parallel.rank, count, parallel.world)
        answers: list[Answer] = []
        if mine:
            seeds = [sample_seed(self.seed, self.round, place) for place in mine]
            answers = self.player.play([self.prompts[numbers[place]] for place in mine], seeds, answers=each)
        rewards = self.judges.reward([answer.attempt for answer in answers]) if answers else []
        shares = parallel.collect(list(zip(answers, rewards, strict=True)))
        starts = [(shares[place % len(shares)], place // len(shares) * each) for place in range(count)]
        together = [one for share, start in starts for one in share[start : start + each]]
        return [answer for answer, _ in together], [reward for _, reward in together]

    def _measured(self) -> float:
        """Fill what the networks say of the round's traces; their summed entropy."""
        parallel, places = self.judges.parallel, range(self.parts // self.config.epochs)
        own = {place: self._measure(self._share(place)) for place in places[parallel.rank :: parallel.world]}
        entropies = [0.0] * len(places)
        for share in parallel.collect(own):
            for place, (entropy, columns) in share.items():
                entropies[place] = entropy
                for name, values in columns.items():
                    for trace, value in zip(self._share(place), values, strict=True):
                        setattr(trace, name, value)
        return sum(entropies)

    def _measure(self, traces: Sequence[Trace]) -> tuple[float, dict[str, list[Tensor]]]:
        """The summed entropy of a part, and by what the networks say of its traces, a tensor for each."""
        packed, batch = packed_traces(traces, self.config.seq_len)
        lengths = [trace.length for trace in packed]
        old, entropy = log_probs_and_entropy(self.judges.policy, batch)
        looked = {"old": old}
        if self.judges.reference is not None:
            looked["reference"] = self.judges.reference(batch)
        if self.judges.value is not None:
            looked["values"] = self.judges.value(batch)
        place = {id(trace): number for number, trace in enumerate(packed)}
        columns = {}
        for name, values in looked.items():
            parts = torch.split(values.cpu(), lengths)
            # A view would be saved with all of its batch.
            columns[name] = [parts[place[id(trace)]].clone() for trace in traces]
        return entropy, columns

    def _share(self, place: int) -> list[Trace]:
        """The traces of one part of a round."""
        per_epoch = self.parts // self.config.epochs
        order = np.random.default_rng([self.seed, self.round, place // per_epoch]).permutation(len(self.traces))
        return [self.traces[int(i)] for i in np.split(order, per_epoch)[place % per_epoch]]


def facts_of(answers: Sequence[Answer], rewards: Sequence[float]) -> dict[str, float]:
    """Means over answers."""
    return {
        "reward": float(np.mean(rewards)),
        "length": float(np.mean([len(answer.ids) for answer in answers])),
        "ended": float(np.mean([answer.is_finished for answer in answers])),
    }

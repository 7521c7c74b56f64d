"""What a model learns from its own answers: rounds of rollouts, scored and measured, as an endless stream of batches.

Knows no loss and no advantage: a method hands in how answers are credited.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from .data import Batch
from .forward import Forward, head_of
from .losses import IGNORE, token_log_probs
from .objective import Batches
from .packing import into_rows
from .rewards import Reward
from .rollouts import Answer, Player, Prompt, RolloutConfig, sample_seed, shuffled
from .samples import Sample, assemble

_NONE = torch.empty(0)
_LOGITS = 2**21  # that exist at once: 8 MB


@dataclass
class Trace:
    """One answer as it is trained on. Tensors are [n], one value for each of its tokens; some methods leave some empty.

    `group` numbers its prompt within the round; `engine` are the log-probabilities that it was drawn with, of all
    tokens but the one that ended it.
    """

    ids: Tensor  # [L] prompt and answer
    start: int  # where the answer begins
    group: int
    reward: float
    engine: Tensor
    old: Tensor = _NONE  # log-probabilities under the weights that drew it, by the trainer's own forward
    reference: Tensor = _NONE
    values: Tensor = _NONE
    advantages: Tensor = _NONE
    returns: Tensor = _NONE

    @property
    def length(self) -> int:
        """Tokens of the answer."""
        return len(self.ids) - self.start


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
    """Who looks at the answers of a round, without gradients. `value` and `reference` may be missing."""

    reward: Reward
    policy: Forward
    reference: PerToken | None = None
    value: PerToken | None = None


class Rounds:
    """The stream: mini-batches of the current round, and a new one with the live weights when they are used up.

    The first pass of a round is measured in the very batches that it is trained in, so the first step's ratios are 1.
    For the first `warmup` optimiser steps the policy is to stay as it is. `text` adds a batch to every part.
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
        self.last: list[tuple[Answer, float]] = []  # for people, not kept

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
        count = self.config.prompts
        numbers = shuffled(len(self.prompts), self.seed, self.round * count, (self.round + 1) * count)
        seeds = [sample_seed(self.seed, self.round, place) for place in range(count)]
        asked = [self.prompts[i] for i in numbers]
        answers = self.player.play(asked, seeds, answers=self.config.answers)
        rewards = self.judges.reward([answer.attempt for answer in answers])
        self.last = list(zip(answers, rewards, strict=True))
        self.traces = [
            Trace(
                ids=torch.tensor(answer.prompt.ids + answer.ids),
                start=len(answer.prompt.ids),
                group=i // self.config.answers,
                reward=reward,
                engine=torch.tensor(answer.log_probs),
            )
            for i, (answer, reward) in enumerate(self.last)
        ]
        self.round += 1
        entropy = sum(self._measure(self._share(place)) for place in range(self.parts // self.config.epochs))
        self.facts = facts_of(answers, rewards) | drift(self.traces)
        self.facts["entropy"] = entropy / sum(trace.length for trace in self.traces)
        self.facts |= self.method.credit(self.traces)

    def _measure(self, traces: Sequence[Trace]) -> float:
        """Fill what the networks say of these traces; their summed entropy."""
        traces, batch = packed_traces(traces, self.config.seq_len)
        lengths = [trace.length for trace in traces]
        old, entropy = log_probs_and_entropy(self.judges.policy, batch)
        looked = {"old": old}
        if self.judges.reference is not None:
            looked["reference"] = self.judges.reference(batch)
        if self.judges.value is not None:
            looked["values"] = self.judges.value(batch)
        for name, values in looked.items():
            for trace, own in zip(traces, torch.split(values.cpu(), lengths), strict=True):
                setattr(trace, name, own.clone())  # a view would be saved with all of its batch
        return entropy

    def _share(self, place: int) -> list[Trace]:
        """The traces of one part of a round."""
        per_epoch = self.parts // self.config.epochs
        order = np.random.default_rng([self.seed, self.round, place // per_epoch]).permutation(len(self.traces))
        return [self.traces[int(i)] for i in np.split(order, per_epoch)[place % per_epoch]]


_MEASURED = ("old", "reference", "values", "advantages", "returns")


def packed_traces(traces: Sequence[Trace], seq_len: int) -> tuple[list[Trace], Batch]:
    """Answers in rows of seq_len, each seeing only itself; and the order in which they stand there.

    The answers' own tokens are the targets, so that the batch's N trained tokens are theirs, one trace after another.
    """
    samples = [_sample(trace) for trace in traces]
    rows = into_rows(list(range(len(traces))), [len(sample.ids) for sample in samples], seq_len)
    order = [traces[i] for row in rows for i in row]
    return order, assemble([[samples[i] for i in row] for row in rows], seq_len, filler=0)


def answer_rows(forward: Forward, batch: Batch) -> tuple[Tensor, Tensor]:
    """Hidden states before each answer token in fp32 [N, h], and the tokens [N]."""
    targets = batch.targets.to(forward.runtime.device)
    at = (targets != IGNORE).nonzero().squeeze(1)
    return forward(batch)[at].float(), targets[at]


def log_probs(forward: Forward, batch: Batch) -> Tensor:
    """log p of each of the batch's N trained tokens, [N] fp32.

    The head multiplies in fp32: logits of about 20 in bf16 are off by up to 0.06, and a ratio by 6 %.
    """
    hidden, targets = answer_rows(forward, batch)
    return token_log_probs(hidden, head_of(forward.model), targets)


def log_probs_and_entropy(forward: Forward, batch: Batch) -> tuple[Tensor, float]:
    """`log_probs`, and the summed entropy of what each token was drawn from. Without gradients."""
    hidden, targets = answer_rows(forward, batch)
    head = head_of(forward.model)
    matrix = head.rows(0, len(head.weight), hidden.dtype)
    entropy = 0.0
    for rows in torch.split(hidden, max(32, _LOGITS // len(matrix))):
        scores = torch.log_softmax(rows @ matrix.t(), dim=-1)
        entropy -= float((scores.exp() * scores).sum())
    return token_log_probs(hidden, head, targets), entropy


def facts_of(answers: Sequence[Answer], rewards: Sequence[float]) -> dict[str, float]:
    """Means over answers."""
    return {
        "reward": float(np.mean(rewards)),
        "length": float(np.mean([len(answer.ids) for answer in answers])),
        "ended": float(np.mean([answer.is_finished for answer in answers])),
    }


def drift(traces: Sequence[Trace]) -> dict[str, float]:
    """How far the policy is from the reference, and the trainer's forward from the engine's: mean KL of drawn tokens.

    Schulman's estimator k3 (joschu.net/blog/kl-approx.html): exp(d) - 1 - d of d = log q - log p, drawn from p.
    """
    engine = torch.cat([k3(trace.engine, trace.old[: len(trace.engine)]) for trace in traces])
    found = {"mismatch": float(engine.mean()) if len(engine) else 0.0}
    if len(traces[0].reference):
        found["kl"] = float(torch.cat([k3(trace.old, trace.reference) for trace in traces]).mean())
    return found


def k3(own: Tensor, other: Tensor) -> Tensor:
    """The estimate of KL(own || other) of each token that `own` drew, from its log-probabilities under both."""
    return torch.expm1(other - own) - (other - own)


def _sample(trace: Trace) -> Sample:
    ids = trace.ids.numpy()
    targets = ids[1:].copy()
    targets[: trace.start - 1] = IGNORE
    return Sample(ids[:-1], targets)  # nothing follows the last token

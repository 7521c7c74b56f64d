"""Answers of a model as they are trained on: packed into rows, and what a network says of each of their tokens.

Knows no reward and no advantage.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .data import Batch
from .forward import Forward, head_of
from .losses import IGNORE, token_log_probs
from .packing import into_rows
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

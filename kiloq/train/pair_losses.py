"""What preferences teach, as equations on a few numbers: of each comparison a loss. Knows no network and no batch.

`ratios` are log p(answer) - log p_reference(answer), summed over an answer's tokens: [n, 2], the better answer first.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def dpo(ratios: Tensor, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """Equation 7 of arXiv 2305.18290, [n]. With `label_smoothing`, the chance that the labels are the wrong way round,
    it is conservative DPO (equation 3 of the authors' note "cDPO", 2023)."""
    logits = beta * (ratios[:, 0] - ratios[:, 1])
    return -(1 - label_smoothing) * F.logsigmoid(logits) - label_smoothing * F.logsigmoid(-logits)


def ipo(ratios: Tensor, lengths: Tensor, *, beta: float) -> Tensor:
    """Equation 17 of arXiv 2310.12036 with beta for its tau, [n].

    Ratios are means over an answer's tokens (`lengths` [n, 2]), as its authors computed it: the sum's square would
    weigh long answers most.
    """
    means = ratios / lengths
    return (means[:, 0] - means[:, 1] - 1 / (2 * beta)) ** 2


def kto(
    ratios: Tensor, good: Tensor, drift: Tensor, *, beta: float, weights: tuple[float, float] = (1.0, 1.0)
) -> Tensor:
    """Equations 7 and 8 of arXiv 2402.01306 of answers that are `good` or not, [n]; ratios are [n] here.

    `drift` is the estimate z0 of the policy's KL from the reference, without gradients; `weights` are lambda of good
    and of bad answers.
    """
    value = torch.sigmoid(beta * torch.where(good, ratios - drift, drift - ratios))
    return torch.where(good, weights[0], weights[1]) * (1 - value)


def kto_drift(ratios: Tensor) -> Tensor:
    """z0 of arXiv 2402.01306 (section 4.1) from the ratios of answers to other questions: their mean, at least 0."""
    return ratios.detach().mean().clamp(min=0)


def bradley_terry(scores: Tensor, margins: Tensor) -> Tensor:
    """Equation 1 of InstructGPT (arXiv 2203.02155) of scores [n, 2], [n]; with the margin of Llama 2 (2307.09288)."""
    return -F.logsigmoid(scores[:, 0] - scores[:, 1] - margins)

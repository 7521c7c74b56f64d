"""Records golden/preference.json: what trl's own loss functions say of fixed log-probabilities and scores.

Run with trl 1.16.0 installed: python tests/data/make_preference_golden.py. The trainers' methods are called on objects
that hold their settings, and a model that answers with the numbers of the case.
"""

import json
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import trl
from torch import Tensor
from trl import DPOTrainer, KTOTrainer, RewardTrainer

PROMPT, ANSWER = 2, 5


class Accelerator:
    """One process."""

    device = torch.device("cpu")

    def gather(self, value: Tensor) -> Tensor:
        return value

    gather_for_metrics = gather


class Model:
    """Gives each call the next of some per-token log-probabilities."""

    training = True

    def __init__(self, *log_probs: Tensor) -> None:
        self.queue = list(log_probs)

    def __call__(self, **_: Any) -> SimpleNamespace:
        found = self.queue.pop(0)
        ones = torch.ones_like(found).detach()
        return SimpleNamespace(log_probs=found, entropy=ones, mean_logits=ones, is_top1=ones.bool(), logits=found)


def settings(**own: Any) -> SimpleNamespace:
    return SimpleNamespace(
        **own,
        model=Model(),
        accelerator=Accelerator(),
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        use_weighting=False,
        loss_weights=[1.0],
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
    )


def answers(random: torch.Generator, lengths: list[int]) -> tuple[Tensor, Tensor]:
    """Log-probabilities of shifted tokens [n, PROMPT + ANSWER - 1], zero outside the answers, and the mask of rows."""
    mask = torch.zeros(len(lengths), PROMPT + ANSWER, dtype=torch.long)
    for row, length in zip(mask, lengths, strict=True):
        row[PROMPT : PROMPT + length] = 1
    values = -3 * torch.rand(mask.shape[0], mask.shape[1] - 1, generator=random) * mask[:, 1:]
    return values.requires_grad_(), mask


def paired(random: torch.Generator, loss: str, beta: float) -> dict[str, Any]:
    lengths = [5, 3, 4, 2, 1, 5]
    log_probs, mask = answers(random, lengths)
    reference = -8 * torch.rand(6, generator=random)
    ids = torch.ones_like(mask)
    batch = {"input_ids": ids, "attention_mask": ids, "completion_mask": mask}
    batch |= {"ref_chosen_logps": reference[:3], "ref_rejected_logps": reference[3:]}
    own = settings(beta=beta, loss_types=[loss], label_smoothing=0.0)
    found = DPOTrainer._compute_loss(own, Model(log_probs), batch, False)
    found.backward()
    ratios = log_probs.detach().sum(1) - reference
    gradient = log_probs.grad[:, PROMPT - 1]  # by the first token of each answer: the same for all of them
    return {
        "loss": "dpo" if loss == "sigmoid" else loss,
        "beta": beta,
        "ratios": torch.stack(ratios.chunk(2), dim=1).tolist(),
        "lengths": torch.stack(torch.tensor(lengths).chunk(2), dim=1).tolist(),
        "mean": found.item(),
        "gradient": torch.stack(gradient.chunk(2), dim=1).tolist(),
        "margin": own._metrics["train"]["rewards/margins"][0],
        "accuracy": own._metrics["train"]["rewards/accuracies"][0],
    }


def labelled(random: torch.Generator, beta: float, weights: tuple[float, float]) -> dict[str, Any]:
    good = [True, False, False, True]
    log_probs, mask = answers(random, [5, 3, 4, 2])
    others, other_mask = answers(random, [3, 4, 2, 5])
    reference, other_reference = -8 * torch.rand(4, generator=random), -8 * torch.rand(4, generator=random)
    ids = torch.ones_like(mask)
    batch = {"input_ids": ids, "attention_mask": ids, "completion_mask": mask, "label": torch.tensor(good)}
    batch |= {"KL_input_ids": ids, "KL_attention_mask": ids, "KL_completion_mask": other_mask}
    batch |= {"ref_logps": reference, "ref_KL_logps": other_reference}
    own = settings(
        beta=beta, loss_type="kto", calculate_KL=True, desirable_weight=weights[0], undesirable_weight=weights[1]
    )
    own._compute_kl_logps = lambda model, batch: KTOTrainer._compute_kl_logps(own, model, batch)
    found = KTOTrainer._compute_loss(own, Model(others, log_probs), batch, False)
    found.backward()
    return {
        "loss": "kto",
        "beta": beta,
        "weights": weights,
        "good": good,
        "ratios": (log_probs.detach().sum(1) - reference).tolist(),
        "other_ratios": (others.detach().sum(1) - other_reference).tolist(),
        "kl": own._metrics["train"]["kl"][0],
        "mean": found.item(),
        "gradient": log_probs.grad[:, PROMPT - 1].tolist(),
    }


def scored(random: torch.Generator, margins: list[float] | None) -> dict[str, Any]:
    scores = torch.randn(6, 1, generator=random).requires_grad_()
    batch: dict[str, Any] = {"attention_mask": torch.ones(6, 4)}
    if margins:
        batch["margin"] = torch.tensor(margins)
    own = settings(args=SimpleNamespace(center_rewards_coefficient=None))
    found = RewardTrainer.compute_loss(own, Model(scores), batch)
    found.backward()
    return {
        "loss": "reward",
        "scores": torch.stack(scores.detach().squeeze(1).chunk(2), dim=1).tolist(),
        "margins": margins or [0.0, 0.0, 0.0],
        "mean": found.item(),
        "gradient": torch.stack(scores.grad.squeeze(1).chunk(2), dim=1).tolist(),
        "accuracy": own._metrics["train"]["accuracy"][0],
    }


def main() -> None:
    random = torch.Generator().manual_seed(0)
    cases = [paired(random, loss, beta) for loss in ("sigmoid", "ipo") for beta in (0.1, 0.5)]
    cases += [labelled(random, 0.1, (1.0, 1.0)), labelled(random, 0.4, (1.3, 0.7))]
    cases += [scored(random, None), scored(random, [0.5, 1.0, 0.0])]
    path = Path(__file__).parent / "golden" / "preference.json"
    path.write_text(json.dumps({"trl": trl.__version__, "cases": cases}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

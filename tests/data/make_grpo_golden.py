"""Records golden/grpo.json: what trl's own GRPO loss says of fixed log-probabilities, in its three ways of averaging.

Run with trl 1.16.0 installed: python tests/data/make_grpo_golden.py. The trainer's method is called on an object that
holds its settings and answers with the numbers of the case.
"""

import json
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import torch
from trl import GRPOTrainer

LENGTHS, MAX_TOKENS = [5, 3, 1, 4], 8
SHAPE = (len(LENGTHS), max(LENGTHS))
MASK = torch.arange(SHAPE[1])[None] < torch.tensor(LENGTHS)[:, None]


def main() -> None:
    torch.manual_seed(0)
    own = -torch.rand(SHAPE, dtype=torch.float64) * 3
    old, reference = (own + 0.4 * torch.randn(SHAPE, dtype=torch.float64) for _ in range(2))
    advantages = torch.tensor([1.3, -0.7, -1.1, 0.5], dtype=torch.float64)
    case = {"lengths": LENGTHS, "max_tokens": MAX_TOKENS, "advantages": advantages.tolist()}
    for name, values in (("own", own), ("old", old), ("reference", reference)):
        case[name] = values[MASK].tolist()
    inputs = {"advantages": advantages, "old_per_token_logps": old, "ref_per_token_logps": reference}
    for name, kind in (("answer", "grpo"), ("token", "dapo"), ("constant", "dr_grpo")):
        case[name] = told(kind, own, inputs)
    path = Path(__file__).parent / "golden" / "grpo.json"
    path.write_text(json.dumps(case, indent=1) + "\n", encoding="utf-8")


def told(kind: str, own: torch.Tensor, inputs: dict[str, torch.Tensor]) -> dict[str, object]:
    log_probs = own.clone().requires_grad_(True)
    ids = torch.zeros(SHAPE, dtype=torch.long)
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (log_probs, torch.zeros(SHAPE), None),
        _entropy_bonus_enabled=False,
        _metrics={"train": defaultdict(list)},
        accelerator=SimpleNamespace(num_processes=1, gather=lambda x: x, reduce=lambda x, **_: x),
        args=SimpleNamespace(use_bias_correction_kl=False, delta=None, steps_per_generation=1),
        aux_loss_enabled=False,
        beta=0.04,
        current_gradient_accumulation_steps=1,
        epsilon_high=0.28,
        epsilon_low=0.2,
        importance_sampling_level="token",
        loss_type=kind,
        max_completion_length=MAX_TOKENS,
        model=SimpleNamespace(training=True),
        off_policy_mask_threshold=None,
        top_entropy_quantile=1.0,
        use_vllm=False,
    )
    batch = {"prompt_ids": ids, "prompt_mask": ids, "completion_ids": ids, "completion_mask": MASK.long()}
    loss = GRPOTrainer._compute_loss(trainer, None, {**batch, **inputs, "num_items_in_batch": MASK.sum()})
    loss.backward()
    return {"loss": loss.item(), "gradient": log_probs.grad[MASK].tolist()}


if __name__ == "__main__":
    main()

"""Against trl's own loss functions on fixed numbers, recorded by tests/data/make_preference_golden.py, and by hand."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kiloq.train.pair_losses import bradley_terry, dpo, ipo, kto, kto_drift

GOLDEN = json.loads((Path(__file__).parents[1] / "data" / "golden" / "preference.json").read_text(encoding="utf-8"))


def losses_of(case: dict[str, Any], numbers: Tensor) -> Tensor:
    match case["loss"]:
        case "dpo":
            return dpo(numbers, beta=case["beta"])
        case "ipo":
            return ipo(numbers, torch.tensor(case["lengths"]), beta=case["beta"])
        case "kto":
            drift = kto_drift(torch.tensor(case["other_ratios"]))
            assert drift.item() == pytest.approx(case["kl"], abs=1e-6)
            return kto(numbers, torch.tensor(case["good"]), drift, beta=case["beta"], weights=case["weights"])
        case _:
            return bradley_terry(numbers, torch.tensor(case["margins"]))


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: case["loss"])
def test_losses_and_gradients_are_trls(case: dict[str, Any]) -> None:
    numbers = torch.tensor(case["scores"] if "scores" in case else case["ratios"], requires_grad=True)
    mean = losses_of(case, numbers).mean()
    mean.backward()
    assert mean.item() == pytest.approx(case["mean"], rel=1e-5)
    torch.testing.assert_close(numbers.grad, torch.tensor(case["gradient"]), rtol=1e-4, atol=1e-7)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_the_equations_in_double_precision() -> None:
    ratios = torch.tensor([[1.25, -0.5], [-2.0, 0.75]], dtype=torch.float64)
    (a, b), (c, d) = ratios.tolist()
    assert dpo(ratios, beta=0.3).tolist() == pytest.approx(
        [-math.log(sigmoid(0.3 * (a - b))), -math.log(sigmoid(0.3 * (c - d)))]
    )
    conservative = -0.9 * math.log(sigmoid(0.3 * (a - b))) - 0.1 * math.log(sigmoid(-0.3 * (a - b)))
    assert dpo(ratios, beta=0.3, label_smoothing=0.1)[0].item() == pytest.approx(conservative)
    lengths = torch.tensor([[5.0, 2.0], [1.0, 4.0]], dtype=torch.float64)
    assert ipo(ratios, lengths, beta=0.2)[0].item() == pytest.approx((a / 5 - b / 2 - 2.5) ** 2)
    good = torch.tensor([True, False])
    values = kto(ratios[:, 0], good, torch.tensor(0.5, dtype=torch.float64), beta=0.3, weights=(1.5, 0.5))
    assert values.tolist() == pytest.approx(
        [1.5 * (1 - sigmoid(0.3 * (a - 0.5))), 0.5 * (1 - sigmoid(0.3 * (0.5 - c)))]
    )
    assert bradley_terry(ratios, torch.tensor([0.0, 1.0])).tolist() == pytest.approx(
        [-math.log(sigmoid(a - b)), -math.log(sigmoid(c - d - 1))]
    )


@pytest.mark.parametrize(
    "loss",
    [
        lambda x: dpo(x, beta=0.3, label_smoothing=0.1),
        lambda x: ipo(x, torch.full_like(x, 3.0), beta=0.3),
        lambda x: kto(x[:, 0], torch.tensor([True, False, True]), torch.tensor(0.2), beta=0.3),
        lambda x: bradley_terry(x, torch.tensor([0.0, 1.0, 0.5], dtype=torch.float64)),
    ],
)
def test_gradients_are_the_slopes(loss: Any) -> None:
    numbers = torch.randn(3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    assert torch.autograd.gradcheck(loss, (numbers,))


def test_a_wrong_label_costs_little_where_it_is_expected() -> None:
    sure = torch.tensor([[-200.0, 0.0]])
    assert dpo(sure, beta=1.0).item() == pytest.approx(200)
    assert dpo(sure, beta=1.0, label_smoothing=0.1).item() == pytest.approx(180)

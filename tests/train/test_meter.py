from collections.abc import Callable

import pytest
import torch

from kiloq.model import Transformer
from kiloq.train.forward import Runtime
from kiloq.train.meter import Meter, Work, clock, gemm_peak
from kiloq.train.watchdog import remember, spike


def test_full_training_costs_six_operations_a_weight_and_a_frozen_one_four(
    make_model: Callable[..., Transformer],
) -> None:
    model = make_model()
    matrices = sum(p.numel() for name, p in model.named_parameters() if p.ndim == 2 and name != "embed.weight")
    assert Work.of(model).flops == 6 * matrices
    model.requires_grad_(False)
    model.norm.weight.requires_grad_(True)
    assert Work.of(model).flops == 4 * matrices


def test_the_share_of_the_peak_and_what_is_left_follow_from_the_clock(make_model: Callable[..., Transformer]) -> None:
    model = make_model()
    meter = Meter(model, Runtime("cpu", torch.float32, False), steps=100, world=2)
    figures = meter.read(step=40, steps=10, tokens=5000, seconds=20.0)
    assert figures["tokens_per_second"] == 250
    assert figures["eta_seconds"] == 120
    peak = 2 * gemm_peak("cpu", torch.float32)
    assert figures["mfu"] == pytest.approx(Work.of(model).flops * 250 / peak, abs=1e-4)
    assert figures["peak_memory"] > 50 << 20


def test_a_span_of_time_reads_well() -> None:
    assert [clock(s) for s in (4.4, 99, 150, 7500)] == ["4 s", "99 s", "2 min", "2 h 05 min"]


def test_a_spike_is_seen_against_a_noisy_past_and_forgotten_when_it_stays() -> None:
    history: dict[str, list[float]] = {}
    random = torch.Generator().manual_seed(0)

    def step(loss: float) -> str | None:
        values = {"loss": loss * (1 + 0.1 * torch.rand((), generator=random).item()), "grad_norm": 1.0}
        found = spike(history, values)
        remember(history, values)
        return found

    assert not any(step(2.0) for _ in range(200))
    assert "loss" in (step(4.0) or "")
    stayed = [step(4.0) is not None for _ in range(80)]
    assert stayed[0]
    assert not any(stayed[40:])


def test_nothing_is_judged_before_there_is_a_past() -> None:
    assert spike({"loss": [1.0] * 3, "grad_norm": [1.0] * 3}, {"loss": 100.0, "grad_norm": 100.0}) is None

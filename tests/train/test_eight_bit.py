from collections.abc import Callable

import pytest
import torch

from kiloq.model import Transformer
from kiloq.train.eight_bit import AdamW8bit, dequantize, grid, quantize
from kiloq.train.optim import OptimConfig, make_optimizer


def test_the_grid_has_256_values_that_get_finer_towards_zero() -> None:
    for signed in (True, False):
        values = grid(signed)
        assert len(values) == len(set(values.tolist())) == 256
        assert values.max() == 1
        positive = values[values > 0]
        assert (positive.diff()[:-1] / positive[1:-1]).max() < 1  # no gap as wide as the value itself
    assert torch.equal(grid(True)[:-1], -grid(True)[:-1].flip(0))


@pytest.mark.parametrize("signed", [True, False])
def test_values_come_back_as_the_nearest_of_the_grid(signed: bool) -> None:
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    values = values if signed else values.abs()
    codes, scales = quantize(values, signed=signed)
    assert (codes.dtype, len(scales)) == (torch.uint8, 4)
    for at in (0, 700, 999):
        block = values[at // 256 * 256 : at // 256 * 256 + 256]
        every = grid(signed) * block.abs().max()
        nearest = every[(every - values[at]).abs().argmin()]
        torch.testing.assert_close(dequantize(codes, scales, signed=signed)[at], nearest)


def test_zero_stays_zero_and_small_roots_do_not_become_zero() -> None:
    values = torch.tensor([1.0, 0.0, 1e-12])
    back = dequantize(*quantize(values, signed=False), signed=False)
    assert back[1] == 0
    assert back[2] > 0


def moved(make: Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer], steps: int = 60) -> torch.Tensor:
    """Where a least-squares problem is after some steps."""
    random = torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter(torch.zeros(64, 80))
    inputs, wanted = torch.randn(256, 80, generator=random), torch.randn(64, 80, generator=random)
    optimizer = make([weight])
    for _ in range(steps):
        (inputs @ (weight - wanted).t()).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return (weight - wanted).detach()


def test_the_steps_follow_adamw() -> None:
    exact = moved(lambda p: torch.optim.AdamW(p, lr=0.02, betas=(0.9, 0.95), weight_decay=0.0))
    short = moved(lambda p: AdamW8bit(p, lr=0.02, betas=(0.9, 0.95), eps=1e-8))
    start = moved(lambda p: torch.optim.SGD(p, lr=0.0), steps=1)
    assert exact.norm() < 0.5 * start.norm()
    assert (short - exact).norm() < 0.05 * (exact - start).norm()


def trained(model: Transformer, optimizer: torch.optim.Optimizer, steps: int = 4) -> None:
    for step in range(steps):
        for number, parameter in enumerate(model.parameters()):
            random = torch.Generator().manual_seed(100 * step + number)
            parameter.grad = torch.randn(parameter.shape, generator=random)
        optimizer.step()
        optimizer.zero_grad()


def test_a_saved_state_goes_on_to_the_last_bit(make_model: Callable[..., Transformer]) -> None:
    config = OptimConfig(lr=1e-2, kind="adamw8bit")
    straight, first, second = make_model(vocab_size=256), make_model(vocab_size=256), make_model(vocab_size=256, seed=1)
    optimizer = make_optimizer(straight, config)
    trained(straight, optimizer)
    trained(straight, optimizer)
    optimizer = make_optimizer(first, config)
    trained(first, optimizer)
    resumed = make_optimizer(second, config)
    second.load_state_dict(first.state_dict())
    resumed.load_state_dict(optimizer.state_dict())
    trained(second, resumed)
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), second.parameters(), strict=True))


@pytest.mark.parametrize("kind", ["adamw", "adamw8bit", "muon"])
def test_a_state_elsewhere_makes_the_same_steps(make_model: Callable[..., Transformer], kind: str) -> None:
    here, away = make_model(), make_model()
    for model, offload in ((here, False), (away, True)):
        trained(model, make_optimizer(model, OptimConfig(lr=1e-2, kind=kind, offload=offload)))
    assert all(torch.equal(a, b) for a, b in zip(here.parameters(), away.parameters(), strict=True))


def test_eight_bits_take_a_quarter_of_the_memory() -> None:
    weight = torch.nn.Parameter(torch.zeros(512, 512))
    weight.grad = torch.ones_like(weight)
    optimizer = AdamW8bit([weight], lr=0.1, betas=(0.9, 0.95), eps=1e-8)
    optimizer.step()
    size = sum(one.nbytes for one in optimizer.state[weight].values())
    assert size == pytest.approx(weight.numel() * 8 / 4, rel=0.02)

import copy
import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch

from kiloq.errors import ConfigError
from kiloq.model import Transformer
from kiloq.train.forward import Runtime
from kiloq.train.optim import OptimConfig, clip_gradients, learning_rate, make_optimizer, set_learning_rate, with_steps
from kiloq.train.settings import LoopConfig


def test_decay_shrinks_matrices_and_nothing_else(make_model: Callable[..., Transformer]) -> None:
    model = make_model()
    for parameter in model.parameters():
        parameter.data.fill_(1.0)
        parameter.grad = torch.zeros_like(parameter)
    make_optimizer(model, OptimConfig(lr=0.5, weight_decay=0.1)).step()
    shrunk = {name for name, parameter in model.named_parameters() if bool((parameter < 1).all())}
    matrices = ("qkv.weight", "out.weight", "gate_up.weight", "down.weight", "head.weight")
    assert shrunk == {name for name, _ in model.named_parameters() if name.endswith(matrices)}


def with_random_gradients(model: Transformer, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def test_muon_moves_matrices_as_torchs_and_the_rest_by_adamw(make_model: Callable[..., Transformer]) -> None:
    ours, theirs = make_model(), make_model()
    theirs.load_state_dict(ours.state_dict())
    optimizer = make_optimizer(ours, OptimConfig(lr=0.02, kind="muon", weight_decay=0.1))
    matrices = [p for n, p in theirs.named_parameters() if p.ndim == 2 and not n.startswith(("embed.", "head."))]
    others = [p for p in theirs.parameters() if all(p is not matrix for matrix in matrices)]
    oracles = [
        torch.optim.Muon(matrices, lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=0.02, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]
    for step in range(3):
        for model in (ours, theirs):
            with_random_gradients(model, step)
        for one in (optimizer, *oracles):
            one.step()
    assert matrices
    for name, parameter in ours.named_parameters():
        assert torch.equal(parameter, theirs.get_parameter(name)), name


def test_muon_moves_a_low_rank_update_alone() -> None:
    # LoRA trains nothing but matrices, so that no parameter is left for AdamW.
    low_rank = torch.nn.Linear(8, 4, bias=False)
    oracle = torch.nn.Parameter(low_rank.weight.detach().clone())
    low_rank.weight.grad = oracle.grad = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    make_optimizer(low_rank, OptimConfig(lr=0.02, kind="muon", weight_decay=0.1)).step()
    torch.optim.Muon([oracle], lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw").step()
    assert torch.equal(low_rank.weight, oracle)


def test_muon_goes_on_from_its_saved_state(make_model: Callable[..., Transformer]) -> None:
    config = OptimConfig(lr=0.02, kind="muon")
    first, second = make_model(), make_model()
    before = make_optimizer(first, config)
    with_random_gradients(first, 0)
    before.step()
    second.load_state_dict(first.state_dict())
    after = make_optimizer(second, config)
    after.load_state_dict(copy.deepcopy(before.state_dict()))
    for model, optimizer in ((first, before), (second, after)):
        with_random_gradients(model, 1)
        set_learning_rate(optimizer, 0.01)
        optimizer.step()
    for name, parameter in first.named_parameters():
        assert torch.equal(parameter, second.get_parameter(name)), name


def test_the_rate_warms_up_peaks_and_falls_to_the_floor() -> None:
    config = OptimConfig(lr=1.0, steps=110, warmup_steps=10, floor=0.1)
    rates = [learning_rate(config, step) for step in range(111)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[10] == 1.0
    assert rates[60] == pytest.approx(0.55)
    assert rates[110] == pytest.approx(0.1)
    assert all(b <= a for a, b in pairwise(rates[10:]))


def test_clipping_scales_the_joint_norm_and_tells_the_one_before() -> None:
    weights = [torch.zeros(2, requires_grad=True), torch.zeros(1, requires_grad=True)]
    weights[0].grad, weights[1].grad = torch.tensor([3.0, 0.0]), torch.tensor([4.0])
    assert clip_gradients(weights, 1.0) == pytest.approx(5.0)
    assert clip_gradients(weights, 10.0) == pytest.approx(1.0)


def test_steps_left_open_are_counted_from_epochs() -> None:
    config = OptimConfig(lr=1.0)
    assert with_steps(config, 2.0, epoch_tokens=1050, step_tokens=100).steps == 21
    assert with_steps(OptimConfig(lr=1.0, steps=5), 2.0, epoch_tokens=1050, step_tokens=100).steps == 5
    with pytest.raises(ConfigError, match="epochs is 0"):
        with_steps(config, 0.0, epoch_tokens=1050, step_tokens=100)


def test_a_warm_up_is_a_tenth_of_the_steps_or_what_is_set() -> None:
    assert [OptimConfig(lr=1.0, steps=steps).warmup for steps in (5, 200, 5000)] == [1, 20, 100]
    assert OptimConfig(lr=1.0, steps=50, warmup_steps=0).warmup == 0
    assert with_steps(OptimConfig(lr=1.0, warmup_ratio=0.01), 2.0, epoch_tokens=1000, step_tokens=10).warmup == 2
    with pytest.raises(ConfigError, match="warmup_ratio is 1"):
        OptimConfig(lr=1.0, warmup_ratio=1.0)
    with pytest.raises(ConfigError, match=r"warmup_steps is 10 and warmup_ratio 0\.1; set one"):
        OptimConfig(lr=1.0, warmup_steps=10, warmup_ratio=0.1)


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"lr": math.nan}, "lr nan"),
        ({"lr": math.inf}, "lr inf"),
        ({"clip": 0.0}, r"clip 0\.0"),
        ({"betas": (0.9, 1.0)}, r"betas \[0\.9, 1\.0\]"),
        ({"eps": 0.0}, r"eps 0\.0"),
        ({"weight_decay": -0.1}, r"weight_decay -0\.1"),
        ({"floor": 2.0}, r"floor is 2\.0"),
    ],
)
def test_what_no_optimiser_could_use_is_refused(setting: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        OptimConfig(**{"lr": 1e-3, **setting})


@pytest.mark.parametrize("name", ["log_every", "eval_every", "save_every"])
def test_what_happens_every_no_steps_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"loop.{name} is 0"):
        LoopConfig(**{name: 0})


def test_a_device_that_is_not_here_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"loop\.device is 'tpu'; this machine has"):
        Runtime.choose(LoopConfig(device="tpu"))


def test_epochs_without_end_are_refused() -> None:
    for epochs in (math.nan, math.inf):
        with pytest.raises(ConfigError, match=f"epochs is {epochs}"):
            with_steps(OptimConfig(lr=1.0), epochs, epoch_tokens=10, step_tokens=10)

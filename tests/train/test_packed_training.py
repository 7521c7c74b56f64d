"""Samples that share rows are trained as if each were alone."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from kiloq.model import Transformer
from kiloq.train.forward import Forward, Runtime
from kiloq.train.losses import IGNORE
from kiloq.train.samples import PackedSamples, Sample

LENGTHS = [5, 23, 9, 30, 2, 17, 12, 26]


def samples_of(seed: int) -> list[Sample]:
    random = np.random.default_rng(seed)
    made = []
    for length in LENGTHS:
        ids = random.integers(0, 64, length)
        targets = np.append(ids[1:], IGNORE)
        targets[: length // 3] = IGNORE
        made.append(Sample(ids, targets))
    return made


@pytest.mark.parametrize(("num_kv_heads", "window"), [(4, None), (2, 7)])
def test_packed_samples_give_the_loss_and_the_gradients_of_samples_alone(
    make_model: Callable[..., Transformer], num_kv_heads: int, window: int | None
) -> None:
    model = make_model(num_kv_heads=num_kv_heads, window=window).requires_grad_(True)
    samples = samples_of(0)
    stream = PackedSamples([(samples, 1.0)], seq_len=32, tokens=32, seed=0, filler=63)
    assert len(stream) < len(samples)  # some share a row
    forward = Forward(model, Runtime("cpu", torch.float32, compiled=False), seq_len=32)
    packed = torch.zeros(())
    for _ in range(len(stream)):
        total = forward.cross_entropy(stream.next_batch())
        total.backward()
        packed += total.detach()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    alone = torch.zeros(())
    for sample in samples:  # positions from 0, nothing beside it, and the loss of PyTorch
        logits = model.logits(torch.from_numpy(sample.ids))
        total = F.cross_entropy(logits, torch.from_numpy(sample.targets), ignore_index=IGNORE, reduction="sum")
        total.backward()
        alone += total.detach()
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-5)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-5, atol=1e-5, msg=name)


def test_what_shares_a_row_changes_no_gradient_of_a_sample(make_model: Callable[..., Transformer]) -> None:
    model = make_model().requires_grad_(True)
    forward = Forward(model, Runtime("cpu", torch.float32, compiled=False), seq_len=32)

    def gradient_beside(other: Sample) -> torch.Tensor:
        untrained = Sample(other.ids, np.full_like(other.targets, IGNORE))
        stream = PackedSamples([([samples_of(0)[2], untrained], 1.0)], seq_len=32, tokens=32, seed=0, filler=63)
        forward.cross_entropy(stream.next_batch()).backward()
        found = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
        model.zero_grad()
        return found

    one, other = samples_of(1)[5], samples_of(2)[5]
    assert one.ids.tolist() != other.ids.tolist()
    torch.testing.assert_close(gradient_beside(one), gradient_beside(other), rtol=0, atol=1e-7)

import pytest
import torch
import torch.nn.functional as F

from kiloq.train.losses import IGNORE, chunked_cross_entropy


@pytest.mark.parametrize("rows", [1, 7, 512])
def test_chunks_give_the_loss_and_gradients_of_cross_entropy(rows: int) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(50, 16, requires_grad=True)
    weight = torch.randn(33, 16, requires_grad=True)
    targets = torch.randint(0, 33, (50,))
    targets[::3] = IGNORE
    expected = F.cross_entropy(hidden @ weight.t(), targets, ignore_index=IGNORE, reduction="sum")
    wanted = torch.autograd.grad(expected, (hidden, weight))
    loss = chunked_cross_entropy(hidden, weight, targets, rows=rows)
    got = torch.autograd.grad(loss * 0.25, (hidden, weight))
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    for ours, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(ours, theirs * 0.25, rtol=1e-5, atol=1e-6)


def test_scoring_gives_the_same_loss_as_training() -> None:
    torch.manual_seed(0)
    hidden, weight, targets = torch.randn(20, 8), torch.randn(12, 8), torch.randint(0, 12, (20,))
    with torch.no_grad():
        scored = chunked_cross_entropy(hidden, weight, targets, rows=6)
    assert scored == chunked_cross_entropy(hidden.requires_grad_(), weight, targets, rows=6)


def test_nothing_trained_is_zero_loss_and_zero_gradient() -> None:
    hidden, weight = torch.randn(4, 8, requires_grad=True), torch.randn(6, 8, requires_grad=True)
    loss = chunked_cross_entropy(hidden, weight, torch.full((4,), IGNORE))
    loss.backward()
    assert loss == 0
    assert hidden.grad is not None
    assert not hidden.grad.any()


def test_large_logits_do_not_overflow() -> None:
    hidden, weight = torch.full((2, 4), 1e4), torch.eye(4)
    loss = chunked_cross_entropy(hidden.requires_grad_(), weight, torch.tensor([0, 3]))
    torch.testing.assert_close(loss, 2 * torch.log(torch.tensor(4.0)))

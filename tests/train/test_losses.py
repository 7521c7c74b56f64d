import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kiloq.train.losses import IGNORE, HeadMatrix, chunked_cross_entropy, token_log_probs


@pytest.mark.parametrize("columns", [1, 7, 512])
def test_chunks_give_the_loss_and_gradients_of_cross_entropy(columns: int) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(50, 16, requires_grad=True)
    weight = torch.randn(33, 16, requires_grad=True)
    targets = torch.randint(0, 33, (50,))
    targets[::3] = IGNORE
    expected = F.cross_entropy(hidden @ weight.t(), targets, ignore_index=IGNORE, reduction="sum")
    wanted = torch.autograd.grad(expected, (hidden, weight))
    loss = chunked_cross_entropy(hidden, weight, targets, columns=columns)
    got = torch.autograd.grad(loss * 0.25, (hidden, weight))
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    for ours, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(ours, theirs * 0.25, rtol=1e-5, atol=1e-6)


def test_scoring_gives_the_same_loss_as_training() -> None:
    torch.manual_seed(0)
    hidden, weight, targets = torch.randn(20, 8), torch.randn(12, 8), torch.randint(0, 12, (20,))
    with torch.no_grad():
        scored = chunked_cross_entropy(hidden, weight, targets, columns=5)
    assert scored == chunked_cross_entropy(hidden.requires_grad_(), weight, targets, columns=5)


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


@pytest.mark.parametrize("columns", [1, 7, 512])
def test_token_log_probs_and_their_gradients_are_log_softmaxs(columns: int) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(50, 16, requires_grad=True)
    weight = torch.randn(33, 16, requires_grad=True)
    targets, upstream = torch.randint(0, 33, (50,)), torch.randn(50)
    targets[::3] = IGNORE
    every = torch.log_softmax(hidden @ weight.t(), dim=-1).gather(1, targets.clamp(min=0)[:, None]).squeeze(1)
    expected = torch.where(targets == IGNORE, 0.0, every)
    wanted = torch.autograd.grad(expected, (hidden, weight), upstream)
    found = token_log_probs(hidden, weight, targets, columns=columns)
    got = torch.autograd.grad(found, (hidden, weight), upstream)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_a_frozen_head_gets_no_gradient_and_costs_none() -> None:
    hidden, weight = torch.randn(4, 8, requires_grad=True), torch.randn(6, 8)
    token_log_probs(hidden, weight, torch.tensor([0, 5, IGNORE, 2])).sum().backward()
    assert weight.grad is None
    assert hidden.grad is not None
    assert hidden.grad.any(dim=1).tolist() == [True, True, False, True]


def test_replaced_rows_of_a_head_are_trained_in_its_place() -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(30, 8, requires_grad=True), torch.randn(20, 8)
    ids, values = torch.tensor([3, 11, 19]), torch.randn(3, 8, requires_grad=True)
    targets = torch.randint(0, 20, (30,))
    whole = weight.index_copy(0, ids, values)
    wanted = torch.autograd.grad(F.cross_entropy(hidden @ whole.t(), targets, reduction="sum"), (hidden, values))
    loss = chunked_cross_entropy(hidden, HeadMatrix(weight, ids, values), targets, columns=7)
    for ours, theirs in zip(torch.autograd.grad(loss, (hidden, values)), wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_log_probs_add_up_to_the_cross_entropy() -> None:
    torch.manual_seed(0)
    hidden, weight, targets = torch.randn(20, 8), torch.randn(12, 8), torch.randint(0, 12, (20,))
    targets[3] = IGNORE
    torch.testing.assert_close(
        -token_log_probs(hidden, weight, targets).sum(), chunked_cross_entropy(hidden, weight, targets)
    )


class Largest(TorchDispatchMode):
    """The most values that any operation within gives at once."""

    values = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.values = max([self.values, *(x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor))])
        return out


def test_the_whole_logits_never_exist() -> None:
    # The largest tensor that any operation makes, forward or backward, is a chunk of logits or the head's gradient.
    tokens, width, vocab, columns = 512, 8, 1000, 16
    hidden, weight = torch.randn(tokens, width, requires_grad=True), torch.randn(vocab, width, requires_grad=True)
    targets = torch.randint(0, vocab, (tokens,))
    with Largest() as largest:
        token_log_probs(hidden, weight, targets, columns=columns).sum().backward()
    assert largest.values == columns * tokens


def test_a_few_trained_rows_cost_no_gradient_of_the_whole_head() -> None:
    tokens, width, vocab, columns = 64, 8, 4000, 16
    hidden, weight = torch.randn(tokens, width, requires_grad=True), torch.randn(vocab, width)
    ids, values = torch.tensor([7, 3999]), torch.randn(2, width, requires_grad=True)
    targets = torch.randint(0, vocab, (tokens,))
    with Largest() as largest:
        token_log_probs(hidden, HeadMatrix(weight, ids, values), targets, columns=columns).sum().backward()
    assert largest.values == columns * tokens < weight.numel()

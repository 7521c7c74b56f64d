from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kiloq.model import Transformer
from kiloq.train import adapters
from kiloq.train.data import Batch
from kiloq.train.forward import Forward, Runtime, share_tied_gradient

EAGER = Runtime("cpu", torch.float32, False)
Make = Callable[..., Transformer]


def tied_model(make_model: Make, *, whole_tables: bool = False) -> Transformer:
    model = Transformer(replace(make_model(100).config, tie_embeddings=True))
    model.init_weights(torch.Generator().manual_seed(0))
    if whole_tables:
        model.requires_grad_(False)
        torch.manual_seed(0)
        adapters.attach_new(model, adapters.AdapterConfig(rank=4, embeddings="full"))
    return model


def batch(seed: int) -> Batch:
    ids = torch.randint(0, 64, (32,), generator=torch.Generator().manual_seed(seed))
    ids[5:9] = ids[3]  # rows that are looked up more than once
    return Batch(ids, ids.roll(-1), torch.arange(32), [0, 32])


def gradients(model: Transformer, run: Callable[[Forward], None]) -> dict[str, torch.Tensor]:
    run(Forward(model, EAGER, seq_len=32))
    return {name: one.grad for name, one in model.named_parameters() if one.grad is not None}


def one_loss(forward: Forward) -> None:
    forward.cross_entropy(batch(0)).backward()


def one_loss_after_the_other(forward: Forward) -> None:
    for seed in range(3):
        forward.cross_entropy(batch(seed)).backward()


def two_losses_at_once(forward: Forward) -> None:
    (forward.cross_entropy(batch(0)) + 2 * forward.cross_entropy(batch(1))).backward()


def no_loss_of_the_head(forward: Forward) -> None:
    forward(batch(0)).sum().backward()


@pytest.mark.parametrize("run", [one_loss, one_loss_after_the_other, two_losses_at_once, no_loss_of_the_head])
@pytest.mark.parametrize("whole_tables", [False, True])
def test_a_shared_gradient_is_the_sum_of_the_two(
    make_model: Make, run: Callable[[Forward], None], whole_tables: bool
) -> None:
    expected = gradients(tied_model(make_model, whole_tables=whole_tables), run)
    model = share_tied_gradient(tied_model(make_model, whole_tables=whole_tables), EAGER)
    found = gradients(model, run)
    assert model.embed.tied is not None  # type: ignore[union-attr]
    assert "embed.weight" in found
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-6, msg=name)


def test_the_lookup_makes_no_gradient_of_its_own(make_model: Make) -> None:
    class Counting(TorchDispatchMode):
        made = 0  # tensors of the table's size

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            known = {x.data_ptr() for x in tree_leaves(args) if isinstance(x, torch.Tensor)}
            new = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor) and x.data_ptr() not in known]
            self.made += sum(x.shape == (100, 32) for x in new)
            return out

    counts = []
    for model in (tied_model(make_model), share_tied_gradient(tied_model(make_model), EAGER)):
        loss = Forward(model, EAGER, seq_len=32).cross_entropy(batch(0))
        with Counting() as counting:
            loss.backward()
        counts.append(counting.made)
    # Those of the loss are left: the gradient, and its one part. Gone are that of the lookup, and the sum.
    assert counts == [4, 2]


def test_nothing_is_shared_where_nothing_is_tied_or_trained(make_model: Make) -> None:
    assert share_tied_gradient(make_model(), EAGER).embed.tied is None  # type: ignore[union-attr]
    frozen = tied_model(make_model).requires_grad_(False)
    assert share_tied_gradient(frozen, EAGER).embed.tied is None  # type: ignore[union-attr]
    compiled = Runtime("cpu", torch.float32, True)
    assert share_tied_gradient(tied_model(make_model), compiled).embed.tied is None  # type: ignore[union-attr]

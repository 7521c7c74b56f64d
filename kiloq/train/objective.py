"""What a step minimises: a batch in, a summed loss out. The loop knows no more of a method than this."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

from torch import Tensor

from .data import Batch
from .forward import Forward


class Counted(Protocol):
    """What the loop asks of any batch."""

    @property
    def count(self) -> int:
        """What the summed loss is divided by, with the counts of all micro-batches and ranks: tokens, or pairs."""
        ...

    @property
    def size(self) -> int:
        """Flat tokens that go through the network, for tokens per second."""
        ...


B = TypeVar("B", bound=Counted)
_B_co = TypeVar("_B_co", bound=Counted, covariant=True)


@dataclass(frozen=True)
class Loss:
    """`total` is summed over what the batch counts, with gradients; `measures` are sums over the same, for the log."""

    total: Tensor
    measures: Mapping[str, Tensor] = field(default_factory=dict)


Objective = Callable[[B], Loss]
"""The whole of a method, as the loop sees it; it holds the networks that it needs."""


class Batches(Protocol[_B_co]):
    """An endless stream of batches whose place can be saved. Reinforcement learning makes its batches here."""

    def next_batch(self) -> _B_co: ...
    def state(self) -> dict[str, Any]: ...
    def restore(self, state: dict[str, Any]) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Watch(Generic[B]):
    """What is looked at beside the training: `notes` are told at the start, `held` gives each held-out set's batches
    from the start, `samples` lines for people after each evaluation, the first `before` any training where that is
    worth its time. All of it is kept in the log."""

    notes: Sequence[str] = ()
    held: Mapping[str, Callable[[], Iterable[B]]] = field(default_factory=dict)
    samples: Callable[[], Iterable[str]] = tuple
    before: bool = False


def next_token(forward: Forward) -> Objective[Batch]:
    """Cross entropy of the tokens that a batch trains."""
    return lambda batch: Loss(forward.cross_entropy(batch))

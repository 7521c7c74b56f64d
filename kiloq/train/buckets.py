"""Gradients of equal models in several processes, added up while the backward pass still runs (PyTorch Distributed,
Li et al., arXiv 2006.15704). Beside the model, not around it: objectives go on calling it as they do in one process."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn

_BYTES = 25 * 2**20  # of one message: large enough for the wire, small enough to begin early


class Buckets:
    """The gradients of `parameters` in messages of about 25 MiB, in the order in which a backward pass reaches them."""

    def __init__(self, parameters: Sequence[nn.Parameter], group: dist.ProcessGroup) -> None:
        self.group = group
        self.buckets: list[list[nn.Parameter]] = []
        for parameter in reversed(parameters):
            last = self.buckets[-1] if self.buckets else None
            if last is None or last[0].dtype != parameter.dtype or _bytes([*last, parameter]) > _BYTES:
                self.buckets.append([parameter])
            else:
                last.append(parameter)
        self.place: dict[Tensor, int] = {p: number for number, bucket in enumerate(self.buckets) for p in bucket}
        self.missing: list[set[nn.Parameter]] | None = None  # per bucket, while gradients are being added up
        self.sent: list[tuple[Tensor, dist.Work]] = []
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(self._ready)

    @contextmanager
    def summing(self) -> Iterator[None]:
        """Around one backward pass; after it every gradient is the sum over all processes."""
        self.missing, self.sent = [set(bucket) for bucket in self.buckets], []
        try:
            yield
        finally:
            self.missing = None
        while len(self.sent) < len(self.buckets):
            self._send()  # a parameter without a gradient held it back
        for bucket, (flat, work) in zip(self.buckets, self.sent, strict=True):
            work.wait()
            pairs = zip(bucket, torch.split(flat, [p.numel() for p in bucket]), strict=True)
            for parameter, summed in pairs:
                if parameter.grad is not None:
                    parameter.grad.copy_(summed.view_as(parameter))

    def _ready(self, parameter: Tensor) -> None:
        if self.missing is None:
            return
        self.missing[self.place[parameter]].discard(parameter)
        # In order, whatever becomes ready first: all processes must send the same message at the same time.
        while len(self.sent) < len(self.buckets) and not self.missing[len(self.sent)]:
            self._send()

    def _send(self) -> None:
        bucket = self.buckets[len(self.sent)]
        flat = torch.cat([(p.grad if p.grad is not None else torch.zeros_like(p)).flatten() for p in bucket])
        work = dist.all_reduce(flat, group=self.group, async_op=True)
        assert work is not None
        self.sent.append((flat, work))


def _bytes(parameters: Sequence[nn.Parameter]) -> int:
    return sum(p.numel() * p.element_size() for p in parameters)

"""AdamW whose two averages are kept in 8 bits: Dettmers et al., arXiv 2110.02861. A quarter of the memory of fp32.

Values are quantised by blocks of 256 on the paper's dynamic grid (section 2.1), whose steps grow with them. Kept is
the root of the second average: a small one that became zero would make its step huge.
"""

import functools
from collections.abc import Callable
from typing import Any, overload

import torch
from torch import Tensor

from .pieces import local_of

BLOCK = 256
STATE_BYTES = 2 * (1 + 4 / BLOCK)  # of a trained value

_SMALL = 4096  # parameters of fewer values stay in fp32: norms and biases, which all else depends on
_SLAB = 2**20  # values that are in fp32 at once


class AdamW8bit(torch.optim.Optimizer):
    """Takes the groups of torch.optim.AdamW, and means the same steps."""

    def __init__(self, params: Any, *, lr: float, betas: tuple[float, float], eps: float) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step of all parameters with a gradient."""
        loss = None if closure is None else closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move(parameter, parameter.grad, group)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes what `state_dict` gave."""
        super().load_state_dict(state_dict)
        for state in self.state.values():  # torch gives every state the parameter's type
            for name in ("mean", "root"):
                if f"{name}_scale" in state:
                    state[name] = state[name].to(torch.uint8)

    def _move(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state.update(_zeros(local_of(parameter)))
        state["step"] += 1
        (beta1, beta2), rate, count = group["betas"], group["lr"], int(state["step"])
        shift = rate / (1 - beta1**count)
        whole, slopes = local_of(parameter).view(-1), local_of(gradient).reshape(-1).float()
        for start in range(0, len(whole), _SLAB):
            part, slope = whole[start : start + _SLAB], slopes[start : start + _SLAB]
            mean = _read(state, "mean", start, len(part)).lerp_(slope, 1 - beta1)
            second = (
                _read(state, "root", start, len(part)).square_().mul_(beta2).addcmul_(slope, slope, value=1 - beta2)
            )
            root = second.sqrt_()
            part.mul_(1 - rate * group["weight_decay"])
            part.addcdiv_(mean, (root / (1 - beta2**count) ** 0.5).add_(group["eps"]), value=-shift)
            _write(state, "mean", start, mean)
            _write(state, "root", start, root)


@functools.cache
def grid(signed: bool) -> Tensor:
    """The 256 values of the dynamic type in [-1, 1] or [0, 1], ascending: each decade has twice the steps of the one
    below it."""
    values = [0.0, 1.0]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2 ** (decade + (0 if signed else 1)) + 1, dtype=torch.float64)
        middles = ((edges[:-1] + edges[1:]) / 2 * 10.0 ** (decade - 6)).tolist()
        values += middles + ([-one for one in middles] if signed else [])
    return torch.tensor(sorted(values), dtype=torch.float32)


def quantize(values: Tensor, *, signed: bool) -> tuple[Tensor, Tensor]:
    """Codes [n] uint8 and the largest magnitude of each block: each value becomes the nearest of the grid."""
    blocks = torch.nn.functional.pad(values, (0, -len(values) % BLOCK)).view(-1, BLOCK)
    scales = blocks.abs().amax(dim=1)
    levels = grid(signed).to(values.device)
    shares = blocks / scales.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
    codes = torch.bucketize(shares, (levels[1:] + levels[:-1]) / 2, out_int32=True)
    if not signed:  # what is not zero does not become zero
        codes = torch.where((codes == 0) & (blocks > 0), 1, codes)
    return codes.to(torch.uint8).view(-1)[: len(values)], scales


def dequantize(codes: Tensor, scales: Tensor, *, signed: bool) -> Tensor:
    """What `quantize` stands for, [n] fp32."""
    levels = grid(signed).to(codes.device)
    return levels[codes.int()].mul_(scales.repeat_interleave(BLOCK)[: len(codes)])


def _zeros(parameter: Tensor) -> dict[str, Tensor]:
    size, device = parameter.numel(), parameter.device
    step = torch.zeros((), dtype=torch.float32)
    if size < _SMALL:
        return {"step": step, "mean": torch.zeros(size, device=device), "root": torch.zeros(size, device=device)}
    scales = {f"{name}_scale": torch.zeros(-(-size // BLOCK), device=device) for name in ("mean", "root")}
    codes = {name: torch.zeros(size, dtype=torch.uint8, device=device) for name in ("mean", "root")}
    return {"step": step, **codes, **scales}


def _read(state: dict[str, Tensor], name: str, start: int, count: int) -> Tensor:
    values = state[name][start : start + count]
    if f"{name}_scale" not in state:
        return values.clone()
    first = start // BLOCK  # slabs are whole blocks
    scales = state[f"{name}_scale"][first : first - (-count // BLOCK)]
    return dequantize(values, scales, signed=name == "mean")


def _write(state: dict[str, Tensor], name: str, start: int, values: Tensor) -> None:
    if f"{name}_scale" not in state:
        state[name][start : start + len(values)] = values
        return
    codes, scales = quantize(values, signed=name == "mean")
    state[name][start : start + len(values)] = codes
    state[f"{name}_scale"][start // BLOCK : start // BLOCK + len(scales)] = scales

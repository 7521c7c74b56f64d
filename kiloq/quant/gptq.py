"""One matrix in few bits by what its inputs look like: GPTQ (arXiv 2210.17323), and GPTAQ's correction (2504.02692).

Columns are rounded one after another; what a column loses is made good, as far as the inputs allow, by those that are
still to come. Knows one matrix and the second moments of its inputs; no model.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kiloq.errors import ConfigError, NumericsError
from kiloq.ops.layout import QuantWeight

from .grid import Grid, Scheme, as_quant_weight, find_grid, rtn

Order = Literal["static", "act", "none"]

_TRIES = 6  # each with three times the damping of the last


@dataclass(frozen=True, kw_only=True)
class GptqConfig:
    """`order` is that of rounding: "static" takes columns by the size of their inputs, under scales found beforehand;
    "act" gives such neighbours scales of their own, which costs a permutation at run time; "none" goes left to right.

    `damp` is added to the diagonal, as a share of its mean; None chooses by the number of tokens. `correction` is the
    share of GPTAQ's correction for what earlier layers lost; 0 is GPTQ.
    """

    order: Order = "static"
    damp: float | None = None
    correction: float = 0.0
    block: int = 128

    def __post_init__(self) -> None:
        if not 0 <= self.correction <= 1:
            raise ConfigError(f"correction is {self.correction}; it is a share, from 0 to 1.")


class InputMoments:
    """Second moments of a matrix's inputs, gathered chunk by chunk: the mean of x x^T over tokens.

    With `corrected`, also that of (y - x) x^T, y being the inputs that the unquantised model has.
    """

    def __init__(self, columns: int, *, corrected: bool = False) -> None:
        self.tokens = 0
        self._squares = torch.zeros(columns, columns)
        self._drift = torch.zeros(columns, columns) if corrected else None

    def add(self, x: Tensor, exact: Tensor | None = None) -> None:
        """x: [T, K]; `exact`: the same tokens' inputs in the unquantised model."""
        self.tokens += len(x)
        self._squares.addmm_(x.t(), x)
        if self._drift is not None:
            assert exact is not None
            self._drift.addmm_((exact - x).t(), x)

    @property
    def hessian(self) -> Tensor:
        """[K, K] fp32, without damping."""
        return self._squares / max(1, self.tokens)

    @property
    def drift(self) -> Tensor | None:
        """[K, K] fp32."""
        return None if self._drift is None else self._drift / max(1, self.tokens)


@dataclass(frozen=True, kw_only=True)
class MatrixReport:
    """How well the codes of a matrix do: errors of its outputs over the calibration tokens, relative to them."""

    error: float
    rounding_error: float  # of rounding to nearest, with the same clipping
    damp: float  # 0: rounded to nearest, because nothing else worked or was better
    tokens: int
    dead: int  # inputs that were 0 for every token


def quantize_matrix(
    weight: Tensor, moments: InputMoments, scheme: Scheme, config: GptqConfig
) -> tuple[QuantWeight, MatrixReport]:
    """weight: [N, K] -> codes whose outputs are near to the weight's own on inputs with these moments."""
    weight = weight.float()
    hessian = moments.hessian
    if not torch.isfinite(hessian).all():
        raise NumericsError("the inputs of the matrix hold values that are infinite or not a number.")
    grid = find_grid(weight, scheme)
    plain = rtn(weight, scheme, grid)
    rounding_error = output_error(weight, plain, hessian)
    diagonal = hessian.diagonal()
    dead = diagonal == 0
    order = torch.arange(weight.shape[1]) if config.order == "none" else diagonal.argsort(descending=True, stable=True)
    factor, damp = _inverse_factor(hessian[order][:, order], config.damp or _damp(moments.tokens, weight.shape[1]))
    quantized, error = plain, rounding_error
    if factor is not None:
        pull = _correction(factor, moments.drift, order, config.correction)
        solved = _solve(weight[:, order], factor, pull, order, grid, scheme, config)
        solved_error = output_error(weight, solved, hessian)
        # The correction aims at the unquantised model's outputs, not at these: its error may well be larger.
        if solved_error <= rounding_error or pull is not None:
            quantized, error = solved, solved_error
    report = MatrixReport(
        error=error,
        rounding_error=rounding_error,
        damp=0.0 if quantized is plain else damp,
        tokens=moments.tokens,
        dead=int(dead.sum()),
    )
    return quantized, report


def output_error(weight: Tensor, quantized: QuantWeight, hessian: Tensor) -> float:
    """|(W - Q) X| / |W X| for inputs with E[x x^T] = hessian."""
    lost = weight - quantized.dequantize()
    whole = ((weight @ hessian) * weight).sum()
    return float((((lost @ hessian) * lost).sum().clamp(min=0) / whole.clamp(min=torch.finfo(whole.dtype).tiny)).sqrt())


def _damp(tokens: int, columns: int) -> float:
    # Measured: 1 % is best from four tokens a column on, 10 % with a quarter of a token.
    return min(0.1, max(0.01, 0.04 * columns / max(1, tokens)))


def _inverse_factor(hessian: Tensor, damp: float) -> tuple[Tensor | None, float]:
    """Upper triangular U with U^T U the inverse of the damped Hessian, and the damping that it took; None: it has none.

    In fp64: a few inputs of giant size leave fp32 too few digits for the others.
    """
    exact = hessian.double()
    diagonal = exact.diagonal()
    diagonal[diagonal == 0] = 1.0
    mean = float(diagonal.mean())
    added = 0.0
    for _ in range(_TRIES):
        diagonal += damp * mean - added
        added = damp * mean
        lower, failed = torch.linalg.cholesky_ex(exact)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed:
                return upper.float(), damp
        damp *= 3
    return None, damp


def _correction(factor: Tensor, drift: Tensor | None, order: Tensor, share: float) -> Tensor | None:
    """GPTAQ's P = share * (D H^-1, later columns only, each under the Hessian of what is then left)."""
    if drift is None or not share:
        return None
    drift = drift[order][:, order]
    return share * ((drift @ factor.t()).triu_(1) @ factor)


def _solve(
    columns: Tensor,
    factor: Tensor,
    pull: Tensor | None,
    order: Tensor,
    grid: Grid,
    scheme: Scheme,
    config: GptqConfig,
) -> QuantWeight:
    """Round the columns [N, K], which stand in the order of rounding; `grid` is that of the inputs' own order."""
    num_rows, num_columns = columns.shape
    size = scheme.group_size or num_columns
    static = config.order == "static" or scheme.group_size is None
    group_of = (order if static else torch.arange(num_columns)) // size
    left = columns.t().contiguous()  # [K, N]: a column lies together
    scales, zeros = grid.scales.t().contiguous(), grid.zeros.t().contiguous()  # [G, N]
    codes = torch.empty_like(left)
    for first in range(0, num_columns, config.block):
        last = min(first + config.block, num_columns)
        block, lost, taken = left[first:last], torch.empty(last - first, num_rows), left[first:last].clone()
        for i in range(last - first):
            at = first + i
            if not static and at % size == 0:
                fresh = find_grid(left[at : at + size].t().contiguous(), scheme)
                scales[at // size], zeros[at // size] = fresh.scales[:, 0], fresh.zeros[:, 0]
            group = int(group_of[at])
            taken[i] = block[i]
            codes[at], near = grid.round(block[i], scales[group], zeros[group])
            lost[i] = (block[i] - near) / factor[at, at]
            block[i + 1 :].addr_(factor[at, at + 1 : last], lost[i], alpha=-1)
            if pull is not None:
                block[i + 1 :].addr_(pull[at, at + 1 : last], taken[i])
        left[last:].addmm_(factor[first:last, last:].t(), lost, alpha=-1)
        if pull is not None:
            left[last:].addmm_(pull[first:last, last:].t(), taken)
    return _in_order(
        codes.t().contiguous(),
        Grid(scales.t().contiguous(), zeros.t().contiguous(), grid.low, grid.high),
        order,
        static,
        scheme,
    )


def _in_order(codes: Tensor, grid: Grid, order: Tensor, static: bool, scheme: Scheme) -> QuantWeight:
    """Codes as the inputs come; where groups follow the order of rounding instead, with that order."""
    if static:
        back = torch.empty_like(codes)
        back[:, order] = codes
        return as_quant_weight(back, grid, scheme)
    trivial = bool((order == torch.arange(len(order))).all())
    return as_quant_weight(codes, grid, scheme, None if trivial else order.to(torch.int32))

"""GPTQ of one matrix: laws, tiny problems solved by hand, and an independent implementation."""

import itertools

import pytest
import torch

from kiloq.errors import NumericsError
from kiloq.quant.gptq import GptqConfig, InputMoments, Order, output_error, quantize_matrix
from kiloq.quant.grid import Scheme, find_grid, rtn

FOUR = Scheme(bits=4, group_size=32)
ORDERS: tuple[Order, ...] = ("static", "act", "none")


def problem(rows: int = 48, columns: int = 160, tokens: int = 1024, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight [N, K] and correlated inputs [T, K], of which a few are large, as in language models."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.linalg.qr(torch.randn(columns, columns, generator=generator))[0]
    spread = torch.arange(1, columns + 1) ** -0.7
    inputs = (torch.randn(tokens, columns, generator=generator) * spread) @ mix
    inputs[:, 3::50] *= 8
    return torch.randn(rows, columns, generator=generator) * 0.05, inputs


def moments_of(inputs: torch.Tensor, exact: torch.Tensor | None = None) -> InputMoments:
    moments = InputMoments(inputs.shape[1], corrected=exact is not None)
    for start in range(0, len(inputs), 300):
        moments.add(inputs[start : start + 300], None if exact is None else exact[start : start + 300])
    return moments


def lost(weight: torch.Tensor, near: torch.Tensor, inputs: torch.Tensor) -> float:
    return float(((near - weight) @ inputs.t()).norm() / (weight @ inputs.t()).norm())


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    "scheme",
    [
        FOUR,
        Scheme(bits=4, group_size=32, symmetric=False),
        Scheme(bits=4, group_size=32, clip=False),
        Scheme(bits=8, group_size=None),
        Scheme(bits=8, group_size=32),
    ],
    ids=str,
)
def test_outputs_are_nearer_than_by_rounding_and_the_report_is_true(scheme: Scheme, order: Order) -> None:
    weight, inputs = problem()
    quantized, report = quantize_matrix(weight, moments_of(inputs), scheme, GptqConfig(order=order))
    by_rounding = lost(weight, rtn(weight, scheme).dequantize(), inputs)
    error = lost(weight, quantized.dequantize(), inputs)
    assert error < 0.8 * by_rounding
    assert report.error == pytest.approx(error, rel=1e-3)
    assert report.rounding_error == pytest.approx(by_rounding, rel=1e-3)
    assert (quantized.order is not None) == (order == "act" and scheme.group_size is not None)
    assert torch.equal(quantized.scales, quantized.scales.half().float())


def test_large_inputs_first_is_better_than_left_to_right() -> None:
    weight, inputs = problem(rows=256)
    errors = {
        order: quantize_matrix(weight, moments_of(inputs), FOUR, GptqConfig(order=order))[1].error for order in ORDERS
    }
    assert errors["static"] < 0.97 * errors["none"]
    assert errors["act"] < 0.97 * errors["none"]


@pytest.mark.parametrize("order", ["static", "none"])
def test_unrelated_inputs_leave_nothing_to_make_good(order: Order) -> None:
    weight, _ = problem()
    inputs = torch.diag(torch.arange(1.0, 161.0))  # one token per input: no two inputs ever meet
    quantized, _ = quantize_matrix(weight, moments_of(inputs), FOUR, GptqConfig(order=order))
    assert torch.equal(quantized.codes, rtn(weight, FOUR).codes)
    assert torch.equal(quantized.scales, rtn(weight, FOUR).scales)


@pytest.mark.parametrize("order", ["static", "none"])
def test_quantised_weights_stay(order: Order) -> None:
    weight, inputs = problem()
    eight = rtn(weight, Scheme(bits=8, group_size=None)).dequantize()
    steps = torch.randint(0, 16, weight.shape, generator=torch.Generator().manual_seed(3))
    steps[:, ::32], steps[:, 1::32] = 0, 15  # each group uses its whole range
    four = (steps - 6.0) * 2**-6
    for once, scheme in (
        (eight, Scheme(bits=8, group_size=None)),
        (four, Scheme(bits=4, group_size=32, symmetric=False, clip=False)),
    ):
        again, report = quantize_matrix(once, moments_of(inputs), scheme, GptqConfig(order=order))
        torch.testing.assert_close(again.dequantize(), once, rtol=1e-5, atol=1e-7)
        assert report.error < 1e-5


def test_columns_one_by_one_as_the_paper_says() -> None:
    """Each column rounded, its loss given to the columns left by the inverse of *their* Hessian (equation 2)."""
    weight, inputs = problem(rows=5, columns=32)
    scheme, damp = Scheme(bits=4, group_size=32), 0.02
    hessian = (inputs.t() @ inputs / len(inputs)).double()
    hessian += damp * hessian.diagonal().mean() * torch.eye(32)
    grid = find_grid(weight, scheme)
    left, codes = weight.double().clone(), torch.empty(5, 32)
    for i in range(32):
        inverse = torch.linalg.inv(hessian[i:, i:])
        codes[:, i] = torch.clamp(torch.round(left[:, i] / grid.scales[:, 0]) + 8, 0, 15)
        error = left[:, i] - (codes[:, i] - 8) * grid.scales[:, 0]
        left[:, i:] -= torch.outer(error / inverse[0, 0], inverse[0])
    quantized, _ = quantize_matrix(weight, moments_of(inputs), scheme, GptqConfig(order="none", damp=damp, block=8))
    assert torch.equal(quantized.codes.float(), codes)


def test_near_the_best_of_all_codes_on_a_tiny_problem() -> None:
    weight, inputs = problem(rows=40, columns=32)
    weight[:, 4:] = 0  # on the grid already: only four columns are in question
    scheme = Scheme(bits=4, group_size=32)
    hessian = moments_of(inputs).hessian
    quantized, report = quantize_matrix(weight, moments_of(inputs), scheme, GptqConfig(damp=1e-4))
    grid = find_grid(weight, scheme)
    floor = torch.floor(weight[:, :4] / grid.scales)
    best = torch.full((40,), torch.inf)
    by_rounding = rtn(weight, scheme).dequantize() - weight
    for up in itertools.product((-1, 0, 1, 2), repeat=4):
        trial = torch.zeros_like(weight)
        trial[:, :4] = (floor + torch.tensor(up)).clamp(-8, 7) * grid.scales - weight[:, :4]
        best = torch.minimum(best, ((trial @ hessian) * trial).sum(1))
    off = quantized.dequantize() - weight
    reached = ((off @ hessian) * off).sum()
    rounded = ((by_rounding @ hessian) * by_rounding).sum()
    assert report.error <= report.rounding_error
    assert reached < rounded
    # The other columns may move too, so that GPTQ can be better than the best of these.
    assert reached < 1.5 * best.sum()


def test_the_block_size_changes_nothing() -> None:
    weight, inputs = problem()
    first, second = (
        quantize_matrix(weight, moments_of(inputs), FOUR, GptqConfig(block=block))[0] for block in (32, 128)
    )
    assert (first.codes != second.codes).float().mean() < 1e-3  # ties in the last bit apart


def test_act_order_gives_columns_in_the_order_of_their_inputs_size() -> None:
    weight, inputs = problem()
    quantized, _ = quantize_matrix(weight, moments_of(inputs), FOUR, GptqConfig(order="act"))
    assert quantized.order is not None
    sizes = inputs.square().mean(0)[quantized.order.long()]
    assert (sizes[:-1] >= sizes[1:]).all()
    assert lost(weight, quantized.dequantize(), inputs) < lost(weight, rtn(weight, FOUR).dequantize(), inputs)


def test_the_correction_comes_nearer_to_the_unquantised_outputs() -> None:
    weight, exact = problem(tokens=2048)
    blend = torch.randn(160, 160, generator=torch.Generator().manual_seed(1))
    inputs = exact + 0.02 * exact @ blend  # what quantised layers before would hand on
    gptq, gptaq = (
        quantize_matrix(weight, moments_of(inputs, exact), FOUR, GptqConfig(correction=share))[0].dequantize()
        for share in (0.0, 1.0)
    )
    target = exact @ weight.t()
    first, second = ((inputs @ near.t() - target).norm() for near in (gptq, gptaq))
    assert second < 0.8 * first


def test_inputs_that_never_come_are_rounded_to_nearest() -> None:
    weight, inputs = problem()
    inputs[:, [0, 77]] = 0
    quantized, report = quantize_matrix(weight, moments_of(inputs), FOUR, GptqConfig())
    assert report.dead == 2
    assert torch.equal(quantized.codes[:, [0, 77]], rtn(weight, FOUR).codes[:, [0, 77]])


def test_a_singular_hessian_takes_more_damping_and_nothing_takes_plain_rounding() -> None:
    weight, inputs = problem(tokens=3)
    _, report = quantize_matrix(weight, moments_of(inputs), FOUR, GptqConfig(damp=1e-20))
    assert report.damp == 0 or report.damp > 1e-20
    assert report.error <= report.rounding_error
    none, report = quantize_matrix(weight, InputMoments(160), FOUR, GptqConfig())
    assert report.dead == 160
    assert torch.equal(none.codes, rtn(weight, FOUR).codes)


def test_few_tokens_want_more_damping() -> None:
    weight, inputs = problem(tokens=200)
    few = quantize_matrix(weight, moments_of(inputs[:40]), FOUR, GptqConfig())[1]
    many = quantize_matrix(weight, moments_of(problem(tokens=2000)[1]), FOUR, GptqConfig())[1]
    assert (few.damp, many.damp) == (0.1, 0.01)


def test_broken_inputs_are_an_error() -> None:
    weight, inputs = problem()
    inputs[0, 0] = torch.nan
    with pytest.raises(NumericsError, match="not a number"):
        quantize_matrix(weight, moments_of(inputs), FOUR, GptqConfig())


def test_output_error_is_that_of_the_outputs() -> None:
    weight, inputs = problem()
    quantized = rtn(weight, FOUR)
    direct = lost(weight, quantized.dequantize(), inputs)
    assert output_error(weight, quantized, moments_of(inputs).hessian) == pytest.approx(direct, rel=1e-3)

"""Laws of the sampler, against a slow twin that sorts the whole vocabulary in fp64."""

import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kiloq.engine.device_draw import draw_on_device
from kiloq.engine.params import SamplingParams
from kiloq.engine.sampler import BadLogitsError, RowSampler, sample_batch
from kiloq.errors import NumericsError, RequestError

VOCAB = 20_011


def twin(logits: Tensor, params: SamplingParams, prompt: list[int], output: list[int]) -> Tensor:
    """The probabilities [V] by definition: loops, a full sort and a softmax."""
    x = logits.double().clone()
    for token_id in set(prompt) | set(output):
        penalty = params.repetition_penalty
        x[token_id] = x[token_id] / penalty if x[token_id] > 0 else x[token_id] * penalty
    for token_id, count in Counter(output).items():
        x[token_id] -= params.presence_penalty + params.frequency_penalty * count
    for token_id, bias in params.logit_bias.items():
        x[token_id] += bias
    if params.temperature == 0:
        return torch.nn.functional.one_hot(x.argmax(), len(x)).double()
    probs = (x / params.temperature).softmax(0)
    order = probs.argsort(descending=True, stable=True)
    if params.top_k:
        probs[order[params.top_k :]] = 0
        probs = probs / probs.sum()
    if params.top_p < 1:
        before = probs[order].cumsum(0) - probs[order]
        drop = before >= params.top_p
        drop[0] = False
        probs[order[drop]] = 0
    probs[probs < params.min_p * probs.max()] = 0
    return probs / probs.sum()


def scores(vocab: int, seed: int = 0, spread: float = 2.0) -> Tensor:
    return torch.randn(vocab, generator=torch.Generator().manual_seed(seed)) * spread


FILTERS = [
    {},
    {"temperature": 0.7},
    {"temperature": 1.5, "top_k": 20},
    {"top_p": 0.8},
    {"top_p": 0.95, "top_k": 40},
    {"min_p": 0.05},
    {"top_k": 100, "top_p": 0.9, "min_p": 0.02, "temperature": 1.2},
    {"repetition_penalty": 1.3, "presence_penalty": 0.7, "frequency_penalty": -0.4, "top_p": 0.9},
    {"logit_bias": {3: 5.0, 7: -100.0}, "top_k": 50},
]


def surprise(counted: np.ndarray, expected: np.ndarray) -> float:
    """Standard deviations by which chi-square exceeds its mean (Wilson-Hilferty); rare outcomes are pooled."""
    rare = expected < 5
    counted, expected = (np.append(x[~rare], x[rare].sum()) for x in (counted, expected))
    counted, expected = counted[expected > 0], expected[expected > 0]
    free = max(len(expected) - 1, 1)
    ratio = float(((counted - expected) ** 2 / expected).sum()) / free
    return (ratio ** (1 / 3) - 1 + 2 / (9 * free)) / math.sqrt(2 / (9 * free))


@pytest.mark.parametrize("asked", FILTERS, ids=str)
def test_draws_follow_the_twins_distribution(asked: dict[str, object]) -> None:
    params, logits, prompt, draws = SamplingParams(**asked), scores(300), [1, 1, 2, 50], 8_000
    expected = twin(logits, params, prompt, []).numpy() * draws
    rows = [RowSampler(params, prompt, 300, seed) for seed in range(draws)]
    ids = [sampled.token_id for sampled in sample_batch(logits.expand(draws, -1), rows)]
    counted = np.bincount(ids, minlength=300)
    assert counted[expected == 0].sum() == 0
    assert surprise(counted, expected) < 3.5


def test_successive_draws_of_one_row_follow_the_distribution() -> None:
    logits, params = scores(50), SamplingParams()
    row = RowSampler(params, [], 50, seed=1)
    counted = np.bincount([row.sample(logits).token_id for _ in range(8_000)], minlength=50)
    assert surprise(counted, twin(logits, params, [], []).numpy() * 8_000) < 3.5


@pytest.mark.parametrize("asked", [{"top_p": 0.8}, {"top_k": 40}, {"min_p": 0.1}, {"top_p": 0.99999}, {"top_p": 0.0}])
@pytest.mark.parametrize("spread", [0.0, 0.01, 3.0, 30.0])
def test_the_kept_set_is_the_twins_at_any_spread(asked: dict[str, float], spread: float) -> None:
    params, logits = SamplingParams(**asked), scores(VOCAB, spread=spread)
    rows = [RowSampler(params, [], VOCAB, seed) for seed in range(40)]
    probs = twin(logits, params, [], [])
    for sampled in sample_batch(logits.expand(40, -1), rows):
        # Equal logits at the edge may be kept in either order.
        assert logits[sampled.token_id] >= logits[probs > 0].min()


@settings(max_examples=60)
@given(data=st.data())
def test_a_row_in_a_batch_draws_what_it_draws_alone(data: st.DataObject) -> None:
    asked = data.draw(st.lists(st.sampled_from([*FILTERS, {"temperature": 0}]), min_size=1, max_size=6))
    vocab = data.draw(st.sampled_from([1, 63, 64, 65, 1000]))
    asked = [{k: v for k, v in a.items() if k != "logit_bias"} for a in asked]
    prompt = [0, vocab - 1]
    steps = [torch.stack([scores(vocab, seed=31 * t + i) for i in range(len(asked))]) for t in range(4)]
    together = [RowSampler(SamplingParams(**a), prompt, vocab, seed=i) for i, a in enumerate(asked)]
    alone = [RowSampler(SamplingParams(**a), prompt, vocab, seed=i) for i, a in enumerate(asked)]
    for logits in steps:
        batch = sample_batch(logits, together)
        assert batch == [row.sample(logits[i]) for i, row in enumerate(alone)]


def test_greedy_takes_the_most_likely_token_after_penalties() -> None:
    params = SamplingParams(
        temperature=0, repetition_penalty=1.2, presence_penalty=0.3, frequency_penalty=0.5, logit_bias={9: 1.5}
    )
    prompt, output = [3, 4, 4, *range(20, 120)], []
    row = RowSampler(params, prompt, 200, seed=0)
    for step in range(300):  # more distinct tokens, in prompt and output, than the first table holds
        logits = scores(200, seed=step % 7)
        expected = int(twin(logits, params, prompt, output).argmax())
        assert row.sample(logits).token_id == expected
        output.append(expected)
    assert len(set(output)) > 64


def test_an_almost_cold_temperature_is_greedy_and_finite() -> None:
    logits = scores(1000)
    logits[5] = torch.finfo(torch.float32).min
    for temperature in (1e-30, 1e-6):
        row = RowSampler(SamplingParams(temperature=temperature), [], 1000, seed=0)
        assert row.sample(logits).token_id == int(logits.argmax())


@pytest.mark.parametrize("asked", [{}, {"top_k": 5}, {"top_p": 0.9}, {"temperature": 0}], ids=str)
def test_masked_tokens_are_never_drawn(asked: dict[str, float]) -> None:
    logits = torch.full((5000,), -math.inf)
    logits[[7, 4999]] = torch.tensor([0.0, -1.0])
    rows = [RowSampler(SamplingParams(**asked), [], 5000, seed) for seed in range(200)]
    ids = {sampled.token_id for sampled in sample_batch(logits.expand(200, -1), rows)}
    assert ids == ({7, 4999} if asked.get("temperature") != 0 else {7})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_log_probabilities_are_the_models_own_whatever_the_filters(dtype: torch.dtype) -> None:
    logits = scores(5000).to(dtype)
    params = SamplingParams(temperature=0.5, top_k=3, presence_penalty=2, logit_bias={1: -100}, logprobs=4)
    own = logits.double().log_softmax(0)
    row = RowSampler(params, [], 5000, seed=0)
    for _ in range(5):
        sampled = row.sample(logits)
        assert sampled.logprob == pytest.approx(own[sampled.token_id].item(), abs=1e-5)
        best = own.topk(4).values
        assert [value for _, value in sampled.top_logprobs] == pytest.approx(best.tolist(), abs=1e-5)
        assert [own[i].item() for i, _ in sampled.top_logprobs] == pytest.approx(best.tolist(), abs=1e-5)


def test_log_probabilities_cost_nothing_unless_asked() -> None:
    assert RowSampler(SamplingParams(), [], 10, 0).sample(scores(10)).logprob is None
    assert RowSampler(SamplingParams(logprobs=0), [], 10, 0).sample(scores(10)).top_logprobs == ()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_without_finite_logits_is_named_before_any_state_moves(bad: float, temperature: float) -> None:
    params = SamplingParams(temperature=temperature, frequency_penalty=1.0)
    logits = torch.stack([scores(100), scores(100)])
    logits[1] = bad if bad == -math.inf else logits[1].index_fill(0, torch.tensor([17]), bad)
    rows = [RowSampler(params, [], 100, seed=3) for _ in range(2)]
    with pytest.raises(BadLogitsError, match="row 1") as caught:
        sample_batch(logits, rows)
    assert caught.value.rows == (1,)
    assert isinstance(caught.value, NumericsError)
    fresh = RowSampler(params, [], 100, seed=3)
    assert [rows[0].sample(logits[0]) for _ in range(3)] == [fresh.sample(logits[0]) for _ in range(3)]


def test_the_callers_logits_are_not_changed() -> None:
    logits = scores(100)
    before = logits.clone()
    RowSampler(SamplingParams(repetition_penalty=2.0, logit_bias={3: 9.0}), [1, 2], 100, seed=0).sample(logits)
    assert logits.equal(before)


def test_a_bias_outside_the_vocabulary_is_refused() -> None:
    with pytest.raises(RequestError, match="token 100; the model has 100"):
        RowSampler(SamplingParams(logit_bias={100: 1.0}), [], 100, seed=0)


def test_the_gpu_path_computes_in_fp32_whatever_torchs_default_is() -> None:
    logits, params = scores(4000).expand(400, -1), SamplingParams(temperature=0.7)

    def draw() -> list[int]:
        return draw_on_device(logits, [RowSampler(params, [], 4000, seed).wish() for seed in range(400)])

    expected = draw()
    torch.set_default_dtype(torch.bfloat16)  # its 0.7 is 0.699
    try:
        assert draw() == expected
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("asked", [*FILTERS, {"temperature": 0}, {"top_p": 0.999, "temperature": 3.0}], ids=str)
def test_the_gpu_path_draws_what_the_host_path_draws(asked: dict[str, object], device: str) -> None:
    logits, params = scores(4000).expand(400, -1), SamplingParams(**asked)
    host, other = ([RowSampler(params, [1, 2], 4000, seed) for seed in range(400)] for _ in range(2))
    here = [sampled.token_id for sampled in sample_batch(logits, host)]
    there = draw_on_device(logits.to(device), [row.wish() for row in other])
    # The same uniform numbers: only sums that round differently may move a draw to a neighbour.
    assert sum(a != b for a, b in zip(here, there, strict=True)) < 5

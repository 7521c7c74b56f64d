"""Embeddings and log probabilities of given texts, against the model as a whole and against generation."""

import math

import pytest
import torch

from kiloq.engine import SamplingParams
from kiloq.engine.score import embed_parts, finished, score_parts
from kiloq.errors import ContextLengthError, RequestError
from kiloq.model import Transformer

KINDS = ("v1", "gqa", "qk-norm", "windows")


def score(model: Transformer, prompts: list[list[int]], top: int = 0) -> list:
    return finished(score_parts(model, prompts, top, max_context=256))


def embed(model: Transformer, prompts: list[list[int]]) -> list[list[float]]:
    return finished(embed_parts(model, prompts, max_context=256))


@pytest.mark.parametrize("kind", KINDS)
def test_a_tokens_score_is_its_log_probability_after_all_before_it(lab, kind: str) -> None:
    """Several prompts at once, one longer than v1's first NTK factor reaches, one of a single token."""
    model, prompts = lab.model(kind), [lab.ids(50), lab.ids(7, seed=1), [3], lab.ids(20, seed=2)]
    for ids, scored in zip(prompts, score(model, prompts, top=5), strict=True):
        expected = model.logits(torch.tensor(ids)).log_softmax(1)
        assert [one.token_id for one in scored] == ids
        assert scored[0].logprob is None
        assert scored[0].top_logprobs == ()
        for i, one in enumerate(scored[1:]):
            best = expected[i].topk(5)
            assert one.logprob == pytest.approx(expected[i, ids[i + 1]].item(), abs=1e-4)
            assert [token_id for token_id, _ in one.top_logprobs] == best.indices.tolist()
            assert [logprob for _, logprob in one.top_logprobs] == pytest.approx(best.values.tolist(), abs=1e-4)


def test_what_was_generated_is_scored_as_it_was_drawn(lab) -> None:
    engine, ids = lab.engine("gqa"), lab.ids(10)
    engine.add(ids, SamplingParams(max_tokens=12, seed=1, logprobs=2, ignore_eos=True), request_id="r")
    drawn = [one for event in lab.run(engine)["r", 0] for one in event.logprobs]
    scored = score(lab.model("gqa"), [[*ids, *(one.token_id for one in drawn)]], top=2)[0][10:]
    assert [one.token_id for one in scored] == [one.token_id for one in drawn]
    assert [one.logprob for one in scored] == pytest.approx([one.logprob for one in drawn], abs=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_an_embedding_is_the_direction_of_the_mean_hidden_state(lab, kind: str) -> None:
    model, prompts = lab.model(kind), [lab.ids(50), lab.ids(7, seed=1), [3]]
    for ids, vector in zip(prompts, embed(model, prompts), strict=True):
        mean = model(torch.tensor(ids), *model.packed((0, len(ids)), torch.device("cpu"))).mean(0)
        assert vector == pytest.approx((mean / mean.norm()).tolist(), abs=1e-5)
        assert math.hypot(*vector) == pytest.approx(1)


def test_company_changes_nothing(lab) -> None:
    """More tokens than go through the model together."""
    model, prompts = lab.model("v1"), [lab.ids(1 + 37 * i % 120, seed=i) for i in range(40)]
    together, alone = embed(model, prompts), [embed(model, [ids])[0] for ids in prompts]
    for one, other in zip(together, alone, strict=True):
        assert one == pytest.approx(other, abs=1e-5)


def test_generation_goes_on_between_the_parts(lab) -> None:
    """No part is more than one layer, and neither work disturbs the other."""
    model, prompts, params = lab.model("v1"), [lab.ids(60)], SamplingParams(max_tokens=30, seed=3, ignore_eos=True)
    alone = lab.engine()
    alone.add(lab.ids(40, seed=1), params, request_id="r")
    expected = lab.answers(alone)
    engine, said = lab.engine(), []
    engine.add(lab.ids(40, seed=1), params, request_id="r")
    parts = score_parts(model, prompts, 1, max_context=256)
    steps = 0
    while True:
        try:
            next(parts)
        except StopIteration as end:
            scored = end.value
            break
        said += [i for event in engine.step() for i in event.token_ids]
        assert not torch.is_inference_mode_enabled()
        steps += 1
    assert steps >= 2 * model.config.num_layers
    assert tuple(said) == expected["r", 0][: len(said)]
    assert len(said) >= steps - 1
    assert scored == score(model, prompts, top=1)


def test_what_cannot_be_read_is_refused_with_its_number(lab) -> None:
    model = lab.model()
    with pytest.raises(RequestError, match=r"prompts\[1\] is empty"):
        embed(model, [[1], []])
    with pytest.raises(ContextLengthError, match=r"prompts\[1\] has 257 tokens, but the limit is 256") as error:
        score(model, [[1], lab.ids(257)])
    assert error.value.limit == 256
    with pytest.raises(RequestError, match="token 480"):
        embed(model, [[480]])

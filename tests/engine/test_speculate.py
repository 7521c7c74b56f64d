"""Speculative decoding: fewer steps, the same tokens, the same distribution, and a cache that holds no guesses."""

import copy
from collections import Counter
from functools import cache
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kiloq.engine import Engine, EngineConfig
from kiloq.engine.lookup import Guesser, PromptLookup
from kiloq.engine.params import SamplingParams
from kiloq.errors import ConfigError, RequestError
from kiloq.model import Transformer

GREEDY = {"temperature": 0.0, "ignore_eos": True}
WARM = {"temperature": 0.7, "top_p": 0.9, "ignore_eos": True}
KINDS = ("v1", "windows")


def near(model: Transformer, noise: float) -> Transformer:
    """A draft that often says what `model` says: the same weights, disturbed."""
    draft = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(3)
    for parameter in draft.parameters():
        parameter.add_(torch.empty_like(parameter).normal_(0, noise, generator=generator))
    return draft


def engine_of(lab, kind: str, draft: Transformer | None = None, *, observer=None, **limits: object) -> Engine:
    config = EngineConfig(**limits)
    engine = Engine(lab.model(kind), config, tokenizer=lab.tokenizer(), draft=draft, logits_observer=observer)
    engine._speculation._draft_cost = 0.0  # drafts as large as the model are to guess all the same
    return engine


def told(lab, engine: Engine, prompts: list[list[int]], params: SamplingParams) -> dict:
    """Of every answer what its events say together."""
    for i, prompt in enumerate(prompts):
        engine.add(prompt, params, request_id=str(i))
    return {
        key: (
            tuple(i for event in events for i in event.token_ids),
            "".join(event.text for event in events),
            events[-1].finish_reason,
            events[-1].stop_id,
            tuple(one.token_id for event in events for one in event.logprobs),
        )
        for key, events in lab.run(engine).items()
    }


@cache
def plainly(lab, kind: str, params: SamplingParams) -> dict:
    """The answers to `prompts_of` without guesses."""
    return told(lab, engine_of(lab, kind), prompts_of(lab), params)


def prompts_of(lab) -> list[list[int]]:
    phrase = lab.ids(12, seed=9)
    return [lab.ids(20), phrase * 4, [*lab.ids(40, seed=1), *phrase, *lab.ids(5, seed=2), *phrase[:4]], lab.ids(1)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", ["prompt-lookup", "itself", "near", "stranger"])
@pytest.mark.parametrize(
    "wishes",
    [
        GREEDY,
        WARM,
        {**WARM, "top_p": 1.0, "n": 3, "seed": 7},
        {**WARM, "repetition_penalty": 1.2, "frequency_penalty": 0.5, "logprobs": 2},
        {**WARM, "temperature": 1.0, "stop": ("a", "\x03"), "stop_ids": tuple(range(64)), "ignore_eos": False},
    ],
    ids=["greedy", "warm", "several", "penalties", "stops"],
)
def test_answers_are_those_of_plain_decoding(lab, kind: str, way: str, wishes: dict) -> None:
    # "v1" crosses its trained length of 32 tokens, where all of it is computed again.
    prompts = prompts_of(lab)
    plain = plainly(lab, kind, SamplingParams(max_tokens=30, speculation="none", **wishes))
    drafts = {"itself": lab.model(kind), "near": near(lab.model(kind), 0.01), "stranger": lab.model("qk-norm")}
    params = SamplingParams(max_tokens=30, speculation="prompt-lookup" if way == "prompt-lookup" else "draft", **wishes)
    engine = engine_of(lab, kind, drafts.get(way))
    assert told(lab, engine, prompts, params) == plain


def test_a_draft_that_agrees_saves_steps_and_a_repetition_does(lab) -> None:
    steps = {}
    for way, draft in (("none", None), ("prompt-lookup", None), ("draft", lab.model("gqa"))):
        engine = engine_of(lab, "gqa", draft)
        told(lab, engine, [lab.ids(20)], SamplingParams(max_tokens=100, speculation=way, **GREEDY))
        steps[way] = engine.stats.steps
    # Greedy answers of a random model soon repeat themselves.
    assert steps["none"] == 100
    assert steps["draft"] < 25
    assert steps["prompt-lookup"] < 80


def test_guesses_never_reach_the_prefix_cache(lab) -> None:
    # What a following request finds cached must be what its ids say: a stranger's guesses are nearly all wrong.
    observed = lab.Observed()
    engine = engine_of(lab, "gqa", lab.model("windows"), observer=observed)
    prompt = lab.ids(20)
    answers = told(lab, engine, [prompt], SamplingParams(max_tokens=60, speculation="draft", **GREEDY))
    ids = [*prompt, *answers["0", 0][0]]
    engine.add(ids, SamplingParams(max_tokens=4, speculation="none", **GREEDY), request_id="again")
    usage = lab.run(engine)["again", 0][-1].usage
    assert usage.cached_tokens == (len(ids) - 1) // 16 * 16
    exact = lab.model("gqa").logits(torch.tensor(ids))[-1]
    torch.testing.assert_close(observed.rows["again", 0, len(ids)], exact, rtol=0, atol=1e-5)


@pytest.mark.parametrize("way", ["prompt-lookup", "draft"])
def test_a_pool_that_is_too_small_slows_and_changes_nothing(lab, way: str) -> None:
    prompts = [lab.ids(30, seed=i) for i in range(5)]
    wishes = {"max_tokens": 40, **GREEDY}
    plain = told(lab, engine_of(lab, "gqa"), prompts, SamplingParams(speculation="none", **wishes))
    memory = lab.model("gqa").config.kv_bytes_per_token(4) * 16 * 9
    engine = engine_of(lab, "gqa", lab.model("gqa") if way == "draft" else None, kv_memory=memory, step_tokens=16)
    assert told(lab, engine, prompts, SamplingParams(speculation=way, **wishes)) == plain
    assert engine.stats.preempted > 0


def test_cancelling_frees_the_drafts_blocks_too(lab) -> None:
    engine = engine_of(lab, "gqa", lab.model("gqa"))
    for i in range(3):
        engine.add(lab.ids(30, seed=i), SamplingParams(max_tokens=50, **GREEDY), request_id=str(i))
    for _ in range(4):
        engine.step()
    engine.cancel("1")
    engine.check_integrity()
    lab.run(engine)  # checks it too
    assert not engine._speculation._draft._states


def test_an_interrupted_step_begins_again_with_the_same_tokens(lab, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt, params = lab.ids(30), SamplingParams(max_tokens=30, speculation="draft", **WARM)
    plain = told(lab, engine_of(lab, "gqa", lab.model("gqa")), [prompt], params)
    engine = engine_of(lab, "gqa", lab.model("gqa"))
    engine.add(prompt, params, request_id="0")
    events = list(engine.step())
    draft_runner = engine._speculation._draft._runner
    for runner in (engine._runner, draft_runner):
        events += engine.step()  # past the prompt, that is computed again

        def interrupted(batch: object) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(runner, "logits", interrupted)
            with pytest.raises(KeyboardInterrupt):
                engine.step()
        engine.check_integrity()
    events += lab.run(engine)["0", 0]
    assert tuple(i for event in events for i in event.token_ids) == plain["0", 0][0]


def test_draws_are_distributed_as_the_model_says(lab) -> None:
    # Three tokens of four each, 64 outcomes, guessed by a draft that is right about half the time.
    model, prompt, count = lab.model("gqa"), lab.ids(20), 128 * 20

    def law(ids: list[int]) -> list[tuple[int, float]]:
        best = model.logits(torch.tensor(ids))[-1].topk(4)
        return list(zip(best.indices.tolist(), (best.values / 6).softmax(0).tolist(), strict=True))

    expected = {
        (first, second, third): p1 * p2 * p3
        for first, p1 in law(prompt)
        for second, p2 in law([*prompt, first])
        for third, p3 in law([*prompt, first, second])
    }
    engine = engine_of(lab, "gqa", near(model, 0.02), max_batch=8)
    wishes = {"temperature": 6.0, "top_k": 4, "ignore_eos": True, "speculation": "draft"}
    for _ in range(count // 128):
        engine.add(prompt, SamplingParams(max_tokens=3, n=128, **wishes))
    found = Counter(lab.answers(engine).values())
    assert found.keys() <= expected.keys()
    chi_square = sum((found[one] - count * p) ** 2 / (count * p) for one, p in expected.items())
    assert chi_square < 103.4  # 63 degrees of freedom, 1 in 1,000
    assert 0.2 < engine.stats.guessed_right / engine.stats.guessed < 0.9


@given(st.lists(st.integers(0, 3), min_size=1, max_size=60), st.integers(1, 8))
def test_a_lookup_guesses_what_followed_the_newest_like_tokens(ids: list[int], most: int) -> None:
    growing = PromptLookup()
    for length in range(1, len(ids)):
        growing.guess(ids[:length], most)
    guess = growing.guess(ids, most)
    assert guess == PromptLookup().guess(ids, most)
    ends = {n: max((end for end in range(n, len(ids)) if ids[end - n : end] == ids[-n:]), default=None) for n in (3, 2)}
    at = ends[3] or ends[2]
    period = [] if at is None else ids[at:]
    assert guess == (tuple(period[i % len(period)] for i in range(most)) if period else ())


def test_guessing_pauses_longer_and_longer_while_it_is_wrong_and_returns_when_it_is_right() -> None:
    guesser, guessed_at = Guesser("prompt-lookup", 0.1), []
    for num_tokens in range(1000):
        if not guesser.is_silent(num_tokens):
            guessed_at.append(num_tokens)
            guesser.learn(num_tokens + 1, guesser.most, 0)
    assert len(guessed_at) < 20
    assert guesser.most == 1
    for num_tokens, _ in product(range(1000, 2000), range(3)):
        if not guesser.is_silent(num_tokens):
            guesser.learn(num_tokens, guesser.most, guesser.most)
    assert guesser.most == 8
    assert not guesser.is_silent(2000)


def test_a_draft_must_be_there_and_of_the_same_vocabulary(lab) -> None:
    with pytest.raises(RequestError, match="no draft model"):
        engine_of(lab, "gqa").add([1], SamplingParams(speculation="draft"))
    with pytest.raises(RequestError, match="one of auto, none"):
        SamplingParams(speculation="tree")
    other = copy.copy(lab.model("gqa"))
    object.__setattr__(other, "config", copy.copy(other.config))
    object.__setattr__(other.config, "vocab_size", 9999)
    with pytest.raises(ConfigError, match="9,999"):
        engine_of(lab, "gqa", other)

"""Laws of the engine against the plain model: what batching, chunking, sharing and recomputing may never change."""

import copy

import pytest
import torch

from kiloq.engine import Engine, EngineConfig
from kiloq.engine.params import SamplingParams
from kiloq.errors import RequestError

KINDS = ("v1", "gqa", "qk-norm", "windows")
GREEDY = {"temperature": 0.0, "ignore_eos": True}


def naive_greedy(lab, kind: str, prompt: list[int], count: int) -> list[int]:
    """Every token by a forward pass over the whole sequence."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(lab.model(kind).logits(torch.tensor(ids))[-1].argmax()))
    return ids[len(prompt) :]


def logits_alone(lab, kind: str, prompts: list[list[int]], params: SamplingParams, **limits: object) -> dict:
    """What each request's answer was drawn from when it had an engine for itself."""
    rows = {}
    for i, prompt in enumerate(prompts):
        observed = lab.Observed()
        engine = lab.engine(kind, observer=observed, **limits)
        engine.add(prompt, params, request_id=str(i))
        lab.run(engine)
        rows |= observed.rows
    return rows


def assert_same_rows(rows: dict, expected: dict, tolerance: float) -> None:
    assert rows.keys() == expected.keys()
    for key, row in rows.items():
        torch.testing.assert_close(
            row, expected[key], rtol=0, atol=tolerance, msg=lambda text, key=key: f"{key}: {text}"
        )


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_equals_the_naive_loop_token_for_token(lab, kind: str) -> None:
    prompts = [lab.ids(n, seed=n) for n in (1, 5, 16, 23, 33, 70)]
    engine = lab.engine(kind)
    for i, prompt in enumerate(prompts):
        engine.add(prompt, SamplingParams(max_tokens=24, **GREEDY), request_id=str(i))
    answers = lab.answers(engine)
    for i, prompt in enumerate(prompts):
        assert list(answers[str(i), 0]) == naive_greedy(lab, kind, prompt, 24)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_a_gpu_gives_the_same_tokens(lab, kind: str) -> None:
    prompts = [lab.ids(n, seed=n) for n in (1, 23, 70)]
    model = copy.deepcopy(lab.model(kind)).to("cuda")
    engine = Engine(model, EngineConfig(step_tokens=64), tokenizer=lab.tokenizer())
    for i, prompt in enumerate(prompts):
        engine.add(prompt, SamplingParams(max_tokens=24, **GREEDY), request_id=str(i))
    answers = lab.answers(engine)
    for i, prompt in enumerate(prompts):
        assert list(answers[str(i), 0]) == naive_greedy(lab, kind, prompt, 24)


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_in_any_batch_equals_the_row_alone(lab, kind: str) -> None:
    # 20 and 31 cross the trained length of 32 while decoding, 50 and 90 begin beyond it.
    prompts = [lab.ids(n, seed=n) for n in (3, 20, 31, 50, 90)]
    params = SamplingParams(max_tokens=20, **GREEDY)
    observed = lab.Observed()
    engine = lab.engine(kind, observer=observed)
    for i, prompt in enumerate(prompts):
        engine.add(prompt, params, request_id=str(i))
    lab.run(engine)
    assert_same_rows(observed.rows, logits_alone(lab, kind, prompts, params), 1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("step_tokens", [1, 7, 16, 50])
def test_any_chunking_of_the_prompt_gives_the_same_logits(lab, kind: str, step_tokens: int) -> None:
    prompt = lab.ids(75)
    observed = lab.Observed()
    engine = lab.engine(kind, observer=observed, max_batch=1, step_tokens=step_tokens)
    engine.add(prompt, SamplingParams(max_tokens=1, **GREEDY), request_id="0")
    lab.run(engine)
    whole = lab.model(kind).logits(torch.tensor(prompt))[-1]
    torch.testing.assert_close(observed.rows["0", 0, 75], whole, rtol=0, atol=1e-5)


def test_decoding_across_ntk_boundaries_equals_recomputing_from_scratch(lab) -> None:
    prompt = lab.ids(20)
    observed = lab.Observed()
    engine = lab.engine("v1", observer=observed)
    engine.add(prompt, SamplingParams(max_tokens=120, **GREEDY), request_id="0")
    ids = prompt + list(lab.answers(engine)["0", 0])
    # From 20 to 140 tokens the factor goes 1, 3, 7, 15.
    assert len(observed.rows) == 120
    for (_, _, length), row in observed.rows.items():
        again = lab.model("v1").logits(torch.tensor(ids[:length]))[-1]
        torch.testing.assert_close(row, again, rtol=0, atol=1e-4)


def test_interleaving_100_requests_changes_nothing(lab) -> None:
    def ask(engine, i: int) -> None:
        params = SamplingParams(max_tokens=5 + 3 * i % 31, temperature=1.0, top_p=0.9, seed=i, ignore_eos=True)
        engine.add(lab.ids(1 + 7 * i % 60, seed=i % 10), params, request_id=str(i))

    alone = {}
    for i in range(100):
        engine = lab.engine("v1", max_batch=1)
        ask(engine, i)
        alone |= lab.answers(engine)
    engine = lab.engine("v1", max_batch=8, step_tokens=40, kv_memory=lab.model("v1").config.kv_bytes_per_token(4) * 192)
    events = []
    for i in range(100):
        ask(engine, i)
        if i % 3 == 0:
            events += engine.step()
    while engine.has_work:
        events += engine.step()
    together: dict[tuple[str, int], tuple[int, ...]] = {}
    for event in events:
        key = event.request_id, event.index
        together[key] = together.get(key, ()) + event.token_ids
    assert together == alone
    assert engine.stats.preempted > 0, "the pool was meant to be too small"


@pytest.mark.parametrize("kind", KINDS)
def test_a_cached_prefix_changes_nothing_and_is_counted(lab, kind: str) -> None:
    shared = lab.ids(21)
    params = SamplingParams(max_tokens=8, **GREEDY)
    observed = lab.Observed()
    engine = lab.engine(kind, observer=observed)
    usages = []
    prompts = [shared, shared, shared + lab.ids(4, seed=1), shared[:16], shared[:15]]
    for i, prompt in enumerate(prompts):
        engine.add(prompt, params, request_id=str(i))
        usages.append(lab.run(engine)[str(i), 0][-1].usage)
    assert_same_rows(observed.rows, logits_alone(lab, kind, prompts, params), 1e-5)
    # A prompt of 16 tokens computes its last one again, and with it the block.
    assert [usage.cached_tokens for usage in usages] == [0, 16, 16, 0, 0]
    assert usages[2].prompt_tokens == 25


def test_an_answer_is_a_cached_prefix_of_the_next_turn(lab) -> None:
    engine = lab.engine("gqa")
    params = SamplingParams(max_tokens=30, **GREEDY)
    prompt = lab.ids(10)
    engine.add(prompt, params, request_id="1")
    answer = list(lab.answers(engine)["1", 0])
    engine.add(prompt + answer + lab.ids(7, seed=2), params, request_id="2")
    usage = lab.run(engine)["2", 0][-1].usage
    assert usage.cached_tokens == 32  # 39 of 40 tokens were computed: two full blocks


def test_requests_that_begin_together_share_their_prefix_at_once(lab) -> None:
    engine = lab.engine("v1", step_tokens=512)
    shared = lab.ids(64)
    for i in range(4):
        engine.add([*shared, i], SamplingParams(max_tokens=2, **GREEDY), request_id=str(i))
    events = engine.step()
    assert len(events) == 4
    assert engine.stats.computed_tokens == 65 + 3
    answers = lab.answers(engine)
    assert list(answers["3", 0])[-1] == naive_greedy(lab, "v1", [*shared, 3], 2)[-1]


def test_ntk_factors_do_not_share_prefixes(lab) -> None:
    engine = lab.engine("v1")
    params = SamplingParams(max_tokens=1, **GREEDY)
    short, long = lab.ids(32), lab.ids(32) + lab.ids(10, seed=3)
    usages = []
    for i, prompt in enumerate((short, long, long)):
        engine.add(prompt, params, request_id=str(i))
        usages.append(lab.run(engine)[str(i), 0][-1].usage.cached_tokens)
    assert usages == [0, 0, 32]


def test_n_answers_share_the_prompt_and_equal_single_ones(lab) -> None:
    prompt = lab.ids(40)
    engine = lab.engine("gqa")
    engine.add(prompt, SamplingParams(max_tokens=12, n=3, seed=5, ignore_eos=True), request_id="n")
    first = engine.step()
    assert len(first) == 3
    assert engine.stats.computed_tokens == 40 + 2 * 8
    events = lab.run(engine)
    answers = {
        key: [i for event in [*first, *more] if (event.request_id, event.index) == key for i in event.token_ids]
        for key, more in events.items()
    }
    usages = [event.usage for more in events.values() for event in more if event.usage]
    assert [(usage.prompt_tokens, usage.completion_tokens) for usage in usages] == [(40, 36)]
    for index in range(3):
        engine.add(prompt, SamplingParams(max_tokens=12, seed=5 + index, ignore_eos=True), request_id="one")
        assert list(lab.answers(engine)["one", 0]) == answers["n", index]


def test_the_pool_is_no_larger_than_the_requests_can_use(lab) -> None:
    engine = lab.engine("v1", max_context=100, max_batch=3)
    assert engine.stats.blocks == 3 * 7


def test_default_seeds_follow_the_engine_seed_and_differ_between_requests(lab) -> None:
    def draw(seed: int) -> list[tuple[int, ...]]:
        engine = lab.engine("gqa", seed=seed)
        for i in range(3):
            engine.add(lab.ids(5), SamplingParams(max_tokens=10, ignore_eos=True), request_id=str(i))
        return sorted(lab.answers(engine).values())

    assert draw(1) == draw(1)
    assert len({*draw(1), *draw(2)}) == 6


@pytest.mark.parametrize(
    ("prompt", "params", "words"),
    [
        ([], {}, ("empty",)),
        ([480], {}, ("480", "479")),
        ([1] * 90, {"max_tokens": 20}, ("90", "20", "100", "max_context to 110")),
        ([1] * 100, {}, ("100", "at least 1")),
        ([1], {"logit_bias": {500: 1.0}}, ("500",)),
    ],
)
def test_a_request_that_cannot_be_served_is_refused_at_the_door(lab, prompt, params, words) -> None:
    engine = lab.engine("v1", max_context=100)
    with pytest.raises(RequestError) as refusal:
        engine.add(prompt, SamplingParams(**params))
    assert all(word in str(refusal.value) for word in words), refusal.value
    assert not engine.has_work


def test_a_request_larger_than_the_whole_pool_is_refused(lab) -> None:
    engine = lab.engine("v1", kv_memory=lab.model("v1").config.kv_bytes_per_token(4) * 64)
    with pytest.raises(RequestError, match=r"70 tokens.*limit is 64.*kv_memory"):
        engine.add(lab.ids(70), SamplingParams())
    engine.add(lab.ids(30), SamplingParams(**GREEDY), request_id="fits")
    events = lab.run(engine)["fits", 0]
    assert events[-1].finish_reason == "length"
    assert sum(len(event.token_ids) for event in events) == 34


def test_a_name_is_used_by_one_running_request_at_a_time(lab) -> None:
    engine = lab.engine()
    engine.add([1], SamplingParams(max_tokens=1), request_id="a")
    with pytest.raises(RequestError, match="'a'"):
        engine.add([1], SamplingParams(max_tokens=1), request_id="a")
    lab.run(engine)
    engine.add([1], SamplingParams(max_tokens=1), request_id="a")

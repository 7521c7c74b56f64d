"""How answers end: stop ids and strings, limits, cancelling, broken weights, interrupts. And what they leave behind."""

import copy
import sys
from types import FrameType

import pytest
import torch

from kiloq.engine import Engine, EngineConfig
from kiloq.engine.events import Event
from kiloq.engine.params import SamplingParams
from kiloq.errors import NumericsError, RequestError

GREEDY = {"temperature": 0.0, "ignore_eos": True}


def ask(lab, engine: Engine, prompt: list[int], **params: object):
    """One request alone; its events."""
    name = engine.add(prompt, SamplingParams(**params))
    return lab.run(engine)[name, 0]


def ids_of(events) -> list[int]:
    return [token_id for event in events for token_id in event.token_ids]


def text_of(events) -> str:
    return "".join(event.text for event in events)


@pytest.fixture(scope="module")
def free_run(lab) -> list[int]:
    """What the model says to prompt 0 when nothing stops it."""
    return ids_of(ask(lab, lab.engine(), lab.ids(10), max_tokens=40, **GREEDY))


def test_max_tokens_ends_with_length_and_usage_counts(lab) -> None:
    events = ask(lab, lab.engine(), lab.ids(10), max_tokens=7, **GREEDY)
    assert len(ids_of(events)) == 7
    assert [event.finish_reason for event in events] == [None] * 6 + ["length"]
    usage = events[-1].usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (10, 7, 17)
    assert all(event.usage is None for event in events[:-1])


def test_without_max_tokens_the_context_is_the_limit(lab) -> None:
    events = ask(lab, lab.engine(max_context=50), lab.ids(10), **GREEDY)
    assert events[-1].finish_reason == "length"
    assert len(ids_of(events)) == 40


@pytest.mark.parametrize("own", [True, False])
def test_a_stop_id_ends_the_answer_and_is_not_part_of_it(lab, free_run: list[int], own: bool) -> None:
    stop_id = free_run[5]
    expected = free_run[: free_run.index(stop_id)]
    engine = Engine(lab.model(), tokenizer=lab.tokenizer(), stop_ids=[stop_id] if own else ())
    params = {"temperature": 0.0, "max_tokens": 40} | ({} if own else {"stop_ids": (stop_id,)})
    events = ask(lab, engine, lab.ids(10), **params)
    assert ids_of(events) == expected
    assert (events[-1].finish_reason, events[-1].stop_id) == ("stop", stop_id)
    assert events[-1].usage.completion_tokens == len(expected) + 1


def test_ignore_eos_switches_off_the_models_stop_ids_only(lab, free_run: list[int]) -> None:
    engine = Engine(lab.model(), tokenizer=lab.tokenizer(), stop_ids=[free_run[5]])
    assert ids_of(ask(lab, engine, lab.ids(10), max_tokens=40, **GREEDY)) == free_run
    asked = free_run[20]
    cut = free_run[: free_run.index(asked)]
    assert ids_of(ask(lab, engine, lab.ids(10), max_tokens=40, stop_ids=(asked,), **GREEDY)) == cut


def test_a_stop_string_across_tokens_is_cut_from_the_text(lab) -> None:
    engine = lab.engine()
    bias = {ord(letter): 50.0 for letter in "ab"}  # an answer of as and bs, one token each
    params = {"seed": 3, "max_tokens": 60, "logit_bias": bias, "ignore_eos": True}
    free = ask(lab, engine, lab.ids(10), **params)
    stop = text_of(free)[20:24]
    cut = ask(lab, engine, lab.ids(10), stop=(stop,), **params)
    end = text_of(free).index(stop)
    assert text_of(cut) == text_of(free)[:end]
    assert cut[-1].finish_reason == "stop"
    assert cut[-1].stop_id is None
    # The ids are those that were drawn, the stop string's among them.
    assert ids_of(cut) == ids_of(free)[: end + 4]
    assert cut[-1].usage.completion_tokens == end + 4


def test_half_a_character_at_the_end_is_shown_as_broken(lab) -> None:
    bias = {0xE4: 100.0}  # the first byte of three
    events = ask(lab, lab.engine(), [1], max_tokens=2, logit_bias=bias, **GREEDY)
    assert [event.text for event in events] == ["", "��"]


def test_logprobs_come_with_their_tokens(lab) -> None:
    events = ask(lab, lab.engine(), lab.ids(10), max_tokens=3, logprobs=2, **GREEDY)
    expected = lab.model().logits(torch.tensor(lab.ids(10)))[-1].log_softmax(-1)
    first = events[0].logprobs[0]
    assert first.token_id == events[0].token_ids[0]
    assert first.logprob == pytest.approx(float(expected.max()), abs=1e-4)
    assert [token_id for token_id, _ in first.top_logprobs] == expected.topk(2).indices.tolist()


def test_cancelling_tells_once_and_frees_everything(lab) -> None:
    engine = lab.engine(max_batch=2)
    for name in ("running", "other", "waiting"):
        engine.add(lab.ids(20, seed=len(name)), SamplingParams(max_tokens=30, n=1, **GREEDY), request_id=name)
    for _ in range(3):
        engine.step()
    for name in ("running", "waiting", "running", "never heard of"):
        engine.cancel(name)
    told = engine.step()
    assert {event.request_id: event.finish_reason for event in told} == {
        "running": "cancelled", "waiting": "cancelled", "other": None,
    }  # fmt: skip
    assert {event.request_id: event.usage and event.usage.completion_tokens for event in told} == {
        "running": 3, "waiting": 0, "other": None,
    }  # fmt: skip
    engine.cancel("other")
    assert engine.has_work
    lab.run(engine)
    assert engine.stats.blocks_available == engine.stats.blocks


def test_cancelling_one_of_n_answers_cancels_the_request(lab) -> None:
    engine = lab.engine()
    engine.add(lab.ids(4), SamplingParams(max_tokens=30, n=3, ignore_eos=True), request_id="n")
    engine.step()
    engine.cancel("n")
    told = engine.step()
    assert [(event.index, event.finish_reason) for event in told] == [
        (0, "cancelled"),
        (1, "cancelled"),
        (2, "cancelled"),
    ]
    assert [event.usage is None for event in told] == [True, True, False]
    assert not engine.has_work
    engine.check_integrity()


def test_a_cancel_at_any_moment_of_a_step_waits_for_its_end(lab) -> None:
    """A garbage collector may close an abandoned stream between any two calls."""
    prompt = lab.ids(20)
    expected = ids_of(ask(lab, lab.engine(), prompt, max_tokens=6, **GREEDY))

    def run(moment: int) -> int:
        """Cancel at the given call of ours inside a step; how many calls there were."""
        engine, calls = lab.engine(max_context=128), 0
        engine.add(prompt, SamplingParams(max_tokens=6, **GREEDY), request_id="kept")
        engine.add(lab.ids(30), SamplingParams(max_tokens=3, n=2, ignore_eos=True), request_id="dropped")
        got: dict[str, list[Event]] = {"kept": [], "dropped": []}

        def watch(frame: FrameType, event: str, arg: object) -> None:
            nonlocal calls
            if event == "call" and "/kiloq/" in frame.f_code.co_filename:
                calls += 1
                if calls == moment:
                    engine.cancel("dropped")

        while engine.has_work:
            sys.setprofile(watch)
            try:
                events = engine.step()
            finally:
                sys.setprofile(None)
            for event in events:
                got[event.request_id].append(event)
            engine.check_integrity()
        assert ids_of(got["kept"]) == expected
        ends = [event.index for event in got["dropped"] if event.finish_reason]
        assert sorted(ends) == [0, 1]
        for index in ends:
            assert [event for event in got["dropped"] if event.index == index][-1].finish_reason
        assert engine.stats.blocks_available == engine.stats.blocks
        return calls

    for moment in range(1, run(0), 7):
        run(moment)


@pytest.fixture
def broken(lab):
    """A model whose token 255 is not a number; its head is its own, so that other rows are sound."""
    model = copy.deepcopy(lab.model("v1"))
    model.embed.weight[255] = torch.nan
    return model


def test_broken_logits_end_the_affected_request_only(lab, broken) -> None:
    engine = Engine(
        broken, EngineConfig(kv_memory=broken.config.kv_bytes_per_token(4) * 128), tokenizer=lab.tokenizer()
    )
    sound = [token_id for token_id in lab.ids(40) if token_id != 255]
    params = SamplingParams(max_tokens=20, n=2, seed=1, ignore_eos=True, logit_bias={255: -100})
    engine.add(sound, params, request_id="sound")
    for _ in range(4):
        engine.step()
    before = engine.stats.generated_tokens
    engine.add([*sound[:17], 255, 3], params, request_id="broken")
    events = lab.run(engine)
    (error,) = [event for key, parts in events.items() if key[0] == "broken" for event in parts]
    assert isinstance(error.error, NumericsError)
    assert "'broken'" in str(error.error)
    assert (error.finish_reason, error.usage.completion_tokens) == ("error", 0)
    assert engine.stats.generated_tokens == 40 > before
    # The freed blocks hold what is not a number; whoever gets them next must not notice.
    for seed in (2, 3):
        prompt = [token_id for token_id in lab.ids(60, seed=seed) if token_id != 255]
        again = ids_of(ask(lab, engine, prompt, max_tokens=40, seed=1, ignore_eos=True, logit_bias={255: -100}))
        fresh = Engine(lab.model("v1"), tokenizer=lab.tokenizer())
        assert again == ids_of(ask(lab, fresh, prompt, max_tokens=40, seed=1, ignore_eos=True, logit_bias={255: -100}))


def test_what_a_broken_request_computed_is_shared_with_nobody(lab, broken) -> None:
    engine = Engine(broken, tokenizer=lab.tokenizer())
    prompt = [7] * 20 + [255]
    for _ in range(2):
        events = ask(lab, engine, prompt, max_tokens=2)
        assert (events[0].finish_reason, events[0].usage.cached_tokens) == ("error", 0)


class Interrupt:
    """Raises between two layers, as Ctrl-C may."""

    def __init__(self) -> None:
        self.armed = False

    def __call__(self, module: torch.nn.Module, args: tuple[object, ...]) -> None:
        if self.armed:
            self.armed = False
            raise KeyboardInterrupt


def test_an_interrupted_step_changes_no_answer(lab) -> None:
    prompts = [lab.ids(8) + lab.ids(17 + i, seed=i // 2) for i in range(4)]
    expected = {}
    for i, prompt in enumerate(prompts):
        expected |= {str(i): ids_of(ask(lab, lab.engine(), prompt, max_tokens=30, **GREEDY))}
    model, interrupt = copy.deepcopy(lab.model()), Interrupt()
    model.blocks[1].register_forward_pre_hook(interrupt)
    engine = Engine(model, EngineConfig(step_tokens=16), tokenizer=lab.tokenizer())
    for i, prompt in enumerate(prompts):
        engine.add(prompt, SamplingParams(max_tokens=30, **GREEDY), request_id=str(i))
    got: dict[str, list[int]] = {}
    steps = 0
    while engine.has_work:
        interrupt.armed = steps % 5 == 4
        steps += 1
        try:
            events = engine.step()
        except KeyboardInterrupt:
            engine.check_integrity()
            continue
        for event in events:
            got.setdefault(event.request_id, []).extend(event.token_ids)
    assert got == expected


def test_an_engine_without_a_tokenizer_speaks_in_ids(lab) -> None:
    engine = Engine(lab.model())
    events = ask(lab, engine, lab.ids(5), max_tokens=4, **GREEDY)
    assert (len(ids_of(events)), text_of(events)) == (4, "")
    with pytest.raises(RequestError, match="tokenizer"):
        engine.add([1], SamplingParams(stop=("x",)))
    assert not engine.has_work

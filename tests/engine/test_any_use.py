"""Requests added, cancelled and stepped in any order, in a pool too small: no block leaks and no answer changes."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule

from kiloq.engine.params import SamplingParams

PROMPTS = {"short": (3, 0), "block": (16, 0), "crosses": (28, 1), "same start": (40, 1), "long": (70, 2)}
ANSWERS = (1, 9, 45)


@pytest.fixture(scope="session")
def solo(lab) -> dict[tuple[str, int, int], tuple[int, ...]]:
    """What each prompt is answered with when it is alone, by seed, as long as it may get."""
    answers = {}
    for name, (length, ids_seed) in PROMPTS.items():
        for seed in range(2):
            engine = lab.engine("v1")
            params = SamplingParams(max_tokens=max(ANSWERS), seed=seed, ignore_eos=True)
            engine.add(lab.ids(length, seed=ids_seed), params, request_id="solo")
            answers[name, seed] = lab.answers(engine)["solo", 0]
    return answers


def test_any_use_leaks_nothing_and_changes_no_answer(lab, solo) -> None:
    class AnyUse(RuleBasedStateMachine):
        def __init__(self) -> None:
            super().__init__()
            # 9 blocks for up to 4 sequences of up to 8 blocks.
            bytes_per_token = lab.model("v1").config.kv_bytes_per_token(4)
            self.engine = lab.engine("v1", max_batch=4, step_tokens=24, kv_memory=9 * 16 * bytes_per_token)
            self.asked: dict[str, tuple[str, SamplingParams]] = {}
            self.got: dict[tuple[str, int], list[int]] = {}
            self.ended: dict[tuple[str, int], str] = {}

        @rule(
            name=st.sampled_from(sorted(PROMPTS)),
            seed=st.integers(0, 1),
            n=st.sampled_from([1, 1, 1, 2]),
            max_tokens=st.sampled_from(ANSWERS),
        )
        def add(self, name: str, seed: int, n: int, max_tokens: int) -> None:
            length, ids_seed = PROMPTS[name]
            params = SamplingParams(max_tokens=max_tokens, seed=0 if n > 1 else seed, n=n, ignore_eos=True)
            self.asked[self.engine.add(lab.ids(length, seed=ids_seed), params)] = name, params

        @precondition(lambda self: self.asked)
        @rule(which=st.integers(0, 30))
        def cancel(self, which: int) -> None:
            self.engine.cancel(sorted(self.asked)[which % len(self.asked)])

        @rule(count=st.integers(1, 12))
        def step(self, count: int) -> None:
            for _ in range(count):
                for event in self.engine.step():
                    key = event.request_id, event.index
                    assert key not in self.ended, "an event after the last one"
                    self.got.setdefault(key, []).extend(event.token_ids)
                    if event.finish_reason:
                        self.ended[key] = event.finish_reason
                self.engine.check_integrity()

        def teardown(self) -> None:
            for _ in range(2000):
                if not self.engine.has_work:
                    break
                self.step(1)
            assert not self.engine.has_work
            stats = self.engine.stats
            assert (stats.running, stats.waiting, stats.blocks_available) == (0, 0, stats.blocks)
            assert len(self.ended) == sum(params.n for _, params in self.asked.values())
            for (request_id, index), reason in self.ended.items():
                name, params = self.asked[request_id]
                ids = tuple(self.got[request_id, index])
                assert ids == solo[name, params.seed + index][: len(ids)]
                assert reason == "cancelled" or len(ids) == params.max_tokens

    AnyUse.TestCase.settings = settings(max_examples=20, stateful_step_count=25, deadline=None)
    AnyUse.TestCase().runTest()

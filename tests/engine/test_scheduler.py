"""Whose turn it is: fairness, budgets and preemption, without a model."""

import pytest

from kiloq.cache import BlockManager
from kiloq.engine.params import SamplingParams
from kiloq.engine.sampler import RowSampler
from kiloq.engine.scheduler import Scheduler, Work
from kiloq.engine.sequence import Request, Sequence
from kiloq.engine.stops import TextStream

SIZE = 16


def make(blocks: int, *, max_batch: int = 8, step_tokens: int = 64, alpha_of=lambda length: 1.0) -> Scheduler:
    return Scheduler(
        BlockManager(blocks), alpha_of, cache_dtype="float32", max_batch=max_batch, step_tokens=step_tokens
    )


def sequence(number: int, length: int) -> Sequence:
    """A sequence of its own request; no two share a prefix."""
    params, ids = SamplingParams(), [1000 * number + i for i in range(length)]
    request = Request(id=str(number), prompt_ids=tuple(ids), params=params, stop_ids=frozenset(), max_length=10**6)
    sampler = RowSampler(params, ids, 10, 0)
    made = Sequence(
        request=request, index=0, order=(number, 0), ids=ids, sampler=sampler, text=TextStream(decoder=None)
    )
    request.sequences.append(made)
    return made


def step(scheduler: Scheduler) -> list[tuple[str, int]]:
    """Run one step as the engine would, each finished prompt drawing a token: who did how many tokens."""
    works: list[Work] = scheduler.schedule()
    scheduler.commit(works)
    for work in works:
        if work.is_last:
            work.sequence.ids.append(7)
    scheduler.check_integrity()
    return [(work.sequence.request.id, work.stop - work.start) for work in works]


def finish(scheduler: Scheduler, one: Sequence) -> None:
    one.is_finished = True
    scheduler.remove(one)


def test_prompts_fill_what_decoding_leaves_of_the_budget() -> None:
    scheduler = make(100, step_tokens=50)
    for number, length in enumerate((20, 70, 30)):
        scheduler.add(sequence(number, length))
    assert step(scheduler) == [("0", 20), ("1", 30)]
    assert step(scheduler) == [("0", 1), ("1", 40), ("2", 9)]
    assert step(scheduler) == [("0", 1), ("1", 1), ("2", 21)]
    assert step(scheduler) == [("0", 1), ("1", 1), ("2", 1)]


def test_no_more_run_at_once_than_allowed_and_the_next_one_follows() -> None:
    scheduler = make(100, max_batch=2)
    sequences = [sequence(number, 5) for number in range(3)]
    for one in sequences:
        scheduler.add(one)
    assert step(scheduler) == [("0", 5), ("1", 5)]
    finish(scheduler, sequences[0])
    assert step(scheduler) == [("1", 1), ("2", 5)]


def test_a_large_request_is_not_overtaken_by_small_ones() -> None:
    scheduler = make(10)
    first, large = sequence(0, 5 * SIZE), sequence(1, 6 * SIZE)
    for one in (first, large, sequence(2, 4)):
        scheduler.add(one)
    assert step(scheduler) == [("0", 64)]
    assert step(scheduler) == [("0", 16)]
    finish(scheduler, first)
    assert step(scheduler) == [("1", 64)]


def test_the_youngest_gives_way_and_comes_back_before_newcomers() -> None:
    scheduler = make(6, step_tokens=200)
    old, young = sequence(0, 3 * SIZE - 2), sequence(1, SIZE)
    scheduler.add(old)
    scheduler.add(young)
    assert step(scheduler) == [("0", 46), ("1", 16)]
    scheduler.add(sequence(2, 5))
    served = [dict(step(scheduler)) for _ in range(3 * SIZE)]
    assert all("0" in works for works in served), "the oldest never waits"
    assert scheduler.num_preempted > 0
    gone = next(i for i, works in enumerate(served) if "1" not in works)
    assert all("2" not in works for works in served[gone:]), "the newcomer overtook the one that gave way"
    finish(scheduler, old)
    assert [number for number, _ in step(scheduler)] == ["1", "2"]


def test_an_outgrown_factor_starts_the_sequence_again_in_place() -> None:
    scheduler = make(20, alpha_of=lambda length: 1.0 if length <= 20 else 3.0)
    scheduler.add(sequence(0, 18))
    assert [step(scheduler) for _ in range(5)] == [[("0", 18)], [("0", 1)], [("0", 1)], [("0", 21)], [("0", 1)]]
    assert scheduler.num_preempted == 0


def test_abandoned_work_is_done_again_from_the_start() -> None:
    scheduler = make(20)
    scheduler.add(sequence(0, 40))
    scheduler.schedule()
    scheduler.abandon()
    scheduler.check_integrity()
    assert step(scheduler) == [("0", 40)], "nothing of it was left in the cache"


def test_a_plan_that_was_interrupted_leaves_nothing_to_share() -> None:
    def alpha_of(length: int) -> float:
        if length == 50:  # asked when the second sequence is admitted: the first one's blocks are published by then
            raise KeyboardInterrupt
        return 1.0

    scheduler = make(20, alpha_of=alpha_of)
    first, second = sequence(0, 40), sequence(1, 50)
    scheduler.add(first)
    scheduler.add(second)
    with pytest.raises(KeyboardInterrupt):
        scheduler.schedule()
    scheduler.abandon()
    scheduler.check_integrity()
    second.is_finished = True
    finish(scheduler, first)
    same = sequence(2, 40)
    same.ids[:] = first.ids
    scheduler.add(same)
    assert step(scheduler) == [("2", 40)], "nothing of it was ever computed"

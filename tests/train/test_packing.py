from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kiloq.errors import DataError
from kiloq.train.packing import Epochs, into_groups, into_rows

SEQ_LEN = 32


@given(st.lists(st.integers(1, SEQ_LEN), min_size=1, max_size=60))
def test_rows_hold_every_item_once_and_no_two_half_empty(lengths: list[int]) -> None:
    rows = into_rows(list(range(len(lengths))), lengths, SEQ_LEN)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    filled = [sum(lengths[i] for i in row) for row in rows]
    assert max(filled) <= SEQ_LEN
    assert sum(2 * places <= SEQ_LEN for places in filled) <= 1


@given(
    st.lists(st.tuples(st.integers(1, SEQ_LEN), st.integers(1, SEQ_LEN)), min_size=1, max_size=40), st.integers(2, 5)
)
def test_both_pieces_of_an_item_lie_whole_in_one_micro_batch(lengths: list[tuple[int, int]], rows: int) -> None:
    groups = into_groups(list(range(len(lengths))), lengths, rows=rows, seq_len=SEQ_LEN)
    places = Counter()
    for group in groups:
        assert len(group) == rows
        assert all(sum(lengths[at][number] for at, number in row) <= SEQ_LEN for row in group)
        here = {piece for row in group for piece in row}
        assert all((at, 1 - number) in here for at, number in here)
        places.update(piece for row in group for piece in row)
    assert places == Counter((at, number) for at in range(len(lengths)) for number in (0, 1))


def test_micro_batches_are_filled() -> None:
    random = np.random.default_rng(0)
    lengths = [tuple(random.integers(40, 400, 2).tolist()) for _ in range(1000)]
    groups = into_groups(list(range(1000)), lengths, rows=8, seq_len=512)
    assert sum(map(sum, lengths)) / (len(groups) * 8 * 512) > 0.93


def test_every_epoch_holds_an_item_as_often_as_it_repeats_in_another_order() -> None:
    epochs = Epochs(np.array([1.0, 2.0, 0.5] * 100), lambda items: [[i] for i in items], seed=1, fingerprint=0)
    first = [epochs.next()[0] for _ in range(len(epochs.plan))]
    times = Counter(first)
    assert [times[0], times[1]] == [1, 2]
    assert 30 < sum(times[i] for i in range(2, 300, 3)) < 70
    epochs.next()
    assert epochs.epoch == 1
    assert [unit[0] for unit in epochs.plan] != first


def test_a_stream_goes_on_from_its_state_and_only_over_the_same_data() -> None:
    def make(fingerprint: int = 7) -> Epochs[int]:
        return Epochs(np.ones(5), lambda items: items, seed=3, fingerprint=fingerprint)

    straight, broken = make(), make()
    for _ in range(8):
        straight.next(), broken.next()
    state, broken = broken.state(), make()
    broken.restore(state)
    assert [broken.next() for _ in range(9)] == [straight.next() for _ in range(9)]
    with pytest.raises(DataError, match="not what this run began with"):
        make(8).restore(state)

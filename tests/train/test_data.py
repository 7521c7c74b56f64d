from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kiloq.errors import DataError
from kiloq.train.data import Batch, PackedBatches, TokenFolder, held_out_batches, write_tokens
from kiloq.train.losses import IGNORE


def folder_of(path: Path, lengths: list[int]) -> TokenFolder:
    """Documents whose ids are all distinct, so that each place of the corpus can be told."""
    ids = np.arange(sum(lengths))
    ends = np.cumsum(lengths)
    write_tokens(path, [ids[end - n : end] for n, end in zip(lengths, ends, strict=True)], len(ids))
    return TokenFolder(path)


def same(a: Batch, b: Batch) -> bool:
    tensors = all(torch.equal(x, y) for x, y in ((a.ids, b.ids), (a.targets, b.targets), (a.positions, b.positions)))
    return tensors and a.pieces == b.pieces


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=12), seed=st.integers(0, 5))
def test_every_token_is_trained_on_the_token_that_follows(tmp_path: Path, lengths: list[int], seed: int) -> None:
    folder = folder_of(tmp_path, lengths)
    last = set((folder.starts[1:] - 1).tolist())
    stream = PackedBatches([(folder, 1.0)], seq_len=8, tokens=16, seed=seed)
    seen: Counter[int] = Counter()
    while stream.epoch < 9:  # a row may wait for 8 pieces of one token, each from another epoch
        batch = stream.next_batch()
        assert len(batch.ids) == 16
        for token, target in zip(batch.ids.tolist(), batch.targets.tolist(), strict=True):
            assert target == (IGNORE if token in last else token + 1)
        for start, stop in pairwise(batch.pieces):
            assert start // 8 == (stop - 1) // 8  # no piece crosses a row
            assert batch.positions[start:stop].tolist() == list(range(stop - start))
            assert batch.ids[start:stop].tolist() == list(range(int(batch.ids[start]), int(batch.ids[stop - 1]) + 1))
        seen.update(batch.ids.tolist())
    assert set(seen) == set(range(sum(lengths)))


def test_an_epoch_holds_each_token_exactly_once(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, [5, 20, 3, 4, 8, 24])
    stream = PackedBatches([(folder, 1.0)], seq_len=8, tokens=64, seed=3)
    assert sorted(stream.next_batch().ids.tolist()) == list(range(64))


def test_the_stream_goes_on_exactly_from_its_state(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, [5, 20, 3, 11, 7, 30])
    straight, broken = (PackedBatches([(folder, 1.5)], seq_len=8, tokens=16, seed=1) for _ in range(2))
    for _ in range(20):
        again = PackedBatches([(folder, 1.5)], seq_len=8, tokens=16, seed=1)
        again.restore(broken.state())
        broken = again
        assert same(straight.next_batch(), broken.next_batch())
    assert broken.epoch >= 2


def test_other_data_than_at_the_start_is_refused(tmp_path: Path) -> None:
    first = PackedBatches([(folder_of(tmp_path / "a", [9, 9]), 1.0)], seq_len=8, tokens=8, seed=0)
    second = PackedBatches([(folder_of(tmp_path / "b", [9, 8]), 1.0)], seq_len=8, tokens=8, seed=0)
    with pytest.raises(DataError, match="not what this run began with"):
        second.restore(first.state())


@pytest.mark.parametrize(("repeat", "tokens"), [(0.0, 0), (0.5, 32), (1.0, 64), (2.25, 144)])
def test_repeats_weigh_the_sources(tmp_path: Path, repeat: float, tokens: int) -> None:
    one, other = folder_of(tmp_path / "a", [8] * 8), folder_of(tmp_path / "b", [16])
    stream = PackedBatches([(one, repeat), (other, 1.0)], seq_len=8, tokens=8, seed=0)
    assert stream.epoch_tokens == tokens + 16


def test_epochs_differ_and_seeds_differ(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, [8] * 16)
    first = PackedBatches([(folder, 1.0)], seq_len=8, tokens=128, seed=0)
    epochs = [first.next_batch().ids.tolist() for _ in range(2)]
    other = PackedBatches([(folder, 1.0)], seq_len=8, tokens=128, seed=1).next_batch().ids.tolist()
    assert epochs[0] != epochs[1]
    assert epochs[0] != other


def test_held_out_batches_are_always_the_same(tmp_path: Path) -> None:
    folders = [folder_of(tmp_path / "a", [30]), folder_of(tmp_path / "b", [40])]
    passes = [list(held_out_batches(folders, seq_len=8, tokens=16, limit=48)) for _ in range(2)]
    assert len(passes[0]) == 3
    assert all(same(a, b) for a, b in zip(*passes, strict=True))


@pytest.mark.parametrize(("vocab_size", "kind"), [(65_536, np.uint16), (65_537, np.uint32)])
def test_ids_are_stored_as_small_as_the_vocabulary_allows(tmp_path: Path, vocab_size: int, kind: type) -> None:
    write_tokens(tmp_path, [[1, 2, vocab_size - 1]], vocab_size)
    assert TokenFolder(tmp_path).tokens.dtype == kind
    assert TokenFolder(tmp_path).tokens.tolist() == [1, 2, vocab_size - 1]


def test_a_folder_without_tokens_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not a folder of tokens"):
        TokenFolder(tmp_path)
    folder_of(tmp_path, [4])
    np.save(tmp_path / "starts.npy", np.array([0, 9]))
    with pytest.raises(DataError, match=r"starts.npy ends at 9, tokens.npy at 4"):
        TokenFolder(tmp_path)

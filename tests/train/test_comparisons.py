import json
from pathlib import Path

import pytest
import torch

from kiloq.chat import QWEN1
from kiloq.errors import ConfigError, DataError
from kiloq.tokenizer import Tokenizer
from kiloq.train.comparisons import Compared, PackedPairs, PairBatch, read_compared, read_labelled
from kiloq.train.losses import IGNORE
from kiloq.train.samples import Samples
from kiloq.train.settings import BatchConfig

BATCH = BatchConfig(seq_len=160, tokens=480)


def write(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


@pytest.fixture
def pairs_file(tmp_path: Path) -> Path:
    rows = [{"prompt": f"{i}?", "chosen": "+" * (i + 1), "rejected": "-" * (9 - i), "margin": i} for i in range(9)]
    return write(tmp_path / "pairs.jsonl", rows)


def trained_text(tokenizer: Tokenizer, batch: PairBatch, piece: int, *, others: bool = False) -> str:
    flat = batch.others if others else batch.flat
    assert flat is not None
    targets = flat.targets[flat.pieces[piece] : flat.pieces[piece + 1]]
    return tokenizer.decode(targets[targets != IGNORE].tolist())


def prompt_text(tokenizer: Tokenizer, batch: PairBatch, piece: int, *, others: bool = False) -> str:
    flat = batch.others if others else batch.flat
    assert flat is not None
    ids = flat.ids[flat.pieces[piece] : flat.pieces[piece + 1]]
    return tokenizer.decode(ids.tolist()).split("user\n")[1].split("<|im_end|>")[0]


def test_every_batch_says_where_both_answers_of_its_pairs_are(tokenizer: Tokenizer, pairs_file: Path) -> None:
    samples = Samples(tokenizer, QWEN1, seq_len=BATCH.seq_len)
    stream = PackedPairs([(read_compared(pairs_file, samples), 1.0)], batch=BATCH, seed=0, filler=0)
    stream.reference[:] = [[i, -i] for i in range(9)]
    seen = []
    for _ in range(len(stream)):
        batch = stream.next_batch()
        assert batch.size == BATCH.tokens
        for row, (chosen, rejected) in enumerate(batch.places.tolist()):
            number = int(batch.margins[row])
            assert prompt_text(tokenizer, batch, chosen) == prompt_text(tokenizer, batch, rejected) == f"{number}?"
            assert trained_text(tokenizer, batch, chosen) == "+" * (number + 1) + "<|im_end|>"
            assert trained_text(tokenizer, batch, rejected) == "-" * (9 - number) + "<|im_end|>"
            assert batch.lengths[row].tolist() == [number + 2, 10 - number]
            assert batch.reference[row].tolist() == [number, -number]
            seen.append(number)
    assert sorted(seen) == list(range(9))
    assert sorted(i for batch in stream.one_pass() for i in batch.items.tolist()) == list(range(9))


def test_labelled_answers_lie_beside_the_same_questions_with_other_answers(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    rows = [{"prompt": f"{i}?", "completion": f"answer {i}", "label": i % 2 == 0} for i in range(6)]
    data = read_labelled(write(tmp_path / "labels.jsonl", rows), Samples(tokenizer, QWEN1, seq_len=160), seed=1)
    stream = PackedPairs([(data, 1.0)], batch=BATCH, seed=0, filler=0, apart=True)
    others = []
    for batch in stream.one_pass():
        for row, (own, other) in enumerate(batch.places.tolist()):
            question = prompt_text(tokenizer, batch, own)
            assert prompt_text(tokenizer, batch, other, others=True) == question
            assert trained_text(tokenizer, batch, own) == f"answer {question[0]}<|im_end|>"
            assert batch.good[row] == (int(question[0]) % 2 == 0)
            others.append((f"answer {question[0]}<|im_end|>", trained_text(tokenizer, batch, other, others=True)))
    assert all(own != other for own, other in others)
    assert sorted(own for own, _ in others) == sorted(other for _, other in others)


def test_pairs_may_be_learned_as_labelled_answers(tokenizer: Tokenizer, pairs_file: Path) -> None:
    data = read_labelled(pairs_file, Samples(tokenizer, QWEN1, seq_len=160), seed=1)
    assert [one.good for one in data] == [True, False] * 9
    alone = write(pairs_file.parent / "one.jsonl", [{"prompt": "?", "completion": "!", "label": True}])
    with pytest.raises(DataError, match="one answer"):
        read_labelled(alone, Samples(tokenizer, QWEN1, seq_len=160), seed=1)


def test_a_stream_goes_on_exactly_and_knows_its_data(tokenizer: Tokenizer, pairs_file: Path) -> None:
    data = read_compared(pairs_file, Samples(tokenizer, QWEN1, seq_len=160))

    def make(some: list[Compared]) -> PackedPairs:
        return PackedPairs([(some, 1.0)], batch=BATCH, seed=3, filler=0)

    straight, broken = make(data), make(data)
    for _ in range(4):
        straight.next_batch(), broken.next_batch()
    state, broken = broken.state(), make(data)
    broken.restore(state)
    for _ in range(8):
        ours, theirs = broken.next_batch(), straight.next_batch()
        assert ours.items.tolist() == theirs.items.tolist()
        assert torch.equal(ours.flat.ids, theirs.flat.ids)
    other_margin = [Compared(data[0].samples, data[0].margin + 1), *data[1:]]
    with pytest.raises(DataError, match="not what this run began with"):
        make(other_margin).restore(state)


def test_a_micro_batch_too_small_for_a_pair_is_refused(tokenizer: Tokenizer, pairs_file: Path) -> None:
    data = read_compared(pairs_file, Samples(tokenizer, QWEN1, seq_len=160))
    with pytest.raises(ConfigError, match=r"Set batch\.tokens to 200 or more"):
        PackedPairs([(data, 1.0)], batch=BatchConfig(seq_len=100, tokens=100), seed=0, filler=0)


def test_a_margin_that_is_no_number_is_told(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = write(tmp_path / "pairs.jsonl", [{"prompt": "?", "chosen": "a", "rejected": "b", "margin": "large"}])
    with pytest.raises(DataError, match="line 1: margin is 'large'; it must be a number"):
        read_compared(path, Samples(tokenizer, QWEN1, seq_len=160))

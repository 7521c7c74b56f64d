from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from kiloq.chat import QWEN1, QWEN2_5, QWEN3, Message, ToolCall
from kiloq.errors import DataError
from kiloq.tokenizer import Tokenizer
from kiloq.train.conversations import Conversation, read_conversations
from kiloq.train.losses import IGNORE
from kiloq.train.preferences import Judged, Pair
from kiloq.train.samples import PackedSamples, Sample, Samples
from kiloq.train.texts import Document

TOOL_CALL = Message(role="assistant", content="", tool_calls=(ToolCall(name="f", arguments="{}"),))

# QWEN1_SPEC B8: the published sample and its label mask (* = label kept).
PUBLISHED = (
    "151644* 8948 198 2610 525 264 10950 17847 13 151645* 198* 151644* 872 198 108386 151645* 198* 151644* 77091 198 "
    "35946* 101909* 102064* 104949* 3837* 35946* 99882* 31935* 64559* 99320* 56007* 1773* 151645* 198*"
)


def talk(*texts: str, system: str | None = None) -> Conversation:
    """Turns of user and assistant in turn."""
    head = () if system is None else (Message(role="system", content=system),)
    turns = [Message(role="user" if i % 2 == 0 else "assistant", content=text) for i, text in enumerate(texts)]
    return Conversation((*head, *turns), (), "chat.json, line 1")


def trained_text(sample: Sample, tokenizer: Tokenizer) -> str:
    return tokenizer.decode([int(i) for i in sample.targets if i != IGNORE])


@pytest.fixture(scope="module")
def qwen_tokenizer(shared_data: Path) -> Tokenizer:
    return Tokenizer.load(shared_data / "tokenizer" / "qwen.tiktoken")


def test_the_mask_of_the_first_qwen_is_reproduced_token_for_token(qwen_tokenizer: Tokenizer) -> None:
    answer = [int(word.rstrip("*")) for word in PUBLISHED.split()][20:-2]
    conversation = talk("你好", qwen_tokenizer.decode(answer))
    rendered = Samples(qwen_tokenizer, QWEN1, seq_len=512, mask="qwen1").render(conversation)
    marked = [f"{i}*" if kept else str(i) for i, kept in zip(rendered.ids, rendered.trained, strict=True)]
    assert " ".join(marked) == PUBLISHED


def test_only_answers_and_their_end_are_trained(tokenizer: Tokenizer) -> None:
    samples = Samples(tokenizer, QWEN1, seq_len=512)
    (sample,) = samples.read([talk("what?", "this", "and?", "that", system="be kind")])
    assert trained_text(sample, tokenizer) == "this<|im_end|>that<|im_end|>"
    for at, target in enumerate(sample.targets):
        assert target in (IGNORE, sample.ids[min(at + 1, len(sample.ids) - 1)])


def test_text_never_becomes_a_control_token(tokenizer: Tokenizer) -> None:
    (sample,) = Samples(tokenizer, QWEN2_5, seq_len=512).read([talk("a<|im_end|>\n<|im_start|>assistant\nb", "c")])
    assert (sample.ids == tokenizer.im_start_id).sum() == 3  # system, user, assistant
    assert trained_text(sample, tokenizer) == "c<|im_end|>"


def test_a_last_turn_that_nobody_answers_is_left_out(tokenizer: Tokenizer) -> None:
    samples = Samples(tokenizer, QWEN1, seq_len=512)
    (with_question,), (without,) = samples.read([talk("q", "a", "q2")]), samples.read([talk("q", "a")])
    assert with_question.ids.tolist() == without.ids.tolist()


def test_a_long_conversation_is_cut_after_the_last_answer_that_fits(tokenizer: Tokenizer) -> None:
    samples = Samples(tokenizer, QWEN1, seq_len=120)
    long = talk("q1", "a1", "q2", "a2", "q3" * 40, "a3")
    (sample,) = samples.read([long])
    assert trained_text(sample, tokenizer) == "a1<|im_end|>a2<|im_end|>"
    assert (samples.tally.kept, samples.tally.cut, samples.tally.dropped) == (1, 1, 0)


def test_what_does_not_fit_at_all_is_dropped_and_counted(tokenizer: Tokenizer) -> None:
    samples = Samples(tokenizer, QWEN1, seq_len=120)
    assert len(samples.read([talk("q" * 200, "a"), talk("q", "a")])) == 1
    assert (samples.tally.kept, samples.tally.dropped) == (1, 1)
    dropping = Samples(tokenizer, QWEN1, seq_len=120, long="drop")
    assert len(dropping.read([talk("q", "a", "q" * 200, "a"), talk("q", "a")])) == 1
    assert dropping.tally.dropped == 1


def test_long_conversations_are_refused_where_asked(tokenizer: Tokenizer) -> None:
    with pytest.raises(
        DataError, match=r"chat\.json, line 1: the conversation has \d+ tokens, but batch\.seq_len is 40"
    ):
        Samples(tokenizer, QWEN1, seq_len=40, long="error").read([talk("q" * 100, "a")])


def test_data_of_which_nothing_would_be_trained_is_an_error(tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match=r"no token would be trained: 0 samples \(0 cut, 2 more dropped as too long\)"):
        Samples(tokenizer, QWEN1, seq_len=40).read([talk("q" * 100, "a")] * 2)


def test_an_answer_of_weight_0_is_shown_and_not_trained(tokenizer: Tokenizer) -> None:
    for fmt in (QWEN1, QWEN2_5, QWEN3):
        whole = talk("q", "a", "q2", "a2")
        first = replace(whole.messages[1], trained=False)
        weighed = replace(whole, messages=(whole.messages[0], first, *whole.messages[2:]))
        samples = Samples(tokenizer, fmt, seq_len=512)
        (expected,), (sample,) = samples.read([whole]), samples.read([weighed])
        assert sample.ids.tolist() == expected.ids.tolist()
        assert trained_text(sample, tokenizer) == "a2<|im_end|>"
        nothing = replace(whole, messages=(whole.messages[0], first))
        with pytest.raises(DataError, match="no token of it is trained"):
            samples.read([nothing])


def test_a_conversation_that_ends_with_a_result_is_cut_after_the_call(tokenizer: Tokenizer) -> None:
    result = Message(role="tool", content="secret")
    for fmt in (QWEN1, QWEN2_5):
        (sample,) = Samples(tokenizer, fmt, seq_len=512).read(
            [Conversation((Message(role="user", content="q"), TOOL_CALL, result), (), "here")]
        )
        assert "secret" not in tokenizer.decode(sample.ids.tolist())
        assert trained_text(sample, tokenizer).endswith("<|im_end|>")


def test_all_faults_of_the_data_come_in_one_error(tokenizer: Tokenizer) -> None:
    bad = Conversation((Message(role="user", content="q"), Message(role="user", content="q"), TOOL_CALL), (), "line 7")
    with pytest.raises(DataError, match=r"2 bad rows:\nline 7: messages: with tools(.|\n)*line 7: messages"):
        Samples(tokenizer, QWEN1, seq_len=512).read([bad, talk("q", "a"), bad])


def a_pair(*texts: str) -> Pair:
    """Prompt turns, then the chosen and the rejected answer."""
    asked = tuple(replace(message, trained=False) for message in talk(*texts[:-2], "").messages[:-1])
    chosen, rejected = (
        Conversation((*asked, Message(role="assistant", content=text)), (), "pairs.json, line 1") for text in texts[-2:]
    )
    return Pair(chosen, rejected)


def test_pairs_train_the_two_answers_alone_and_lose_the_oldest_rounds_first(tokenizer: Tokenizer) -> None:
    pair = a_pair("old " * 20, "answer", "new", "good", "bad")
    ((chosen, rejected),) = Samples(tokenizer, QWEN2_5, seq_len=512).pair(pair)
    assert (trained_text(chosen, tokenizer), trained_text(rejected, tokenizer)) == ("good<|im_end|>", "bad<|im_end|>")
    first = np.flatnonzero(chosen.targets != IGNORE)[0]
    assert chosen.ids[: first + 1].tolist() == rejected.ids[: first + 1].tolist()
    short = Samples(tokenizer, QWEN2_5, seq_len=len(chosen.ids) - 1)
    ((chosen, rejected),) = short.pair(pair)
    for sample, answer in ((chosen, "good"), (rejected, "bad")):
        text = tokenizer.decode(sample.ids.tolist())
        assert "old" not in text
        assert text.endswith(f"user\nnew<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>\n")
    assert (short.tally.kept, short.tally.cut) == (1, 1)
    none = Samples(tokenizer, QWEN2_5, seq_len=40)
    with pytest.raises(DataError, match="no token would be trained"):
        none.read_rows([pair], none.pair)


def test_judged_answers_keep_their_label(tokenizer: Tokenizer) -> None:
    pair = a_pair("q", "good", "bad")
    samples = Samples(tokenizer, QWEN2_5, seq_len=512)
    answers = [Judged(pair.chosen, good=True), Judged(pair.rejected, good=False)]
    rows = samples.read_rows(answers, samples.judged)
    assert [(trained_text(sample, tokenizer), good) for sample, good in rows] == [
        ("good<|im_end|>", True),
        ("bad<|im_end|>", False),
    ]


def test_texts_become_samples_of_which_every_next_token_is_trained(tokenizer: Tokenizer) -> None:
    samples = Samples(tokenizer, QWEN1, seq_len=4)
    parts = samples.document(Document("abcdefg", "here"))
    ids = [*tokenizer.encode("abcdefg"), tokenizer.end_of_text_id]
    assert [part.ids.tolist() for part in parts] == [ids[:4], ids[4:]]
    assert [part.targets.tolist() for part in parts] == [ids[1:5], [*ids[5:], IGNORE]]


def numbered(lengths: list[int]) -> list[Sample]:
    """Samples whose ids tell which sample they are."""
    return [Sample(np.full(n, i), np.append(np.full(n - 1, i), IGNORE)) for i, n in enumerate(lengths)]


def test_rows_hold_whole_samples_each_its_own_piece() -> None:
    lengths = np.random.default_rng(0).integers(2, 9, 200).tolist()
    stream = PackedSamples([(numbered(lengths), 1.0)], seq_len=16, tokens=16, seed=0, filler=999)
    assert stream.filled > 0.98
    seen = []
    for _ in range(len(stream)):
        batch = stream.next_batch()
        assert len(batch.ids) == 16
        for start, stop in pairwise(batch.pieces):
            piece = batch.ids[start:stop]
            assert len(set(piece.tolist())) == 1
            assert batch.positions[start:stop].tolist() == list(range(stop - start))
            if piece[0] == 999:
                assert (batch.targets[start:stop] == IGNORE).all()
            else:
                assert stop - start == lengths[int(piece[0])]
                seen.append(int(piece[0]))
    assert sorted(seen) == list(range(200))


def test_an_evaluation_sees_every_row_once_or_as_many_as_the_limit_holds() -> None:
    stream = PackedSamples([(numbered([6, 7, 8]), 1.0)], seq_len=8, tokens=16, seed=0, filler=999)
    for _ in range(2):
        batches = list(stream.one_pass(limit=1000))
        assert [len(batch.ids) for batch in batches] == [16, 16]
        assert (
            sorted(one for batch in batches for one in batch.ids.tolist() if one < 999) == [0] * 6 + [1] * 7 + [2] * 8
        )
        stream.next_batch()  # wherever training stands
    assert sum(batch.count > 0 for batch in stream.one_pass(limit=8)) == 1
    assert sum(batch.count for batch in stream.one_pass(limit=8)) < 8


def test_what_is_left_of_a_long_row_are_short_pieces() -> None:
    batch = PackedSamples([(numbered([5]), 1.0)], seq_len=1024, tokens=1024, seed=0, filler=999).next_batch()
    assert batch.pieces == [0, 5, 261, 517, 773, 1024]
    assert (batch.targets[5:] == IGNORE).all()


def test_sources_are_weighed_by_their_repeats() -> None:
    stream = PackedSamples(
        [(numbered([8] * 10), 2.0), (numbered([8] * 400), 0.25)], seq_len=8, tokens=8, seed=0, filler=0
    )
    plan = [i for row in stream.epochs.plan for i in row]
    assert all(plan.count(i) == 2 for i in range(10))
    assert 70 < sum(i >= 10 for i in plan) < 130
    first = {i for i in plan if i >= 10}
    for _ in range(len(stream) + 1):
        stream.next_batch()
    assert {i for row in stream.epochs.plan for i in row if i >= 10} != first


def test_the_stream_goes_on_exactly_from_its_state() -> None:
    def make() -> PackedSamples:
        return PackedSamples([(numbered([3, 5, 7, 2, 9]), 1.5)], seq_len=10, tokens=20, seed=1, filler=0)

    straight, broken = make(), make()
    for _ in range(12):
        again = make()
        again.restore(broken.state())
        broken = again
        assert torch.equal(straight.next_batch().ids, broken.next_batch().ids)
    assert broken.epochs.epoch >= 2


def test_other_samples_than_at_the_start_are_refused() -> None:
    first, second = (
        PackedSamples([(numbered(n), 1.0)], seq_len=8, tokens=8, seed=0, filler=0) for n in ([3, 5], [3, 6])
    )
    with pytest.raises(DataError, match="not what this run began with"):
        second.restore(first.state())


def test_real_tool_conversations_train_only_what_the_assistant_wrote(
    shared_data: Path, qwen_tokenizer: Tokenizer
) -> None:
    rows, _ = read_conversations(shared_data / "sft" / "glaive_toolcall_en_demo.json.gz")
    samples = Samples(qwen_tokenizer, QWEN2_5, seq_len=4096)
    for conversation, sample in zip(rows[:20], samples.read(rows[:20]), strict=True):
        text = trained_text(sample, qwen_tokenizer)
        answers = [m for m in conversation.messages if m.role == "assistant"]
        assert text.count("<|im_end|>") == len(answers)
        assert all(answer.content.strip() in text for answer in answers)

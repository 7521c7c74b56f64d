"""The skill test: its questions are held out, its own answers pass it and those of other questions do not."""

import json

import pytest
from make_chat import samples
from make_pairs import pair, prompts
from make_skills import as_table, mean_of_skills
from minigen.exchange import Sample
from minigen.react import rendered
from minigen.skills import SKILLS, skill_test
from minigen.templates import LANGUAGES
from scoring import is_right

from kiloq.train.preferences import pair as read_pair


def asked(skill: str, count: int = 6) -> list[Sample]:
    return [sample for lang in LANGUAGES for sample in skill_test(lang, skill, seed=1, count=count)]


def true_answer(sample: Sample) -> str:
    """The last turn as the model would write it; in the ReAct form without what came before the last result."""
    text = rendered(sample)[-1][1]
    return text.split("\nObservation:")[-1] if sample.topic == "react/answered" else text


@pytest.mark.parametrize("skill", SKILLS)
def test_the_true_answer_is_right_and_that_to_another_question_is_mostly_not(skill: str) -> None:
    found = asked(skill)
    assert len(found) >= 9
    assert all(sample.heldout and is_right(sample.expect, true_answer(sample)) for sample in found)
    moved = [true_answer(sample) for sample in found[1:] + found[:1]]
    wrong = sum(not is_right(sample.expect, answer) for sample, answer in zip(found, moved, strict=True))
    # Few answers are possible to some questions: one of two groups, one refusal of four.
    assert wrong >= (2 if skill in ("sentiment", "refusing", "groups") else len(found) // 2)


@pytest.mark.parametrize(
    ("expect", "answer", "right"),
    [
        ("73", "27 + 46 = 73", True),
        ("73", "27 + 46 = 173", False),
        ("3", "1 fig, 2 pear, 3 plum\n4", False),  # the working is not the answer
        ("bus", "cat: animals, bus: vehicles\nbus. The others are animals.", True),
        ("a\tb", "It is b.", True),
        ("x\ny", "first\nx\ny", True),
        ('get_time {"city": "Rome"}', 'Thought: so\nAction: get_time\nAction Input: {"city": "Rome"}\n', True),
        ('get_time {"city": "Rome"}', 'Thought: so\nAction: get_time\nAction Input: {"city": "Oslo"}', False),
        ('get_time {"city": "Rome"}', "Action: get_time\nAction Input: {broken", False),
        (
            '{"name": "f", "arguments": {"a": "1"}}',
            '<tool_call>\n{"name":"f","arguments":{"a":"1"}}\n</tool_call>',
            True,
        ),
        ('{"name": "f", "arguments": {"a": "1"}}', 'f {"a": "1"}', False),
        ('{"name": "Tom", "age": 3}', '{"name": "Tom", "age": 3}', True),
    ],
)
def test_an_answer_is_judged_by_its_last_line_and_a_call_by_its_arguments(
    expect: str, answer: str, right: bool
) -> None:
    assert is_right(expect, answer) == right


def test_questions_of_the_test_are_not_among_the_conversations_that_train() -> None:
    trained = {json.dumps(sample.messages[:-1], ensure_ascii=False) for sample in samples(3000, seed=0, heldout=False)}
    tested = [
        sample for skill in ("arithmetic", "sorting", "units", "call (ReAct)", "refusing") for sample in asked(skill)
    ]
    assert not [one for one in tested if json.dumps(one.messages[:-1], ensure_ascii=False) in trained]


def test_a_skill_test_repeats_for_its_seed() -> None:
    assert skill_test("en", "copying", seed=4, count=5) == skill_test("en", "copying", seed=4, count=5)
    assert skill_test("en", "copying", seed=4, count=5) != skill_test("en", "copying", seed=5, count=5)


def test_pairs_are_rows_that_dpo_reads_and_never_held_out() -> None:
    found = prompts(30, seed=0)
    assert not any(sample.heldout for sample in found)
    for sample in found:
        row = pair(sample, "something else")
        assert row is not None
        read = read_pair(row, "row 1")
        assert read.rejected.messages[-1].content == "something else"
        assert read.chosen.messages[-1].content == sample.messages[-1]["content"]
    call = next(sample for sample in prompts(300, seed=0) if sample.topic == "react/call")
    row = pair(call, 'Thought: so.\nAction: nothing\nAction Input: {"a": "b"}\n')
    assert row is not None
    assert [one.name for one in read_pair(row, "row 1").rejected.messages[-1].tool_calls] == ["nothing"]
    assert pair(call, " ") is None


def test_every_skill_counts_alike_in_the_mean() -> None:
    scores = {"a": {"x": {"en": [1, 1], "zh": [0, 3], "ko": [0, 0]}, "y": {"en": [1, 2], "zh": [0, 0], "ko": [0, 0]}}}
    assert mean_of_skills(scores["a"]) == pytest.approx((1 / 4 + 1 / 2) / 2)
    assert "| x | 1/3/0 | 100% | 0% | 0% | 25% |" in as_table(scores)

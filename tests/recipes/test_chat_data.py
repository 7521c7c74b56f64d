"""The chat generator: what it says is true, and it says the same for the same seed."""

import json
import random
import re
from collections import Counter

import pytest
from make_chat import samples
from minigen import memory, numbers, strings, words
from minigen.dialogue import conversation
from minigen.exchange import Sample, draw
from minigen.react import react, rendered
from minigen.templates import LANGUAGES, rows

SIGNS = {"+": int.__add__, "-": int.__sub__, "×": int.__mul__, "*": int.__mul__, "÷": int.__floordiv__}


@pytest.fixture(scope="module")
def many() -> list[Sample]:
    """A few thousand conversations of the training side."""
    return list(samples(3000, seed=5, heldout=False))


@pytest.fixture(scope="module")
def heldout() -> list[Sample]:
    """Conversations of the held-out test."""
    return list(samples(300, seed=6, heldout=True))


def texts(sample: Sample) -> list[str]:
    return [str(message["content"]) for message in sample.messages]


def test_equal_seeds_give_equal_conversations() -> None:
    first, second, other = (list(samples(60, seed=s, heldout=False)) for s in (1, 1, 2))
    assert first == second != other


def value_of(expression: str) -> int:
    """A calculation of one or more steps, from left to right."""
    first, *rest = expression.split()
    value = int(first)
    for sign, number in zip(rest[::2], rest[1::2], strict=True):
        value = SIGNS[sign](value, int(number))
    return value


def test_every_equation_in_an_answer_is_true(many: list[Sample]) -> None:
    chain = re.compile(r"\d+(?: [+\-×÷*] \d+)*(?: = -?\d+(?: [+\-×÷*] \d+)*)+")
    found = [
        match
        for sample in many
        for message in sample.messages
        if message["role"] == "assistant"
        for match in chain.findall(str(message["content"]))
    ]
    assert len(found) > 400
    assert not [match for match in found if len({value_of(part) for part in match.split(" = ")}) > 1]


def test_a_calculation_answers_its_own_question() -> None:
    rng = random.Random(3)
    for lang in LANGUAGES * 50:
        exchange = numbers.arithmetic(rng, lang)
        operation, a, b = exchange.key.split(":")
        assert exchange.value == str(numbers.compute(operation, int(a), int(b)))
        assert exchange.expect in exchange.answer


def test_no_text_holds_a_control_token_or_an_unfilled_slot(many: list[Sample]) -> None:
    for sample in many:
        for text in texts(sample):
            assert "<|" not in text, text
            assert not re.search(r"\{\w*(:[^}\"]*)?\}|\[[^\]]*\|", text), text
            assert text == text.strip(" "), repr(text)
            assert text, sample


def test_roles_alternate_and_an_answer_comes_last(many: list[Sample]) -> None:
    for sample in many:
        roles = [str(m["role"]) for m in sample.messages]
        spoken = [r for r in roles if r != "system"]
        assert roles[-1] == "assistant"
        assert re.fullmatch("(user (assistant tool )*assistant ?)+", " ".join(spoken)), roles


def test_expected_answers_are_in_the_answers(heldout: list[Sample]) -> None:
    for sample in heldout:
        assert sample.expect.lower() in texts(sample)[-1].lower(), sample


def test_heldout_combinations_are_never_trained_on(many: list[Sample], heldout: list[Sample]) -> None:
    questions = {(s.lang, texts(s)[-2]) for s in many if len(s.messages) == 2}
    single = [s for s in heldout if len(s.messages) == 2 and s.topic == "arithmetic"]
    assert single
    assert not [s for s in single if (s.lang, texts(s)[-2]) in questions]
    rng = random.Random(0)
    assert not any(draw(rng, "en", numbers.arithmetic, heldout=False).heldout for _ in range(300))


def test_languages_are_even_and_a_third_has_several_turns(many: list[Sample]) -> None:
    counts = Counter(s.lang for s in many)
    assert set(counts.values()) == {1000}
    several = sum(sum(m["role"] == "user" for m in s.messages) > 1 for s in many) / len(many)
    assert 0.3 < several < 0.45


def test_a_told_fact_is_recalled() -> None:
    rng = random.Random(1)
    for lang in LANGUAGES:
        for fact in memory.FACTS:
            value = memory.fact_value(rng, lang, fact)
            assert value in memory.tell(rng, lang, fact, value).user
            assert value.lower() in memory.recall(rng, lang, fact, value).answer.lower()


def test_calculating_on_uses_the_result_before() -> None:
    rng = random.Random(2)
    for lang in LANGUAGES * 30:
        value = rng.randint(0, 100)
        step = memory.next_step(rng, lang, value)
        assert re.search(rf"^{value} [+\-×] \d+ = (\d+ [+-] \d+ = )?{step.value}(?!\d)", step.answer), step


def test_translations_agree_with_the_table() -> None:
    rng = random.Random(4)
    table = {row[1:] for row in rows("words")} | set(rows("phrases"))
    for lang in LANGUAGES * 30:
        exchange = words.translation(rng, lang)
        assert tuple(exchange.value.split("\t")) in table
        assert exchange.expect in exchange.answer


def test_lists_are_sorted() -> None:
    rng = random.Random(4)
    for lang in LANGUAGES * 20:
        ordered = [int(n) for n in strings.sorting(rng, lang).answer.split(", ")]
        assert ordered in (sorted(ordered), sorted(ordered, reverse=True))


@pytest.mark.parametrize("lang", LANGUAGES)
def test_tool_calls_name_a_given_tool_and_parse_as_json(lang: str) -> None:
    rng = random.Random(7)
    seen = Counter[str]()
    for _ in range(120):
        sample = react(rng, lang)
        (role, question), (answerer, answer) = rendered(sample)
        assert (role, answerer) == ("user", "assistant")
        names = re.search(r"should be one of \[(.*)\]", question)
        assert names
        call = re.search(r"\nAction: (\w+)\nAction Input: (\{.*\})", answer)
        if call is None:
            assert answer.startswith("Thought: I now know the final answer.\nFinal Answer: ")
            continue
        seen[call.group(1)] += 1
        assert call.group(1) in names.group(1).split(", ")
        arguments = json.loads(call.group(2))
        assert all(isinstance(value, str) and value for value in arguments.values())
    assert len(seen) == 7


def test_heldout_conversations_can_be_made_in_each_language() -> None:
    for lang in LANGUAGES:
        sample = conversation(random.Random(0), lang, heldout=True)
        assert sample.heldout
        assert sample.expect

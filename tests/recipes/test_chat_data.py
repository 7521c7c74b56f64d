"""The chat generator: what it says is true, and it says the same for the same seed."""

import json
import random
import re
from collections import Counter

import pytest
from make_chat import samples
from minigen import invent, memory, numbers, practice, refer, strings, words
from minigen.dialogue import conversation
from minigen.exchange import Sample, draw
from minigen.react import CALLS, react, rendered, tool_call
from minigen.templates import LANGUAGES, phrases, rows

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


def last_answer(sample: Sample) -> str:
    """What the model has to say at the end, a call in one line after its thought."""
    calls = [call["function"] for call in sample.messages[-1].get("tool_calls", ())]
    return "\n".join([texts(sample)[-1], *(f"{call['name']} {call['arguments']}" for call in calls)])


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


def test_every_comparison_in_an_answer_is_true(many: list[Sample]) -> None:
    found = [
        match
        for sample in many
        for message in sample.messages
        if message["role"] == "assistant"
        for match in re.findall(r"(\d+) ([<>]) (\d+)", str(message["content"]))
    ]
    assert len(found) > 60
    assert all((int(a) < int(b)) == (sign == "<") and a != b for a, sign, b in found)


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
        assert any(one.lower() in last_answer(sample).lower() for one in sample.expect.split("\t")), sample


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


def test_lists_are_sorted_one_number_after_the_other() -> None:
    rng = random.Random(4)
    for lang in LANGUAGES * 20:
        exchange = strings.sorting(rng, lang)
        given = [int(n) for n in exchange.key.split(", ")]
        lines = [[int(n) for n in line.split(", ")] for line in exchange.answer.split("\n")]
        assert [sorted(line) for line in lines] == [sorted(given[:count]) for count in range(1, len(given) + 1)]
        assert all(line in (sorted(line), sorted(line, reverse=True)) for line in lines)


@pytest.mark.parametrize("lang", LANGUAGES)
def test_practice_agrees_with_the_tables_and_is_never_asked_in_tests(lang: str) -> None:
    rng = random.Random(5)
    same = {row[1:] for row in rows("words")}
    near = {pair for row in rows("opposites") for pair in (row[0:2], row[2:4], row[4:6])}
    for _ in range(60):
        for one in (practice.translating, practice.opposites, practice.grouping, practice.spelling):
            exchange = one(rng, lang)
            pairs = [tuple(line.split(": ")) for line in exchange.answer.split("\n")]
            assert all(len(pair) == 2 and pair[0] in exchange.user for pair in pairs)
            assert not exchange.heldout
            if one is practice.translating:
                assert all(any(set(pair) <= set(row) for row in same) for pair in pairs)
            if one is practice.opposites:
                assert all(pair in near or pair[::-1] in near for pair in pairs)
            if one is practice.spelling:
                assert all("".join(pair[1].split("-")) == pair[0].upper() for pair in pairs)
        copied = practice.dictation(rng, lang)
        assert copied.answer in copied.user


@pytest.mark.parametrize("lang", LANGUAGES)
def test_tool_calls_name_a_given_tool_and_parse_as_json(lang: str) -> None:
    rng = random.Random(7)
    seen = Counter[str]()
    for _ in range(160):
        sample = react(rng, lang)
        turns = rendered(sample)
        names = re.search(r"should be one of \[(.*)\]", turns[-2][1])
        assert names, turns
        answers = [text for role, text in turns if role == "assistant"]
        found = [match for text in answers for match in re.findall(r"\nAction: (\w+)\nAction Input: (\{.*\})", text)]
        assert bool(found) == (sample.topic != "react/direct")
        if not found:
            assert answers[0].startswith("Thought: I now know the final answer.\nFinal Answer: ")
        for name, arguments in found:
            seen[name] += 1
            assert name in names.group(1).split(", ")
            assert all(isinstance(value, str) and value for value in json.loads(arguments).values())
    assert len(seen) == 7


@pytest.mark.parametrize("lang", LANGUAGES)
def test_calls_in_tags_name_a_declared_tool_and_its_parameters(lang: str) -> None:
    rng = random.Random(8)
    called = 0
    for _ in range(80):
        sample = tool_call(rng, lang)
        system = texts(sample)[0]
        declared = [json.loads(line)["function"] for line in re.findall(r"^\{\"type\".*$", system, re.MULTILINE)]
        parameters = {one["name"]: one["parameters"]["required"] for one in declared}
        for text in texts(sample)[1:]:
            for body in re.findall(r"<tool_call>\n(.*)\n</tool_call>", text):
                call = json.loads(body)
                assert list(call["arguments"]) == parameters[call["name"]]
                called += 1
    assert called > 50


@pytest.mark.parametrize("lang", LANGUAGES)
def test_a_result_of_a_tool_is_what_the_final_answer_says(lang: str) -> None:
    rng = random.Random(9)
    for name in ("calculator", "get_time", "translate", "search"):
        for _ in range(20):
            question, arguments, observation, final = CALLS[name](rng, lang)
            assert observation in final
            assert question
            if name == "calculator":
                assert value_of(str(arguments["expression"])) == int(observation)


@pytest.mark.parametrize("lang", LANGUAGES)
def test_questions_that_lean_on_earlier_ones_have_their_answer_there(lang: str) -> None:
    rng = random.Random(10)
    for scene in (refer.about_people, refer.listing_on):
        for _ in range(60):
            turns = scene(rng, lang, False)
            for number, turn in enumerate(turns):
                said = "\n".join(t.user for t in turns[: number + 1])
                assert turn.expect.isdigit() or turn.expect in said, turns


@pytest.mark.parametrize("lang", LANGUAGES)
def test_names_are_mostly_ones_that_no_list_holds(lang: str) -> None:
    rng = random.Random(11)
    names = [invent.person(rng, lang) for _ in range(2000)]
    listed = {*phrases(f"ask_{lang}")["names"], *invent.NAMES[lang]["first"]}
    assert len(set(names)) > 900
    assert len(listed & set(names)) > 20


def test_heldout_conversations_can_be_made_in_each_language() -> None:
    for lang in LANGUAGES:
        sample = conversation(random.Random(0), lang, heldout=True)
        assert sample.heldout
        assert sample.expect

"""Templates: choices, slots and Korean particles."""

import random

import pytest
from minigen.templates import LANGUAGES, fill, particle, phrases, pick, rows

PARTICLES = [
    ("책", "을/를", "을"),
    ("사과", "을/를", "를"),
    ("서울", "으로/로", "로"),
    ("부산", "으로/로", "으로"),
    ("학교", "으로/로", "로"),
    ("바람", "과/와", "과"),
    ("나무", "이/가", "가"),
    ("10", "은/는", "은"),
    ("2", "은/는", "는"),
    ("7", "으로/로", "로"),
    ("3", "으로/로", "으로"),
    ("'물'", "이/가", "이"),
    ("cup", "을/를", "을"),
    ("milk", "을/를", "를"),
]


@pytest.mark.parametrize(("word", "forms", "expected"), PARTICLES)
def test_particle_fits_the_last_sound(word: str, forms: str, expected: str) -> None:
    assert particle(word, forms) == expected


def test_particle_may_follow_plain_text_or_a_slot_in_quotes() -> None:
    assert fill("국{:이/가} {x:이에요/예요} '{x}'{:을/를}", {"x": "물"}) == "국이 물이에요 '물'을"


def test_article_fits_the_word() -> None:
    assert fill("{x:a} or {y:a}", {"x": "apple", "y": "dog"}) == "an apple or a dog"


def test_choices_nest_and_every_one_comes_up() -> None:
    rng = random.Random(0)
    assert {pick(rng, "[a|b[1|2]]") for _ in range(60)} == {"a", "b1", "b2"}


@pytest.mark.parametrize("kind", ["ask", "memory", "lists", "unknown", "persona", "tools", "story_talk", "stories"])
def test_the_three_languages_have_the_same_entries(kind: str) -> None:
    keys = [set(phrases(f"{kind}_{lang}")) for lang in LANGUAGES]
    assert keys[0] == keys[1] == keys[2]


def test_talk_has_the_same_sections_each_with_questions_and_answers() -> None:
    sections = [phrases(f"talk_{lang}") for lang in LANGUAGES]
    assert set(sections[0]) == set(sections[1]) == set(sections[2])
    assert all(set(part) == {"ask", "answer"} for talk in sections for part in talk.values())


@pytest.mark.parametrize(
    ("table", "columns"),
    [("words", 4), ("capitals", 6), ("opposites", 6), ("phrases", 3), ("facts", 6), ("groups", 5), ("poems", 4)],
)
def test_tables_are_complete(table: str, columns: int) -> None:
    assert all(len(row) == columns and all(cell.strip() for cell in row) for row in rows(table))


def test_quatrains_have_four_lines_of_five_or_seven_characters() -> None:
    for title, _, first, second in rows("poems"):
        lines = (first + second).replace("。", "，").rstrip("，").split("，")
        assert len(lines) == 4, title
        assert {len(line) for line in lines} in ({5}, {7}), title

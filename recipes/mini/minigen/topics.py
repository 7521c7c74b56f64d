"""Single questions: all topics with their shares, small talk, and what the model admits not to know."""

import random

from minigen import invent, numbers, practice, reading, strings, words
from minigen.exchange import Exchange, Topic
from minigen.rough import roughen
from minigen.templates import phrases, pick, talk_section

# Shares of single-turn topics, by difficulty: arithmetic and translation have the largest worlds, and where an earlier
# model fell back or failed (opposites, copying, letters, poems), there is more. `practice` is never asked in tests.
SINGLE: tuple[tuple[int, Topic], ...] = (
    (20, numbers.arithmetic),
    (3, numbers.spoken),
    (9, numbers.beyond),
    (3, numbers.word_problem),
    (9, numbers.counting),
    (7, numbers.comparing),
    (5, numbers.units),
    (5, numbers.calendar),
    (7, words.capitals),
    (14, words.opposites),
    (30, words.translation),
    (11, words.grouping),
    (16, words.letters),
    (6, reading.extraction),
    (7, reading.sentiment),
    (7, reading.comprehension),
    (9, reading.poem),
    (3, reading.continue_story),
    (3, reading.tell_story),
    (10, strings.fact),
    (10, strings.sorting),
    (2, strings.adding_up),
    (15, strings.copying),
    (6, strings.listing),
    (2, strings.english_forms),
    (5, strings.details),
    (12, practice.translating),
    (5, practice.opposites),
    (6, practice.grouping),
    (8, practice.spelling),
    (8, practice.dictation),
)
# How often small-talk sections come up; 1 where nothing is said. "unknown" is a file of its own.
TALK_WEIGHT = {
    "unknown": 22, "who": 6, "name": 5, "greeting": 6, "ability": 4, "joke": 4, "maker": 3, "not_qwen": 3, "thanks": 4,
    "limits": 3, "how_are_you": 4, "bye": 3, "languages": 2, "human": 2, "feel_bad": 2, "riddle": 2, "proverb": 2,
}  # fmt: skip


def talk(rng: random.Random, lang: str, section: str = "") -> Exchange:
    """Small talk, identity, or the honest answer to what lies outside the model's world."""
    sections = [*phrases(f"talk_{lang}"), "unknown"]
    name = section or rng.choices(sections, [TALK_WEIGHT.get(s, 1) for s in sections])[0]
    if name == "unknown":
        return unknown(rng, lang)
    ask, answer = talk_section(lang, name)
    return Exchange(topic=name, user=pick(rng, ask), answer=pick(rng, answer))


def unknown(rng: random.Random, lang: str) -> Exchange:
    """A question about the wide world, which the model admits not to know."""
    text = phrases(f"unknown_{lang}")
    slots = {name: rng.choice(values) for name, values in text.items() if name not in ("ask", "answer")}
    if rng.random() < 0.25:  # nobody can know them, and neither a list of names nor their sound gives them away
        slots |= {"person": invent.person(rng, lang), "place": invent.place(rng, lang)}
    user = pick(rng, text["ask"], **slots)
    if rng.random() < 0.12:
        user = pick(rng, phrases(f"ask_{lang}")["capital"], country=invent.place(rng, lang))
    return Exchange(topic="unknown", user=user, answer=pick(rng, text["answer"]), expect="\t".join(text["answer"]))


def any_topic(rng: random.Random, lang: str) -> Exchange:
    """A single exchange from the whole world of the model."""
    if rng.random() < 0.17:
        return roughen(rng, lang, talk(rng, lang))
    return roughen(rng, lang, rng.choices([t for _, t in SINGLE], [w for w, _ in SINGLE])[0](rng, lang))

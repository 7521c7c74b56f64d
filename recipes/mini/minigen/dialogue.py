"""Whole conversations: which topics meet, in what order, under which system prompt."""

import random
from collections.abc import Callable
from dataclasses import replace

from minigen import memory, numbers, reading, strings, words
from minigen.exchange import Exchange, Message, Sample, Topic, draw
from minigen.personas import persona
from minigen.react import react
from minigen.rough import roughen
from minigen.templates import LANGUAGES, phrases, pick, talk_section

# Shares of single-turn topics. Arithmetic and translation have the largest worlds, so they need the most samples.
SINGLE: tuple[tuple[int, Topic], ...] = (
    (16, numbers.arithmetic),
    (3, numbers.word_problem),
    (5, numbers.counting),
    (4, numbers.comparing),
    (4, numbers.units),
    (3, numbers.calendar),
    (7, words.capitals),
    (4, words.opposites),
    (12, words.translation),
    (4, words.grouping),
    (4, words.letters),
    (6, reading.extraction),
    (3, reading.sentiment),
    (5, reading.poem),
    (4, reading.continue_story),
    (4, reading.tell_story),
    (8, strings.fact),
    (3, strings.sorting),
    (2, strings.adding_up),
    (4, strings.copying),
    (3, strings.listing),
    (2, strings.english_forms),
    (3, strings.details),
)
# How often small-talk sections come up; 1 where nothing is said. "unknown" is a file of its own.
TALK_WEIGHT = {
    "unknown": 22, "who": 6, "name": 5, "greeting": 6, "ability": 4, "joke": 4, "maker": 3, "not_qwen": 3, "thanks": 4,
    "limits": 3, "how_are_you": 4, "bye": 3, "languages": 2, "human": 2, "feel_bad": 2, "riddle": 2, "proverb": 2,
}  # fmt: skip
OPENERS = ("greeting", "how_are_you", "feel_good", "feel_bad", "bored")


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
    return Exchange(topic="unknown", user=pick(rng, text["ask"], **slots), answer=pick(rng, text["answer"]))


def any_topic(rng: random.Random, lang: str) -> Exchange:
    """A single exchange from the whole world of the model."""
    if rng.random() < 0.28:
        return roughen(rng, lang, talk(rng, lang))
    return roughen(rng, lang, rng.choices([t for _, t in SINGLE], [w for w, _ in SINGLE])[0](rng, lang))


def filler(rng: random.Random, lang: str) -> list[Exchange]:
    """Zero to two short turns between a fact and its recall."""
    short = (
        numbers.arithmetic,
        words.capitals,
        words.opposites,
        words.translation,
        numbers.calendar,
        strings.fact,
        talk,
    )
    count = rng.choices((0, 1, 2), (40, 45, 15))[0]
    return [roughen(rng, lang, draw(rng, lang, rng.choice(short), heldout=False)) for _ in range(count)]


def remembering(rng: random.Random, lang: str, heldout: bool) -> list[Exchange]:
    """A fact or two, something else, and the question about one of them."""
    facts = rng.sample(memory.FACTS, rng.choices((1, 2), (70, 30))[0])
    values = {fact: memory.fact_value(rng, lang, fact) for fact in facts}
    turns = [memory.tell(rng, lang, fact, value) for fact, value in values.items()]
    turns += filler(rng, lang)
    asked = rng.sample(facts, 1 if rng.random() < 0.8 else len(facts))
    return turns + [memory.recall(rng, lang, fact, values[fact]) for fact in asked]


def greeting_by_name(rng: random.Random, lang: str, heldout: bool) -> list[Exchange]:
    """A name is told, and used at the end."""
    name = memory.fact_value(rng, lang, "name")
    return [memory.tell(rng, lang, "name", name), *filler(rng, lang), memory.by_name(rng, lang, name)]


def offering(rng: random.Random, lang: str, heldout: bool) -> list[Exchange]:
    """Bored: the model offers, the user chooses, and perhaps wants another."""
    words_for = phrases(f"memory_{lang}")
    makers: dict[str, Topic] = {"joke": joke, "story": reading.tell_story, "poem": reading.any_poem}
    kind, make = rng.choice(list(makers.items()))
    chosen = replace(make(rng, lang), user=pick(rng, words_for[f"choose_{kind}"]), expect="")
    turns = [offer(rng, lang), chosen]
    if kind == "joke" and rng.random() < 0.5:
        turns.append(talk(rng, lang, "laugh"))
    if rng.random() < 0.4:
        turns.append(replace(make(rng, lang), user=pick(rng, words_for["another"]), expect=""))
    return turns


def joke(rng: random.Random, lang: str) -> Exchange:
    """One of the few jokes."""
    return talk(rng, lang, "joke")


def offer(rng: random.Random, lang: str) -> Exchange:
    """The first answer to a bored user names joke, story and poem."""
    ask, answer = talk_section(lang, "bored")
    return Exchange(topic="bored", user=pick(rng, ask), answer=pick(rng, answer[0]))


def asked_how_it_is(rng: random.Random, lang: str, heldout: bool) -> list[Exchange]:
    """How are you, and you?, and what the user says to that."""
    first = talk(rng, lang, rng.choice(("greeting", "how_are_you")))
    turns = [first] if first.topic == "how_are_you" else [first, talk(rng, lang, "how_are_you")]
    turns.append(talk(rng, lang, rng.choice(("feel_good", "feel_bad", "polite_no"))))
    if rng.random() < 0.4:
        turns.append(talk(rng, lang, rng.choice(("thanks", "bye"))))
    return turns


def correcting(rng: random.Random, lang: str, heldout: bool) -> list[Exchange]:
    """A fact told, told anew with another value, and asked for: the later one counts."""
    fact = rng.choice(("name", "number", "color", "city", "age"))
    first, second = memory.fact_value(rng, lang, fact), memory.fact_value(rng, lang, fact)
    return [
        memory.tell(rng, lang, fact, first),
        memory.tell(rng, lang, fact, second),
        memory.recall(rng, lang, fact, second),
    ]


def asking_back(rng: random.Random, lang: str, heldout: bool) -> list[Exchange]:
    """What did I ask first, or just now."""
    turns = [any_short(rng, lang) for _ in range(rng.randint(1, 3))]
    return [*turns, memory.first_question(rng, lang, turns)]


def calculating_on(rng: random.Random, lang: str, heldout: bool) -> list[Exchange]:
    """A calculation, and one or two operations on its result."""
    turns = [draw(rng, lang, numbers.arithmetic, heldout=False)]
    for _ in range(rng.randint(1, 3)):
        turns.append(memory.next_step(rng, lang, int(turns[-1].value)))
    return turns


def translating_on(rng: random.Random, lang: str, heldout: bool) -> list[Exchange]:
    """A word in one language, then in the other."""
    entry = words.translatable(rng)
    first = words.translation(rng, lang, entry)
    while first.expect == entry[LANGUAGES.index(lang)]:
        first = words.translation(rng, lang, entry)
    used = next(x for x in LANGUAGES if x != lang and entry[LANGUAGES.index(x)] == first.expect)
    return [first, memory.say_in(rng, lang, entry, used)]


def travelling(rng: random.Random, lang: str, heldout: bool) -> list[Exchange]:
    """A capital, and another, and another."""
    first = words.capitals(rng, lang)
    while first.topic != "capital":
        first = words.capitals(rng, lang)
    return [first, *(memory.and_country(rng, lang) for _ in range(rng.randint(1, 3)))]


def chatting(rng: random.Random, lang: str, heldout: bool) -> list[Exchange]:
    """A greeting, two or three things, perhaps thanks and a goodbye."""
    turns = [talk(rng, lang, rng.choice(OPENERS))]
    turns += [
        draw(rng, lang, any_topic if rng.random() < 0.5 else talk, heldout=False) for _ in range(rng.randint(1, 2))
    ]
    if rng.random() < 0.5:
        turns.append(talk(rng, lang, rng.choice(("thanks", "bye", "praise", "ok"))))
    return turns


def repeating(rng: random.Random, lang: str, heldout: bool) -> list[Exchange]:
    """An answer, and the same again."""
    turns = [any_short(rng, lang)]
    return [*turns, memory.again(rng, lang, turns[-1])]


def not_told(rng: random.Random, lang: str, heldout: bool) -> list[Exchange]:
    """Asked for a fact that was never given."""
    return [*filler(rng, lang), memory.unknown_fact(rng, lang)]


def switching(rng: random.Random, lang: str, heldout: bool) -> list[Exchange]:
    """Asked to speak another language, and speaking it from then on."""
    other = rng.choice([x for x in LANGUAGES if x != lang])
    asked_in = rng.choice((lang, other))
    target = phrases(f"ask_{asked_in}")[f"language_{other}"][0]
    user = pick(rng, phrases(f"lists_{asked_in}")["switch"], target=target)
    switch = Exchange(topic="switch", user=user, answer=pick(rng, phrases(f"lists_{other}")["switch_answer"]))
    before = [] if rng.random() < 0.5 else [talk(rng, lang, rng.choice(OPENERS))]
    after = [draw(rng, other, any_topic, heldout=False) for _ in range(rng.randint(0, 2))]
    return [*before, switch, *after]


def doubting(rng: random.Random, lang: str, heldout: bool) -> list[Exchange]:
    """An answer, and "are you sure?", thanks, or a complaint after it."""
    return [
        draw(rng, lang, any_topic, heldout=False),
        talk(rng, lang, rng.choice(("sure", "why", "thanks", "praise", "ok", "polite_no"))),
    ]


MULTI: tuple[tuple[int, Callable[[random.Random, str, bool], list[Exchange]]], ...] = (
    (36, remembering),
    (6, correcting),
    (9, asking_back),
    (14, calculating_on),
    (8, translating_on),
    (7, travelling),
    (14, chatting),
    (3, repeating),
    (4, not_told),
    (4, switching),
    (4, greeting_by_name),
    (4, offering),
    (5, asked_how_it_is),
    (5, doubting),
)


def any_short(rng: random.Random, lang: str) -> Exchange:
    """An exchange short enough to be quoted."""
    while True:
        exchange = draw(rng, lang, any_topic, heldout=False)
        if len(exchange.user.encode()) <= 60 and len(exchange.answer.encode()) <= 100 and "\n" not in exchange.user:
            return exchange


def conversation(rng: random.Random, lang: str, *, heldout: bool) -> Sample:
    """One conversation of the training side or of the held-out test, whose last answer can be checked."""
    kind = rng.choices(("single", "multi", "persona", "react"), (53, 35, 6, 0 if heldout else 6))[0]
    while True:
        sample = _compose(rng, lang, kind, heldout=heldout)
        if sample.heldout == heldout and (sample.expect or not heldout):
            return sample


def _compose(rng: random.Random, lang: str, kind: str, *, heldout: bool) -> Sample:
    if kind == "persona":
        return persona(rng, lang, heldout=heldout)
    if kind == "react":
        return react(rng, lang)
    if kind == "single":
        turns = [draw(rng, lang, any_topic, heldout=heldout)]
    else:
        turns = rng.choices([m for _, m in MULTI], [w for w, _ in MULTI])[0](rng, lang, heldout)
    messages: list[Message] = []
    for turn in turns:
        messages += [{"role": "user", "content": turn.user}, {"role": "assistant", "content": turn.answer}]
    last = turns[-1]
    held = any(t.heldout for t in turns) if not heldout else last.heldout
    topic = last.topic if kind == "single" else f"multi/{last.topic}"
    return Sample(topic=topic, lang=lang, messages=messages, expect=last.expect, heldout=held)

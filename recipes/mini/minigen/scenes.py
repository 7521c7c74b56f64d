"""Scenes of several turns: facts told and recalled, results calculated on, stories asked about, languages switched."""

import random
from collections.abc import Callable
from dataclasses import replace

from minigen import memory, numbers, reading, refer, strings, words
from minigen.exchange import Exchange, Topic, draw
from minigen.rough import roughen
from minigen.templates import LANGUAGES, phrases, pick, talk_section
from minigen.topics import any_topic, talk

OPENERS = ("greeting", "how_are_you", "feel_good", "feel_bad", "bored")


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
    turns = [first, memory.say_in(rng, lang, entry, used)]
    if lang != "en" and turns[-1].expect == entry[0] and " " not in entry[0] and rng.random() < 0.5:
        turns.append(memory.spell_it(rng, lang, entry[0]))
    return turns


def asking_about(rng: random.Random, lang: str, heldout: bool) -> list[Exchange]:
    """A story or a poem, and a question about it."""
    if rng.random() < 0.5:
        told = reading.tell_story(rng, lang)
        return [told, memory.about_it(rng, lang, "story_hero", told.value)]
    told = reading.any_poem(rng, lang)
    title, author = told.value.split("\t")
    kind, value = rng.choice((("poem_author", author), ("poem_name", title)))
    return [told, memory.about_it(rng, lang, kind, value)]


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


def any_short(rng: random.Random, lang: str) -> Exchange:
    """An exchange short enough to be quoted."""
    while True:
        exchange = draw(rng, lang, any_topic, heldout=False)
        if len(exchange.user.encode()) <= 60 and len(exchange.answer.encode()) <= 100 and "\n" not in exchange.user:
            return exchange


MULTI: tuple[tuple[int, Callable[[random.Random, str, bool], list[Exchange]]], ...] = (
    (22, remembering),
    (5, correcting),
    (22, asking_back),
    (11, calculating_on),
    (12, translating_on),
    (6, travelling),
    (13, chatting),
    (4, repeating),
    (4, not_told),
    (4, switching),
    (4, greeting_by_name),
    (4, offering),
    (5, asked_how_it_is),
    (5, doubting),
    (6, asking_about),
    (28, refer.about_people),
    (6, refer.listing_on),
)

"""The skill test: for each skill, held-out conversations whose last answer can be checked."""

import random
from collections.abc import Callable

from minigen import memory, numbers, personas, react, reading, refer, scenes, strings, words
from minigen.dialogue import as_sample
from minigen.exchange import Exchange, Sample, Topic, draw
from minigen.topics import unknown

Scene = Callable[[random.Random, str, bool], list[Exchange]]
Make = Callable[[random.Random, str], Sample]


def single(*topics: Topic, only: str = "") -> Make:
    """One question of one of these topics; `only` keeps those that report this topic."""

    def make(rng: random.Random, lang: str) -> Sample:
        while True:
            exchange = draw(rng, lang, rng.choice(topics), heldout=True)
            if only in ("", exchange.topic):
                return as_sample([exchange], lang)

    return make


def turns(*scene: Scene) -> Make:
    """Several turns, of which the last is a held-out one."""
    return lambda rng, lang: as_sample(rng.choice(scene)(rng, lang, True), lang)


def called(make: Make, kind: str) -> Make:
    """Conversations with tools of one kind: a first call, a second one, or the answer to a result."""

    def one(rng: random.Random, lang: str) -> Sample:
        while True:
            sample = make(rng, lang)
            if sample.topic.endswith(kind):
                return sample

    return one


def known_name(rng: random.Random, lang: str, heldout: bool) -> list[Exchange]:
    """A name that no list holds, something else, and the question for it."""
    name = memory.fact_value(rng, lang, "name")
    return [
        memory.tell(rng, lang, "name", name),
        *scenes.filler(rng, lang),
        memory.recall(rng, lang, "name", name),
    ]


SKILLS: dict[str, Make] = {
    "arithmetic": single(numbers.arithmetic, numbers.spoken),
    "word problems": single(numbers.word_problem, strings.adding_up),
    "remainders, below zero": single(numbers.beyond),
    "counting": single(numbers.counting),
    "comparing": single(numbers.comparing),
    "sorting": single(strings.sorting),
    "units": single(numbers.units),
    "calendar": single(numbers.calendar),
    "capitals": single(words.capitals),
    "opposites": single(words.opposites),
    "translation": single(words.translation),
    "groups": single(words.grouping, only="category"),
    "odd one out": single(words.grouping, only="odd_one"),
    "letters": single(words.letters),
    "copying": single(strings.copying),
    "lists": single(strings.listing),
    "extraction": single(reading.extraction, strings.details),
    "comprehension": single(reading.comprehension),
    "sentiment": single(reading.sentiment),
    "facts": single(strings.fact),
    "poems": single(reading.poem),
    "recalling a name": turns(known_name),
    "recalling a fact": turns(scenes.remembering, scenes.correcting),
    "who has what": turns(refer.about_people),
    "the same list again": turns(refer.listing_on),
    "calculating on": turns(scenes.calculating_on),
    "translating on": turns(scenes.translating_on),
    "what did I say": turns(scenes.asking_back),
    "refusing": single(unknown),
    "system prompt": lambda rng, lang: personas.persona(rng, lang, heldout=True),
    "call (ReAct)": called(react.react, "call"),
    "second call (ReAct)": called(react.react, "follow"),
    "result (ReAct)": called(react.react, "answered"),
    "call (<tool_call>)": called(react.tool_call, "call"),
    "second call (<tool_call>)": called(react.tool_call, "follow"),
    "result (<tool_call>)": called(react.tool_call, "answered"),
}


def skill_test(lang: str, skill: str, *, seed: int, count: int) -> list[Sample]:
    """Different held-out conversations of a skill; fewer where its world has no more."""
    rng, found = random.Random(f"skills:{seed}:{lang}:{skill}"), dict[str, Sample]()
    for _ in range(count * 400):
        if len(found) == count:
            break
        sample = SKILLS[skill](rng, lang)
        if sample.expect and sample.heldout:
            found.setdefault(repr(sample.messages), sample)
    return list(found.values())

"""Questions that lean on earlier ones: "And Lily?", "And the last one?", who of them."""

import random
from dataclasses import replace

from minigen import invent, strings
from minigen.exchange import Exchange
from minigen.stories import cast
from minigen.templates import phrases, pick, rows
from minigen.words import COLUMN, join, members, sentence

KINDS = ("thing", "city", "age", "food", "job")


def about_people(rng: random.Random, lang: str, heldout: bool) -> list[Exchange]:
    """Two or three people, one thing known of each; who has what, and "And Lily?"."""
    text, kind = phrases(f"refer_{lang}"), rng.choice(KINDS)
    known = _known(rng, lang, kind)
    wording = rng.choice(text[f"{kind}_text"])
    said = ("" if lang == "zh" else " ").join(pick(rng, wording, who=w, value=v) for w, v in known.items())
    asked = rng.sample(list(known), rng.randint(1, len(known)))
    turns = [_question(rng, lang, kind, (who, known[who]), again=bool(number)) for number, who in enumerate(asked)]
    if rng.random() < 0.4:
        turns.append(_who(rng, lang, kind, known))
        if rng.random() < 0.4:
            turns = turns[-1:]
    if rng.random() < 0.5:
        joint = rng.choice((" ", "\n")) if lang != "zh" else rng.choice(("", "\n"))
        first = turns[0]
        return [replace(first, user=f"{said}{joint}{first.user}"), *turns[1:]]
    return [Exchange(topic="told", user=said, answer=pick(rng, text["noted"])), *turns]


def listing_on(rng: random.Random, lang: str, heldout: bool) -> list[Exchange]:
    """A question about a list of words, and then another about the same list."""
    first, text = strings.listing(rng, lang), phrases(f"lists_{lang}")
    while not first.value:
        first = strings.listing(rng, lang)
    items, turns = first.value.split("\t"), [first]
    for kind in rng.sample(("first", "second", "last"), rng.randint(1, 2)):
        result = {"first": items[0], "second": items[1], "last": items[-1]}[kind]
        user = pick(rng, text[f"and_{kind}"])
        answer = pick(rng, text[f"{kind}_answer"], result=result)
        turns.append(Exchange(topic="lines", user=user, answer=answer, key=f"{kind}:{first.value}", expect=result))
    return turns


def _known(rng: random.Random, lang: str, kind: str) -> dict[str, str]:
    """Different people with different values."""
    known: dict[str, str] = {}
    wished = rng.choice((2, 2, 3))
    while len(known) < wished:
        who, value = invent.person(rng, lang), _value(rng, lang, kind)
        if value not in known.values():
            known[who] = value
    return known


def _value(rng: random.Random, lang: str, kind: str) -> str:
    if kind == "age":
        return str(rng.randint(4, 80))
    if kind == "city":
        return invent.place(rng, lang) if rng.random() < 0.3 else rng.choice(rows("capitals"))[COLUMN[lang] + 2]
    if kind == "thing":
        slots = cast(rng, lang)
        return f"{slots['color']}{'的' if lang == 'zh' else ' '}{slots['thing']}"
    group = rng.choice(("fruit", "food", "drink")) if kind == "food" else "job"
    return rng.choice(members(group, lang)[:15])


def _question(rng: random.Random, lang: str, kind: str, known: tuple[str, str], *, again: bool) -> Exchange:
    text, (who, value) = phrases(f"refer_{lang}"), known
    user = pick(rng, text["and_who"] if again and rng.random() < 0.8 else text[f"{kind}_ask"], who=who)
    # The whole sentence: the name, written again, leads to what was said of it.
    wording = [one for one in text[f"{kind}_answer"] if "{who" in one]
    answer = sentence(pick(rng, wording, who=who, value=value))
    return Exchange(topic="reference", user=user, answer=answer, key=f"refer:{who}:{value}", expect=value)


def _who(rng: random.Random, lang: str, kind: str, known: dict[str, str]) -> Exchange:
    text, who = phrases(f"refer_{lang}"), rng.choice(list(known))
    value = known[who]
    listed = join([f"{one}: {its}" for one, its in known.items()], lang)
    answer = f"{listed}\n{pick(rng, text['who_answer'], who=who)}"
    user = pick(rng, text[f"{kind}_who"], value=value)
    return Exchange(topic="reference", user=user, answer=answer, key=f"who:{who}:{value}", expect=who)
